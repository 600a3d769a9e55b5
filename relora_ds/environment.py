"""What the environment says of this process. It is read here and in ``launch``, which alone sets it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path


def process_environment() -> dict[str, str]:
    """A copy of this process's environment as it is now."""
    return dict(os.environ)


def expand(path: str, environment: Mapping[str, str] | None = None) -> str:
    """A path with its ``$VAR`` and ``${VAR}`` filled in, then a leading ``~`` or ``~user``, as a shell does.

    Raises:
        ValueError: with the name of the variable that is unset or empty, or of the user that there is not.
    """
    env = os.environ if environment is None else environment

    def value(match: re.Match[str]) -> str:
        if not (found := env.get(match[1] or match[2])):
            raise ValueError(f"the environment variable {match[1] or match[2]} is not set, or empty")
        return found

    filled = re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, path)
    try:
        return str(Path(filled).expanduser()) if filled.startswith("~") else filled
    except RuntimeError:
        name = filled.partition("/")[0]
        raise ValueError(f"{name} is nobody's home folder; write ./{name} for what has this name") from None


def node_name(environment: Mapping[str, str] | None = None) -> str:
    """This machine by the name that the scheduler knows, which its own need not be; by its own outside of SLURM."""
    env = os.environ if environment is None else environment
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def attempt(environment: Mapping[str, str] | None = None) -> str:
    """This start of the SLURM job, ``JOB_ID.RESTART_COUNT``; empty outside of one."""
    env = os.environ if environment is None else environment
    job = env.get("SLURM_JOB_ID", "")
    return f"{job}.{env.get('SLURM_RESTART_COUNT') or 0}" if job else ""


def allocation() -> str | None:
    """The nodes of the SLURM job that this process is in, as SLURM writes them; None outside of jobs."""
    return os.environ.get("SLURM_JOB_NODELIST")
