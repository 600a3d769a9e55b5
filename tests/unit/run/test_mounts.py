"""Which folders are on a file system whose clients remember, by lines as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ds.run import mounts

LINES = r"""22 1 8:2 / / rw,relatime shared:1 - ext4 /dev/sda2 rw
90 22 0:52 / /home rw,relatime shared:60 - nfs4 filer:/home rw,vers=4.2,acdirmax=60
91 22 0:53 / /scratch rw,relatime - lustre 10.0.0.1@o2ib:/scratch rw
92 90 0:54 / /home/local rw - xfs /dev/sdb1 rw
93 22 0:55 / /my\040data rw - cifs //filer/data rw
94 22 0:56 / /again rw - ext4 /dev/sdc1 rw
95 22 0:57 / /again rw - nfs filer:/again rw
"""


@pytest.mark.parametrize(
    ("folder", "kind", "remembers"),
    [
        ("/home/me/runs/a", "nfs4", True),
        ("/home/local/run", "xfs", False),
        ("/scratch/run", "lustre", False),  # its clients are told
        ("/homes/run", "ext4", False),
        ("/my data/run", "cifs", True),
        ("/again/run", "nfs", True),  # the mount that lies above
    ],
)
def test_a_folder_is_on_the_nearest_mount(tmp_path: Path, folder: str, kind: str, remembers: bool) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(LINES, encoding="utf-8")
    assert mounts.kind(Path(folder), table) == kind
    assert (mounts.remembered_s(Path(folder), table) > 60) is remembers


def test_this_machine_answers(tmp_path: Path) -> None:
    assert mounts.kind(tmp_path) != ""
    assert mounts.kind(tmp_path, tmp_path / "none") == ""
