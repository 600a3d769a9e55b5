"""What was run and on what, by the folder alone; what it does not tell is not made up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml

from relora_ds.reports import facts
from relora_ds.reports.run_records import read_run
from relora_ds.run import manifest as manifests
from relora_ds.run.manifest import Manifest
from tests.unit.reports.run_folders import (
    begun,
    falling,
    relora_records,
    restart,
    start,
    update,
    write_run,
    write_starts,
    write_traffic,
)

SETTINGS = {
    "run": {"seed": 7},
    "method": "relora",
    "model": {"path": None},
    "data": {"path": "data/demo", "sequence_length": 128},
    "relora": {
        "rank": 16,
        "alpha": 32.0,
        "warm_start": 60,
        "restart_every": 50,
        "restart_growth": 2.0,
        "restart_warmup": 30,
        "reset": {"kind": "magnitude", "ratio": 0.99},
        "frozen": {"dtype": "auto"},
    },
    "optimizer": {"lr": 0.002, "lora_lr": None, "schedule": "jagged"},
    "train": {"updates": 900, "global_batch": 24},
}
SIZES = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 32100}


def whole_run(folder: Path) -> Path:
    """A run whose folder holds all that a report can read."""
    write_run(folder, relora_records(), [restart(1, 100)], settings=yaml.safe_dump(SETTINGS))
    write_traffic(folder, start(last_update=200, trainable_parameters=250, backend="gloo"))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(SIZES))
    for number, shape in ((0, [1, 1]), (1, [30, 25])):
        base = folder / "base" / f"restart_{number:04d}"
        base.mkdir(parents=True)
        manifests.write(base, {"files": {}, "layers": {"q_proj": {"shape": shape, "dtype": "bf16", "group_size": 128}}})
    checkpoint = folder / "checkpoints" / "update_0000200"
    checkpoint.mkdir(parents=True)
    data = {"epoch_seed": 7, "sequences": 1, "sha256": {"train": "0123456789abcdef", "validation": "f"}}
    content = Manifest(200, "lora", 1, 140, 2, 2, "bf16", "c", data, {}, {}, None, {"python": "3.11.7", "torch": "2.13.0"})
    manifests.write(checkpoint, content)
    os.utime(folder / "metrics.jsonl", (0, 86400 + 3600))
    return folder


def test_what_was_run(tmp_path: Path) -> None:
    assert facts.what(read_run(whole_run(tmp_path / "run"))) == {
        "method": "relora",
        "model": "llama, layers 4, hidden size 128, heads 4, vocabulary 32,100",
        "first weights": "random",
        "parameters": "1,000",
        "of these trained": "250 (25.0%)",
        "rank": "16",
        "alpha": "32 (B·A counts 2 times)",
        "warm start": "60 updates at full rank",
        "restart": "every 50 updates, each interval 2 times the one before",
        "learning rate climbs again over": "30 updates",
        "optimizer at a restart": "the smallest 99.0% of the moments are set to 0",
        "frozen weights stored in": "bf16",
        "learning rate of the factors": "0.002",
        "learning rate": "0.002",
        "schedule": "jagged",
        "one update": "24 sequences of 128 tokens: 3,072 tokens",
        "data": "data/demo (SHA-256 of the training tokens 0123456789ab…)",
        "seed": "7",
    }


def test_on_what(tmp_path: Path) -> None:
    assert facts.on_what(read_run(whole_run(tmp_path / "run"))) == {
        "machines": "2 rank(s) on a, b, gloo",
        "precision": "bf16, ZeRO stage 2",
        "versions": "python 3.11.7, torch 2.13.0",
        "updates done": "200 of 900, 2,000 tokens",
        "metrics.jsonl last written": "1970-01-02 01:00 UTC, by the file's date (a copy may have another)",
    }


def test_a_run_by_tokens_says_how_many_of_how_many(tmp_path: Path) -> None:
    run = read_run(whole_run(tmp_path / "run"))
    run.settings["train"] = {"updates": None, "tokens": 9000}
    assert facts.progress(run) == "200, 2,000 of 9,000 tokens"


def test_a_full_rank_run_trains_all_and_has_no_factors(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", falling(80), method="full")
    write_traffic(folder, start(last_update=80, trainable_parameters=1000))
    found = facts.what(read_run(folder))
    assert (found["parameters"], found["of these trained"]) == ("1,000", "1,000 (100.0%)")
    assert "rank" not in found and "learning rate of the factors" not in found


def test_nothing_is_guessed(tmp_path: Path) -> None:
    """A folder of nothing but a log: every value is unknown but what the log says."""
    folder = write_run(tmp_path / "run", [update(1, 3.0, phase="lora")])
    (folder / "config.yaml").unlink()
    assert set(facts.what(read_run(folder)).values()) == {facts.UNKNOWN}
    machines = facts.on_what(read_run(folder))
    assert [machines[name] for name in ("machines", "precision", "versions")] == [facts.UNKNOWN] * 3


def test_factors_without_a_base_leave_the_whole_unknown(tmp_path: Path) -> None:
    """As with self-contained checkpoints."""
    folder = write_run(tmp_path / "run", relora_records())
    write_traffic(folder, start(last_update=200, trainable_parameters=250))
    found = facts.what(read_run(folder))
    assert (found["parameters"], found["of these trained"]) == (facts.UNKNOWN, "250")


def test_what_each_start_wrote_down(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "run")
    write_starts(folder, begun())
    run = read_run(folder)
    assert facts.on_what(run) == {
        "machines": "2 rank(s) on a, b, gloo",
        "precision": "bf16, ZeRO stage 2",
        "hardware": "A processor, 4 core(s) usable, 8 GB of memory",
        "versions": "torch 2.13.0",
        "started": "2026-03-04 05:06:07+00:00",
        "updates done": "200 of 900, 2,000 tokens",
        "peak memory of rank 0": (
            "full-rank phase 500 MB, LoRA phase 600 MB (resident in main memory, the whole process since its begin)"
        ),
    }
    assert facts.commands(run) == ["`relora-ds train a.yaml` on 2 rank(s)"]


def test_whose_learning_rate_climbs_again(tmp_path: Path) -> None:
    settings = yaml.safe_dump(SETTINGS | {"relora": {**SETTINGS["relora"], "rewarm": "factors"}})
    folder = write_run(tmp_path / "run", relora_records(), [restart(1, 100)], settings=settings)
    assert facts.what(read_run(folder))["learning rate climbs again over"] == "30 updates, of the factors alone"


def test_what_a_setting_makes_of_another(tmp_path: Path) -> None:
    """A trained scaling takes alpha's place, only one schedule climbs again, and resets may have an interval of their own."""
    relora = SETTINGS["relora"] | {"trainable_scaling": True, "restart_every": None, "reset": {"kind": "full", "every": 20}}
    settings = SETTINGS | {"relora": relora, "optimizer": {"schedule": "cosine"}}
    found = facts.what(read_run(write_run(tmp_path / "run", relora_records(), settings=yaml.safe_dump(settings))))
    assert found["alpha"] == "not used: B·A counts by a trained number of each layer"
    assert found["restart"] == "never" and "optimizer at a restart" not in found
    assert found["optimizer every 20 updates"] == "all moments are set to 0"
    assert found["learning rate climbs again over"] == "nothing, by this schedule"


