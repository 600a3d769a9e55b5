"""What is said where nobody can hear it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = "import sys; from relora_ds.console import say; [say('text') for _ in range(3)]; sys.exit(75)"


def broken_pipe() -> int:
    """As ``| tee log`` leaves it, when Ctrl-C has ended that."""
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("stderr", [broken_pipe, full_disk])
def test_what_cannot_be_said_neither_ends_a_command_nor_changes_its_exit_code(stderr: object) -> None:
    assert callable(stderr)
    handle = stderr()
    done = subprocess.run([sys.executable, "-c", CODE], stderr=handle, check=False)
    os.close(handle)
    assert done.returncode == 75


def test_with_the_standard_error_closed() -> None:
    assert subprocess.run(["sh", "-c", '"$0" -c "$1" 2>&-', sys.executable, CODE], check=False).returncode == 75
