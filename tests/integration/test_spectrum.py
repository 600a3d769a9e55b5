"""relora-ds spectrum on runs of a few updates: how many singular values LoRA, ReLoRA and full-rank training change."""

from __future__ import annotations

import csv
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import pytest

from relora_ds.cli.main import main
from relora_ds.run.folder import RunFolder
from relora_ds.spectra.changes import changes_of
from relora_ds.spectra.weights import RunWeights
from tests.command_line import relora, write_recipe

RANK, WARM_START, RESTARTS = 4, 6, 3
TRAIN = {"eval_every": None, "checkpoint_every": 6, "keep": 9, "keep_first_base": True}
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, token_folder: Path) -> Path:
    """A folder with runs of 30 updates: relora (restarts after 14, 22 and 30), lora and full; checkpoints after 6, 7, 12, … 30."""
    folder = tmp_path_factory.mktemp("spectra")
    for method in ("relora", "lora", "full"):
        settings = {"relora": {"dropout": 0.0}, "train": TRAIN, "method": method}
        relora("train", write_recipe(folder, token_folder, method, **settings), "--nproc", 1)
    return folder


def values(out: Path) -> dict[tuple[str, int], dict[str, list[float]]]:
    """What spectrum.csv holds: by run and update, by layer, the values."""
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with open(out / "spectrum.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["run"], int(row["to"])][row["layer"]].append(float(row["value"]))
    return found


def ranks(layers: dict[str, list[float]]) -> set[int]:
    """How many values of each layer are above a ten-thousandth of its largest."""
    return {sum(value > 1e-4 * layer[0] for value in layer) for layer in layers.values()}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line to the user."""
    capsys.readouterr()
    assert main(["spectrum", *map(str, arguments)]) == 2
    told = capsys.readouterr().err
    assert len([line for line in told.splitlines() if "error" in line]) == 1
    return told


@pytest.mark.long
def test_lora_changes_r_values_and_relora_more_with_every_restart(runs: Path, tmp_path: Path) -> None:
    told = relora("spectrum", runs / "relora", runs / "lora", "--all", "--out", tmp_path)
    assert told.stdout == f"wrote {tmp_path / 'spectrum.md'} and {tmp_path / 'spectrum.html'}\n"
    found = values(tmp_path)
    assert all(len(layers) == 14 for layers in found.values())
    # The learning rate of the first update is 0. The restart after the last has merged the factors, and fresh ones add nothing yet.
    intervals = {
        "lora": {7: 0, 12: 1, 18: 1, 24: 1, 30: 1},
        "relora": {7: 0, 12: 1, 18: 2, 24: 3, 30: RESTARTS},
    }
    expected = {(run, update): {RANK * count} for run, counts in intervals.items() for update, count in counts.items()}
    assert {key: ranks(layers) for key, layers in found.items()} == expected
    page = (tmp_path / "spectrum.md").read_text()
    assert re.search(r"^\| q_proj \| relora \| 2 \| 16 \| 12\.0 \|", page, re.MULTILINE)
    assert re.search(r"^\| q_proj \| lora \| 2 \| 4 \| 4\.0 \|", page, re.MULTILINE)
    for kind in KINDS:
        assert f"(plots/spectrum_{kind}.png)" in page
        assert matplotlib.image.imread(tmp_path / "plots" / f"spectrum_{kind}.png").std() > 0, f"{kind} is blank"


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Iterator[Path]:
    """The ReLoRA run, to be spoilt."""
    shutil.copytree(runs / "relora", tmp_path / "relora")
    yield tmp_path / "relora"


@pytest.mark.long
def test_full_rank_beside_the_factors(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The three arms from the end of the warm start, which a full-rank run must be told."""
    three = [str(runs / name) for name in ("relora", "lora", "full")]
    assert "name one of its checkpoints: 6, 12, 18, 24, 30" in refusal(capsys, *three)
    assert main(["spectrum", *three, "--from", str(WARM_START), "--update", "24", "--out", str(tmp_path)]) == 0
    found = {run: ranks(layers) for (run, _), layers in values(tmp_path).items()}
    assert (found["relora"], found["lora"]) == ({3 * RANK}, {RANK}) and min(found["full"]) > 30
    assert "| q_proj | full | 2 | – |" in (tmp_path / "spectrum.md").read_text()


def counts(run_dir: Path, before: int | None, now: int) -> set[tuple[int, int | None]]:
    """Of each layer, how many values are above noise, and the rank that its factors allow."""
    layers = changes_of(RunWeights(run_dir), "run", before=before, now=now).newest.layers
    return {(layer.spectrum.num_above_noise, layer.bound) for layer in layers}


@pytest.mark.long
def test_any_two_checkpoints(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert counts(runs / "lora", 12, 18) == {(2 * RANK, 2 * RANK)}, "B·A at one time less B·A at another"
    found = counts(runs / "relora", 24, 30)  # as above, by few updates of a small learning rate; the fresh factors are zero
    assert all(RANK < count <= 2 * RANK and bound == 3 * RANK for count, bound in found), found
    told = refusal(capsys, runs / "relora", "--to", 13)
    assert "there are 6, 7, 12, 18, 24, 30" in told
    assert "is not later than update 6" in refusal(capsys, runs / "relora", "--to", 6)


@pytest.mark.long
def test_a_start_that_is_not_kept_is_refused_with_the_way_out(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first base stays without a checkpoint that needs it. One of the end of the warm start serves as well."""
    run = RunFolder(copied)
    for update in (7, 12):
        shutil.rmtree(run.checkpoints / f"update_{update:07d}")
    assert main(["checkpoints", str(copied)]) == 0
    assert "the start of the factors" in capsys.readouterr().out
    assert counts(copied, None, 24) == {(3 * RANK, 3 * RANK)}
    shutil.rmtree(run.base / "restart_0000")
    assert counts(copied, None, 24) == counts(copied, WARM_START, 24) == {(3 * RANK, 3 * RANK)}
    shutil.rmtree(run.checkpoints / "update_0000006")
    told = refusal(capsys, copied)
    assert "base/restart_0000" in told and "--from (18, 24, 30)" in told and "train.keep_first_base=true" in told
    found = counts(copied, 18, 24)
    assert all(2 * RANK < count <= bound == 3 * RANK for count, bound in found), found


@pytest.mark.long
def test_a_damaged_base_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = next((RunFolder(copied).base / "restart_0000").glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    assert "holds other bytes than were written" in refusal(capsys, copied)