def test_factors_alone_have_no_warm_start_whatever_the_recipe_says(tmp_path: Path) -> None:
    """Of a recipe that other arms of a sweep share; ``low_rank`` leaves these settings out."""
    settings = yaml.safe_dump(SETTINGS | {"method": "low_rank"})
    records = [update(number, 3.0, phase="lora") for number in (1, 2)]
    found = facts.what(read_run(write_run(tmp_path / "run", records, settings=settings)))
    assert found["warm start"] == "none" and found["frozen weights stored in"] == "none: a layer is B·A alone"


def test_several_starts_on_other_machines(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "run")
    gpu = {"cpu": "B", "cores": 8, "memory_bytes": 1e11, "gpu": "NVIDIA H100", "gpu_memory_bytes": 8e10}
    peak = {"lora": 2e10}
    later = begun(
        time="2026-03-05T01:01:01+00:00", world_size=4, hardware=gpu, gpu_allocated_peak_bytes=peak, versions={"torch": "3"}
    )
    write_starts(folder, begun(), later, later)
    run = read_run(folder)
    found = facts.on_what(run)
    assert found["hardware"].endswith("; then 4 × NVIDIA H100 with 80 GB, B, 8 core(s) usable, 100 GB of memory")
    assert found["versions"] == "torch 2.13.0; then torch 3"
    assert found["started"] == "2026-03-04 05:06:07+00:00; 3 times in all, at last 2026-03-05 01:01:01+00:00"
    assert found["peak memory of rank 0"] == "LoRA phase 20 GB (allocated on the GPU)"
    assert facts.world_size(run) == 4 and len(facts.commands(run)) == 2


def test_a_start_that_tells_nothing(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "run")
    write_starts(folder, {"update": 3}, begun(hardware=[], versions=1, resident_peak_bytes=[1], command=None, seconds=[]))
    found = facts.on_what(read_run(folder))
    assert [found[name] for name in ("hardware", "versions", "peak memory of rank 0")] == [facts.UNKNOWN] * 3
