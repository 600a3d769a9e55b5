"""Which checkpoints and bases stay, go, or are set aside; copies in host memory; the listing."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from relora_ds.checkpoint import reader as checkpoints
from relora_ds.checkpoint.base import entries
from relora_ds.checkpoint.listing import listing, readable
from relora_ds.checkpoint.writer import HostCopy
from relora_ds.errors import ConfigError
from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder
from relora_ds.run.manifest import Manifest, ManifestError
from tests.unit.run.test_manifest import no_access


def write_base(run: RunFolder, restarts: int) -> dict[str, str]:
    folder = run.base / f"restart_{restarts:04d}"
    folder.mkdir(parents=True)
    (folder / "rank_00000.safetensors").write_bytes(b"frozen" * restarts)
    files = {"rank_00000.safetensors": manifests.flush_and_describe(folder / "rank_00000.safetensors")}
    return {"folder": f"base/{folder.name}", "sha256": manifests.write(folder, {"files": files})}


def write_checkpoint(run: RunFolder, update: int, restarts: int, base: dict[str, str] | None) -> Path:
    folder = run.checkpoints / f"update_{update:07d}"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"state" * update)
    content = Manifest(
        update=update, phase="lora" if base else "full", restarts=restarts, lora_updates=0, world_size=1, zero_stage=2,
        precision="fp32", config_sha256="", data={}, rng={}, progress={}, base=base, versions={},
        files={"state.pt": manifests.flush_and_describe(folder / "state.pt")},
    )  # fmt: skip
    manifests.write(folder, content)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Checkpoints after 2, 4, … 12 updates; a change of phase after 3, restarts after 6 and 9."""
    run = RunFolder(tmp_path)
    bases = {restarts: write_base(run, restarts) for restarts in (0, 1, 2)}
    for update in (2, 4, 6, 8, 10, 12):
        restarts = (update >= 6) + (update >= 9)
        write_checkpoint(run, update, restarts, bases[restarts] if update > 3 else None)
    return run


def kept(run: RunFolder) -> list[int]:
    return [manifests.read(path).update for path in checkpoints.find_all(run)]


def base_names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in entries(run))


@pytest.mark.parametrize(
    ("keep", "keep_every", "updates", "bases"),
    [
        (2, None, [10, 12], ["restart_0002"]),
        (3, None, [8, 10, 12], ["restart_0001", "restart_0002"]),
        (1, 4, [4, 8, 12], ["restart_0000", "restart_0001", "restart_0002"]),
        (1, 6, [6, 12], ["restart_0001", "restart_0002"]),
        (9, None, [2, 4, 6, 8, 10, 12], ["restart_0000", "restart_0001", "restart_0002"]),
    ],
)
def test_rotation_keeps_what_a_kept_checkpoint_needs(
    run: RunFolder, keep: int, keep_every: int | None, updates: Sequence[int], bases: Sequence[str]
) -> None:
    checkpoints.rotate(run, keep=keep, keep_every=keep_every)
    assert kept(run) == updates and base_names(run) == bases
    assert not [fault for path in checkpoints.find_all(run) for fault in checkpoints.faults(path)]


def test_the_first_base_is_kept_where_that_is_asked_for(run: RunFolder) -> None:
    checkpoints.rotate(run, keep=2, keep_every=None, keep_first_base=True)
    assert kept(run) == [10, 12] and base_names(run) == ["restart_0000", "restart_0002"]
    checkpoints.tidy(run, checkpoints.choose(run, print))
    assert base_names(run) == ["restart_0000", "restart_0002"], "a resume keeps it, too"
    run.config.touch()
    table, is_whole = listing(run, deep=True)
    assert is_whole and [line.split(maxsplit=3)[3:] for line in table if line.startswith("base")] == [
        ["the start of the factors"],
        [],
    ]


def copy_beside(run: RunFolder, update: int) -> Path:
    original = run.checkpoints / f"update_{update:07d}"
    return Path(shutil.copytree(original, original.with_name(f"{original.name}_before_the_spike")))


@pytest.mark.parametrize("keep_every", [None, 4])
def test_a_users_copy_beside_them_is_neither_taken_nor_removed(run: RunFolder, keep_every: int | None) -> None:
    copies = [copy_beside(run, 4), copy_beside(run, 12)]
    (run.checkpoints / "update_0000013_half_copied").mkdir()
    checkpoints.rotate(run, keep=1, keep_every=keep_every)
    assert kept(run) == ([12] if keep_every is None else [4, 8, 12])
    chosen = checkpoints.choose(run, print)
    assert chosen is not None and chosen.name == "update_0000012" and checkpoints.newest(run) == chosen
    checkpoints.tidy(run, chosen)
    assert all((copy / manifests.NAME).is_file() for copy in copies)
    assert (run.checkpoints / "update_0000013_half_copied").is_dir()


