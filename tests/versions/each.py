"""The range of versions in pyproject.toml: each combination below lives through story.py. ``make test-versions``.

What pip cannot have side by side with the installed versions lies in .versions/, one folder a combination, and goes before them on
Python's path; a folder that is there is used again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from relora_ds.zero.versions import TESTED

ROOT = Path(__file__).resolve().parents[2]
SIDE = ROOT / ".versions"
TRANSFORMERS_4 = ("transformers==4.57.6", "huggingface-hub>=0.34,<1", "tokenizers>=0.22,<=0.23.0")
TRANSFORMERS_5 = ("transformers==5.0.0", "huggingface-hub>=1.3,<2", "tokenizers>=0.22,<=0.23.0")
TRAINING = {
    "deepspeed-0.16.9": ("deepspeed==0.16.9", *TRANSFORMERS_5),
    "deepspeed-0.17.6": ("deepspeed==0.17.6",),
    "deepspeed-0.18.9": ("deepspeed==0.18.9",),
}
"""What is installed over the versions of constraints.txt, with which the whole suite runs."""
LOADING = {"transformers-4.57.6": TRANSFORMERS_4}
"""What an export is to load in, beside them."""


def side_folder(name: str) -> Path:
    """The folder with a combination's packages, filled if it is not there, or not with these."""
    packages = (TRAINING | LOADING)[name]
    folder, wanted = SIDE / name, "\n".join(packages)
    stamp = folder / ".installed"
    if not (stamp.is_file() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", folder]
        subprocess.run([*command, *packages], env={**os.environ, "DS_BUILD_OPS": "0"}, check=True, timeout=600)
        stamp.write_text(wanted)
    return folder


def python(combination: str, *words: object) -> str:
    """What Python says with a combination's packages on its path; raises where it fails."""
    path = [str(side_folder(combination))] if combination else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_deepspeed_of_the_range_is_among_them() -> None:
    sides = [packages[0].removeprefix("deepspeed==") for packages in TRAINING.values()]
    assert (*sides, version("deepspeed")) == TESTED


@pytest.mark.parametrize("combination", TRAINING)
def test_lives_through_the_story(combination: str, tmp_path: Path) -> None:
    """What the installed transformers exports loads in 4.57 and 5.0, too, and what 5.0 exports in the installed one."""
    words = ("-m", "pytest", "-s", "-p", "no:cacheprovider", "--basetemp", tmp_path / "story", "tests/versions/story.py")
    told = python(combination, *words).lower()
    number = TRAINING[combination][0].removeprefix("deepspeed==")
    assert f"deepspeed {number}," in told, "the side folder's is the one that ran"
    (exported,) = (tmp_path / "story").glob("test*0/exported")
    loaders = {"deepspeed-0.16.9": [""], "deepspeed-0.17.6": ["transformers-4.57.6", "deepspeed-0.16.9", ""]}
    for loader in loaders.get(combination, []):
        assert "the same logits" in python(loader, "tests/versions/load_export.py", exported)
