"""What kind of file system a folder is on, where that changes how soon other machines see what is written there."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
REMEMBERING = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")
"""Their clients answer out of memory for up to a minute: also that a name is not there."""
REMEMBERED_S = 65.0
"""How long: NFS's acdirmax of 60 s, and a little."""


def remembered_s(folder: Path, mounts: Path = MOUNTS) -> float:
    """For how long a machine may not see what another one has written into a folder; 0 where it sees it at once, or nobody knows."""
    return REMEMBERED_S if kind(folder, mounts) in REMEMBERING else 0.0


def kind(folder: Path, mounts: Path = MOUNTS) -> str:
    """The type of the file system that a folder is on, or will be; empty where it cannot be told."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
        place = folder.resolve()
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return ""
    found = [(point, what) for line in lines for point, what in [_mount(line)] if place.is_relative_to(point)]
    return max(enumerate(found), key=lambda item: (len(item[1][0].parts), item[0]))[1][1] if found else ""


def _mount(line: str) -> tuple[Path, str]:
    """Where something is mounted, and of what type: ``36 35 98:0 /root /mnt rw … - ext4 /dev/sda1 rw``, with spaces as ``\\040``."""
    before, _, after = line.partition(" - ")
    point = before.split()[4]
    return Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)), after.split()[0]