def test_a_linked_checkpoint_of_another_run_stays_whole(run: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    other.checkpoints.mkdir(parents=True)
    (other.checkpoints / "update_0000002").symlink_to(run.checkpoints / "update_0000002")
    write_checkpoint(other, 4, 0, None)
    checkpoints.rotate(other, keep=1, keep_every=None)
    assert kept(other) == [4] and not list(checkpoints.faults(run.checkpoints / "update_0000002"))


def test_a_kept_checkpoint_that_is_damaged_lets_others_go(run: RunFolder) -> None:
    (run.checkpoints / "update_0000004" / manifests.NAME).write_text("")
    with pytest.raises(ManifestError):
        checkpoints.rotate(run, keep=1, keep_every=4)
    assert [path.name[-2:] for path in checkpoints.find_all(run)] == ["04", "08", "12"]
    assert base_names(run) == ["restart_0000", "restart_0001", "restart_0002"], "which may be needed"


def test_bases_set_aside_are_those_of_later_restarts(run: RunFolder) -> None:
    for restarts in (9999, 10000):
        update = restarts + 1000
        write_checkpoint(run, update, restarts, write_base(run, restarts))
    checkpoints.tidy(run, checkpoints.choose(run, print))
    assert not list(run.base.glob("damaged_*"))


def test_checkpoints_that_cannot_be_seen_are_not_none(run: RunFolder) -> None:
    """A run must not begin anew over them."""
    with no_access(run.checkpoints), pytest.raises(PermissionError):
        checkpoints.choose(run, print)
    with no_access(run.checkpoints):
        assert checkpoints.newest_in_words(run) == "not known (Permission denied)"
    assert checkpoints.newest_in_words(run).endswith("update_0000012")


def test_what_a_run_removes_while_it_is_listed_is_not_damaged(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.config.touch()
    faults = checkpoints.faults

    def rotated_meanwhile(path: Path, *, deep: bool) -> Iterator[str]:
        if path.name == "update_0000002":
            manifests.remove(path)
        return faults(path, deep=deep)

    monkeypatch.setattr(checkpoints, "faults", rotated_meanwhile)
    table, is_whole = listing(run, deep=True)
    assert is_whole and "update_0000002" not in "".join(table)


def test_bases_are_listed_by_their_restart(run: RunFolder) -> None:
    run.config.touch()
    for restarts in (10000, 7, 9999, 3, 8, 4):
        (run.base / f"restart_{restarts:04d}").mkdir()
    names = [line.split()[0] for line in listing(run, deep=False)[0] if line.startswith("base")]
    assert names == [f"base/restart_{restarts:04d}" for restarts in (0, 1, 2, 3, 4, 7, 8, 9999, 10000)]


def test_the_newest_whole_one_is_chosen_and_what_lies_after_it_set_aside(run: RunFolder) -> None:
    told: list[str] = []
    chosen = checkpoints.choose(run, told.append)
    assert chosen is not None and chosen.name == "update_0000012" and not told
    (run.base / "restart_0002" / "rank_00000.safetensors").write_bytes(b"other bytes.")
    chosen = checkpoints.choose(run, told.append)
    assert chosen is not None and chosen.name == "update_0000008" and len(told) == 2
    (run.checkpoints / "update_0000014").mkdir()  # a save that was killed
    (run.base / "restart_0003").mkdir()
    checkpoints.tidy(run, chosen)
    assert kept(run) == [2, 4, 6, 8] and base_names(run) == ["restart_0000", "restart_0001"]
    assert sorted(path.name for path in run.checkpoints.glob("damaged_*")) == ["damaged_update_0000010", "damaged_update_0000012"]
    assert [path.name for path in run.base.glob("damaged_*")] == ["damaged_restart_0002"]


def test_none_at_all_is_a_new_run_and_none_whole_is_not(run: RunFolder, tmp_path: Path) -> None:
    assert checkpoints.choose(RunFolder(tmp_path / "new"), print) is None
    for path in checkpoints.find_all(run):
        (path / "state.pt").unlink()
    with pytest.raises(ConfigError, match=r"run\.dir=.*none of its 6 checkpoint\(s\) is whole"):
        checkpoints.choose(run, lambda text: None)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "update": 3}'])
def test_a_manifest_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / manifests.NAME).write_text(content)
    with pytest.raises(ManifestError, match="manifest"):
        manifests.read(tmp_path)


def test_shallow_verification_sees_sizes_and_deep_contents(run: RunFolder) -> None:
    path = checkpoints.find_all(run)[-1]
    (path / "state.pt").write_bytes(b"stats" * 12)
    assert not list(checkpoints.faults(path, deep=False))
    assert [fault.rpartition(": ")[2] for fault in checkpoints.faults(path)] == ["holds other bytes than were written"]
    (path / "state.pt").write_bytes(b"state")
    assert "has 5 of 60 bytes" in next(checkpoints.faults(path, deep=False))


def test_copies_in_host_memory_are_whole_separate_and_share_what_was_shared() -> None:
    flat = torch.arange(10.0)
    state = {"view": flat[2:5], "again": flat[2:5], "list": [flat[:2], ("text", 3)], "ordered": OrderedDict(a=flat[9:])}
    copier = HostCopy()
    copier.save(state, "there")
    (copied,) = copier.states.values()
    flat.zero_()
    assert copied["view"].tolist() == [2.0, 3.0, 4.0] and copied["view"] is copied["again"]
    assert copied["view"].untyped_storage().nbytes() == 12, "no more than the view"
    assert copied["list"][0].tolist() == [0.0, 1.0] and copied["list"][1] == ("text", 3)
    assert type(copied["ordered"]) is OrderedDict and copied["ordered"]["a"].tolist() == [9.0]


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 40, "3.0 TiB")]
)
def test_bytes_for_people(num_bytes: int, text: str) -> None:
    assert readable(num_bytes) == text
