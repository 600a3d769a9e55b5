"""The trainer over real ranks: phases, resume to the last digit, signals, rotation, export."""

from __future__ import annotations

import copy
import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from relora_ds.checkpoint import reader as checkpoints
from relora_ds.cli import main as cli
from relora_ds.comm.counter import CountedGroup
from relora_ds.config import parse
from relora_ds.data.token_dataset import TokenDataset
from relora_ds.engine.release import release
from relora_ds.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, TrainingError
from relora_ds.launch import places
from relora_ds.method import lora
from relora_ds.method.frozen_weights import FrozenWeight
from relora_ds.models.export import export_model
from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder
from relora_ds.supervision import faults
from relora_ds.training import phases
from relora_ds.training.evaluate import evaluate
from relora_ds.training.loop import train as train_run
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from relora_ds.zero.state import ZeroState
from tests.conftest import TINY_LLAMA
from tests.distributed import common
from tests.distributed.common import WITH_VOCABULARY
from tests.distributed.pool import run

CPU = torch.device("cpu")
INT8 = {"dtype": "int8", "group_size": 16}


@pytest.fixture
def content(settings: dict[str, Any]) -> dict[str, Any]:
    """Warm start of 5 updates, then restarts after updates 9, 13 and 17, of 18; every ingredient that has a state is on."""
    content = copy.deepcopy(settings)
    content["relora"] = {
        "rank": 4, "alpha": 8, "dropout": 0.1, "warm_start": 5, "restart_every": 4, "restart_warmup": 2,
    }  # fmt: skip
    content["optimizer"] = {"lr": 5e-3, "lora_lr": 1e-2, "warmup": 2}
    content["train"] = {"updates": 18, "global_batch": 8, "micro_batch": 2, "eval_every": 6, "checkpoint_every": 4}
    content["wandb"] = {"mode": "disabled"}
    return content


class KilledError(Exception):
    """Stands for a process that dies between two updates."""


def train_here(content: dict[str, Any], kill_after: int | None = None, stop_after: int | None = None) -> int:
    """Trains in the pool; dies after an update, or asks one rank alone to stop."""
    place = places.discover()
    assert place is not None
    checked = check(parse(content), Path("recipe.yaml"), place.world_size)
    original = Trainer.update

    def update(self: Trainer, number: int, stop_requested: bool) -> bool:
        if number == stop_after and place.rank == place.world_size - 1:
            stop_requested = True
        stopping = original(self, number, stop_requested)
        if number == kill_after:
            raise KilledError
        return stopping

    Trainer.update = update  # type: ignore[method-assign]
    try:
        return train_run(checked, place, CPU)
    except KilledError:
        return -1
    finally:
        Trainer.update = original  # type: ignore[method-assign]


def read_log(path: Path) -> list[dict[str, Any]]:
    """A log without what differs from run to run: times, and the bytes of updates after a resume (times travel, too)."""
    volatile = ("tokens_per_s", "seconds", "parts", "sent_bytes")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in volatile} for record in records]


def at(content: dict[str, Any], folder: Path, **train: Any) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    changed["run"]["dir"] = str(folder)
    changed["train"].update(train)
    return changed


def test_an_error_of_a_rank_is_recorded(content: dict[str, Any], tmp_path: Path) -> None:
    """After the last update, whose line of the ranks' times is written again by the run that goes on."""
    assert run(2, train_here, content, 18) == [-1, -1]
    found = faults.read(tmp_path / "run")
    assert sorted(fault["rank"] for fault in found) == [0, 1]
    assert {(fault["kind"], fault["update"], fault["detail"]) for fault in found} == {("error", 18, "KilledError")}
    assert run(2, train_here, content) == [EXIT_DONE, EXIT_DONE]
    (times,) = read_log(tmp_path / "run" / "ranks.jsonl")
    assert (times["update"], times["hosts"]) == (18, [socket.gethostname()] * 2)
    assert len(times["forward_s"]) == 2 and min(times["forward_s"]) > 0
    first, second = read_log(tmp_path / "run" / "starts.jsonl")  # also of the start that failed
    assert (first["first_update"], first["update"], second["update"]) == (1, 18, 18) and 1 < second["first_update"] <= 18
    assert first["world_size"] == 2 and first["resident_peak_bytes"].keys() >= {"lora"}
    assert len(faults.read(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("dtype", "stage", "keep_moments", "frozen"),
    [
        common.long("fp32", 2, True, {}),
        common.long("bf16", 2, False, {"master": "sharded", "targets": WITH_VOCABULARY}),
        common.long("fp32", 1, False, INT8),
        common.long("fp32", 2, False, {**INT8, "master": "sharded", "init": "residual", "targets": WITH_VOCABULARY}),
        ("fp32", 2, False, {"dtype": "bf16"}),
        common.long("fp32", 2, False, {"dtype": "fp32", "master": "sharded", "master_device": "device"}),
    ],
)
def test_kill_and_resume_to_the_last_digit(
    content: dict[str, Any], tmp_path: Path, dtype: str, stage: int, keep_moments: bool, frozen: dict[str, Any]
) -> None:
    """Killed in the full-rank phase, just after the change of phase, right after a restart and in a re-warmup."""
    content["deepspeed"] = {"zero_optimization": {"stage": stage}}
    frozen = dict(frozen)
    others = {key: frozen.pop(key) for key in ("init", "targets") if key in frozen}
    content["relora"] |= {"keep_moments": keep_moments, "frozen": frozen, **others}
    if dtype == "bf16":
        content["deepspeed"]["bf16"] = {"enabled": True}
    whole = at(content, tmp_path / "whole")
    assert run(2, train_here, whole) == [EXIT_DONE, EXIT_DONE]
    pieces = at(content, tmp_path / "pieces", checkpoint_every=1)
    for kill_after in (3, 6, 9, 14):
        assert run(2, train_here, pieces, kill_after) == [-1, -1]
    assert run(2, train_here, pieces) == [EXIT_DONE, EXIT_DONE]
    for log in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(tmp_path / "pieces" / log) == read_log(tmp_path / "whole" / log)
    updates = [record for record in read_log(tmp_path / "whole" / "metrics.jsonl") if "loss" in record]
    assert [record["update"] for record in updates] == list(range(1, 19))
    assert [record["phase"] for record in updates] == ["full"] * 5 + ["lora"] * 13
    assert [record["update"] for record in read_log(tmp_path / "whole" / "restarts.jsonl")] == [9, 13, 17]
    assert updates[-1]["loss"] < updates[0]["loss"] - 0.5


def test_resume_far_behind_the_logs(content: dict[str, Any], tmp_path: Path) -> None:
    """Killed after update 11 with checkpoints at 4 and 8: updates 9 to 11 and their restart are done, and logged, once."""
    whole, pieces = at(content, tmp_path / "whole"), at(content, tmp_path / "pieces")
    run(2, train_here, whole)
    run(2, train_here, pieces, 11)
    with open(tmp_path / "pieces" / "metrics.jsonl", "a") as file:
        file.write('{"update": 12, "lo')  # a line that the kill cut off
    run(2, train_here, pieces)
    for log in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(tmp_path / "pieces" / log) == read_log(tmp_path / "whole" / log)


def test_one_signalled_rank_stops_all_with_a_checkpoint(content: dict[str, Any], tmp_path: Path) -> None:
    """Before the evaluation that is due then: what stops a run may not leave it the time for both."""
    whole, stopped = at(content, tmp_path / "whole"), at(content, tmp_path / "stopped", checkpoint_every=None)
    run(2, train_here, whole)
    assert run(2, train_here, stopped, None, 12) == [EXIT_STOPPED, EXIT_STOPPED]
    folder = RunFolder(tmp_path / "stopped")
    newest = checkpoints.newest(folder)
    assert newest is not None and checkpoints.read_manifest(newest).update == 12
    assert read_log(folder.metrics)[-1].keys() >= {"update", "eval_loss"}
    assert (newest / manifests.NAME).stat().st_mtime_ns < folder.metrics.stat().st_mtime_ns
    assert run(2, train_here, stopped) == [EXIT_DONE, EXIT_DONE]
    assert read_log(tmp_path / "stopped" / "metrics.jsonl") == read_log(tmp_path / "whole" / "metrics.jsonl")


def test_rotation_and_half_written_checkpoints(content: dict[str, Any], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    settings = at(content, folder.path, keep=2)
    run(2, train_here, settings, 13)
    assert [path.name for path in checkpoints.find_all(folder)] == ["update_0000008", "update_0000012"]
    assert not (folder.checkpoints / "update_0000004").exists()
    (folder.checkpoints / "update_0000012" / manifests.NAME).unlink()  # as if killed while it was written
    newest = checkpoints.newest(folder)
    assert newest is not None and newest.name == "update_0000008"
    assert run(2, train_here, settings) == [EXIT_DONE, EXIT_DONE]
    assert [path.name for path in checkpoints.find_all(folder)] == ["update_0000016", "update_0000018"]


def test_resume_is_refused_for_another_run(content: dict[str, Any], tmp_path: Path) -> None:
    settings = at(content, tmp_path / "run")
    run(2, train_here, settings, 5)
    changed = copy.deepcopy(settings)
    changed["relora"]["rank"] = 8
    with pytest.raises(ConfigError, match=r"relora\.rank=8: the run in .* has 4; name another run\.dir"):
        check(parse(changed), Path("recipe.yaml"), 2)
    harmless = at(settings, tmp_path / "run", eval_every=3)
    check(parse(harmless), Path("recipe.yaml"), 2)


@pytest.mark.parametrize("seed", [0, 2**31 - 1])
def test_the_smallest_and_the_largest_seed(content: dict[str, Any], seed: int) -> None:
    """Through a real update of both phases, whose dropout is seeded by more than 64 bits of the largest."""
    content["run"]["seed"] = seed
    content["train"]["updates"], content["relora"]["warm_start"], content["optimizer"] = 2, 1, {"lr": 0.002}
    assert run(1, train_here, content) == [EXIT_DONE]


def losses_of_a_run(content: dict[str, Any]) -> list[float]:
    train_here(content)
    records = read_log(Path(content["run"]["dir"]) / "metrics.jsonl")
    return [record.get("loss", record.get("eval_loss")) for record in records]


def test_world_size_does_not_change_the_run(content: dict[str, Any], tmp_path: Path) -> None:
    """The same samples in the same updates at 1, 2 and 4 ranks: losses differ by the order of sums only."""
    content["relora"]["dropout"] = 0.0  # dropout is drawn per rank
    content["optimizer"] = {"lr": 1e-3, "warmup": 2}
    runs = {
        world_size: run(world_size, losses_of_a_run, at(content, tmp_path / f"ranks{world_size}"))[0] for world_size in (1, 2, 4)
    }
    assert runs[2] == pytest.approx(runs[1], rel=1e-5)
    assert runs[4] == pytest.approx(runs[1], rel=1e-5)


def after_the_warm_start(content: dict[str, Any]) -> Trainer:
    """A run at the end of its full-rank phase of five updates."""
    place = places.discover()
    assert place is not None
    trainer = Trainer(check(parse(content), Path("recipe.yaml"), place.world_size), place, CPU)
    for update in range(1, 6):
        trainer.update(update, False)
    return trainer


def moments_over_the_change(content: dict[str, Any]) -> dict[str, Any]:
    """Masters and first moments of embedding and norm, and the validation loss, before and after the change of phase."""
    trainer = after_the_warm_start(content)
    names = ("model.embed_tokens.weight", "model.norm.weight")
    found: dict[str, Any] = {}
    for when in ("before", "after"):
        if when == "after":
            trainer.enter_phase(6)
        zero = getattr(trainer.engine.optimizer, "zero", trainer.engine.optimizer)
        params = {name: p for name, p in trainer.engine.module.named_parameters() if name in names}
        state = ZeroState(zero, params, CountedGroup(None, CPU))
        data = trainer.held_out
        found[when] = {
            "masters": {name: state.gather(name) for name in names},
            "moments": {name: {key: state.gather(name, key) for key in state.moment_keys()} for name in names},
            "steps": [state.step_count(name) for name in names],
            "loss": evaluate(
                trainer.engine.module,
                data,
                batch_size=2,
                device=CPU,
                rank=trainer.place.rank,
                world_size=trainer.place.world_size,
            ).loss,
        }
    found["trainable"] = sorted(name for name, p in trainer.engine.module.named_parameters() if p.requires_grad)
    release(trainer.engine)
    return found


@pytest.mark.parametrize("keep_moments", [True, False])
def test_change_of_phase(content: dict[str, Any], keep_moments: bool) -> None:
    """In bf16, where the masters hold more than the module: nothing of them is lost; the moments go along when asked."""
    content["deepspeed"]["bf16"] = {"enabled": True}
    content["relora"]["keep_moments"] = keep_moments
    found = run(2, moments_over_the_change, content)[0]
    before, after = found["before"], found["after"]
    for name, master in before["masters"].items():
        assert torch.equal(after["masters"][name], master)
        assert not torch.equal(master, master.bfloat16().float()) or name == "model.norm.weight"
    assert after["loss"] == before["loss"], "B is zero: the function is the same to the bit"
    if keep_moments:
        assert after["steps"] == before["steps"] == [5, 5]
        for name, moments in before["moments"].items():
            assert set(moments) == {"exp_avg", "exp_avg_sq"}
            assert all(torch.equal(after["moments"][name][key], value) for key, value in moments.items())
    else:
        assert after["steps"] == [0, 0]
        assert after["moments"] == {name: {} for name in before["moments"]}
    assert not any(name.endswith("_proj.weight") for name in found["trainable"])
    assert "lm_head.weight" in found["trainable"]


def master_over_the_change(content: dict[str, Any]) -> dict[str, Any]:
    """Rows of the frozen master after the change of phase, and the full-rank engine's masters that they must be."""
    trainer = after_the_warm_start(content)
    name = "model.layers.1.mlp.up_proj"
    weight = trainer.engine.module.get_submodule(name).weight
    before = ZeroState(trainer.engine.optimizer, {name: weight}, CountedGroup(None, CPU)).gather(name)
    trainer.enter_phase(6)
    master = trainer.engine.optimizer.frozen_master
    result = {"before": before, "rows": master.rows[name], "own": master.own(name), "stored": master.weights[name].read()}
    release(trainer.engine)
    return result


def test_frozen_master_takes_over_the_full_rank_masters(content: dict[str, Any]) -> None:
    """In bf16 the module holds less than the masters: nothing of them is lost, and the store is their rounding."""
    content["deepspeed"]["bf16"] = {"enabled": True}
    content["relora"]["frozen"] = {"dtype": "int8", "group_size": 16, "master": "sharded"}
    for result in run(2, master_over_the_change, content):
        before = result["before"]
        assert not torch.equal(before, before.bfloat16().float())
        assert torch.equal(result["rows"], before[result["own"]])
        assert torch.equal(result["stored"], FrozenWeight(before, "int8", 16).read())


def diverge(content: dict[str, Any]) -> str:
    """A learning rate that makes the loss infinite."""
    try:
        train_here(content)
    except TrainingError as error:
        return str(error)
    return ""


def test_too_many_skipped_updates_stop_the_run(content: dict[str, Any], tmp_path: Path) -> None:
    content["relora"]["warm_start"] = 0
    content["optimizer"] = {"lr": 1e20, "grad_clip": 0.0, "schedule": "constant"}
    settings = at(content, tmp_path / "run", max_skipped=3, checkpoint_every=1)
    for message in run(2, diverge, settings):
        assert "3 updates in a row had a non-finite gradient" in message
    records = read_log(tmp_path / "run" / "metrics.jsonl")
    assert sum(record.get("skipped", False) for record in records) == 3
    assert records[-1]["loss"] is None or math.isfinite(records[-1]["loss"])
    assert faults.read(tmp_path / "run") == [], "no rank is to blame"


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize(("dtype", "checkpoint_every"), [("fp32", 1), ("bf16", None)])
def test_weights_that_are_not_finite_stop_the_run(
    content: dict[str, Any], tmp_path: Path, dtype: str, checkpoint_every: int | None
) -> None:
    """Found when they were to be saved, or at the change of phase; told in one line, and no checkpoint holds them."""
    content["relora"] |= {"warm_start": 1}
    content["optimizer"] = {"lr": 1e38, "grad_clip": 0.0, "schedule": "constant"}
    if dtype == "bf16":
        content["deepspeed"]["bf16"] = {"enabled": True}
    settings = at(content, tmp_path / "run", checkpoint_every=checkpoint_every)
    for message in run(2, diverge, settings):
        assert message.startswith("diverged: the weights are not finite since update 1 (")
        assert "lower optimizer.lr" in message and message.endswith("the newest checkpoint is none")
    assert checkpoints.find_all(RunFolder(tmp_path / "run")) == []
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constant)


@pytest.mark.parametrize(
    ("dtype", "stored", "master"),
    [
        ("bf16", "auto", "none"),
        common.long("fp32", "fp32", "none"),
        common.long("fp32", "fp32", "sharded"),
        common.long("fp32", "bf16", "none"),
        common.long("fp32", "bf16", "sharded"),
        common.long("fp32", "int8", "none"),
        ("fp32", "int8", "sharded"),
    ],
)
def test_export_round_trip(content: dict[str, Any], tmp_path: Path, dtype: str, stored: str, master: str) -> None:
    """transformers loads the export as an ordinary model with the perplexity of the run's last evaluation."""
    content["relora"]["frozen"] = {"dtype": stored, "master": master}
    if dtype == "bf16":
        content["deepspeed"]["bf16"] = {"enabled": True}
    content["relora"]["restart_every"] = 8  # the last restart, after update 13, leaves the factors time to grow again
    settings = at(content, tmp_path / "run")
    run(2, train_here, settings)
    last = [record for record in read_log(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in record][-1]
    out = export_model(tmp_path / "run", tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert not any("lora" in name for name, _ in model.named_parameters())
    data = TokenDataset(Path(content["data"]["path"]), "validation", 16, shuffle=False)
    loss = evaluate(model, data, batch_size=4, device=CPU).loss
    # fp32: only the order of sums differs. bf16: the merged weight is rounded, as at every restart.
    assert loss == pytest.approx(last["eval_loss"], rel=1e-5 if dtype == "fp32" else 5e-3)
    text = "Entry 7: the square"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ConfigError, match="is not empty"):
        export_model(tmp_path / "run", out)


def test_earlier_run_and_hugging_face_folder_as_warm_starts(content: dict[str, Any], tmp_path: Path) -> None:
    """Both begin with the merged weights of the earlier run: the first loss is the same, and it is the earlier run's level."""
    first = at(content, tmp_path / "first")
    run(2, train_here, first)
    folder = export_model(tmp_path / "first", tmp_path / "exported")
    losses = {}
    for name, source in (("run", tmp_path / "first"), ("folder", folder)):
        second = at(content, tmp_path / f"from_{name}", updates=3)
        second["model"] = {"path": str(source)}
        second["relora"] |= {"warm_start": 0, "dropout": 0.0}
        losses[name] = run(2, losses_of_a_run, second)[0]
    assert losses["run"] == losses["folder"]
    records = [record for record in read_log(tmp_path / "first" / "metrics.jsonl") if "loss" in record]
    assert losses["run"][0] == pytest.approx(records[-1]["loss"], abs=0.3)
    assert losses["run"][0] < records[0]["loss"] - 0.5


@pytest.mark.long
def test_a_run_that_was_moved_goes_on(content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run and tokens elsewhere, and the model that it started from gone: the same updates, and the same evaluation."""
    config = LlamaConfig(**{key: value for key, value in TINY_LLAMA.items() if key != "model_type"}, vocab_size=300)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "whole" / "model")
    shutil.copytree(content["data"]["path"], tmp_path / "whole" / "tokens")
    shutil.copytree(tmp_path / "whole", tmp_path / "before")
    whole, before = (at(content, tmp_path / name / "run") for name in ("whole", "before"))
    for settings, home in ((whole, tmp_path / "whole"), (before, tmp_path / "before")):
        settings["data"]["path"], settings["model"] = str(home / "tokens"), {"path": str(home / "model")}
    assert run(2, train_here, whole) == [EXIT_DONE, EXIT_DONE]
    assert run(2, train_here, before, 11) == [-1, -1]
    shutil.move(tmp_path / "before", tmp_path / "after")
    shutil.rmtree(tmp_path / "after" / "model")
    after = at(before, tmp_path / "after" / "run")
    after["data"]["path"] = str(tmp_path / "after" / "tokens")
    assert run(2, train_here, after) == [EXIT_DONE, EXIT_DONE]
    assert read_log(tmp_path / "after" / "run" / "metrics.jsonl") == read_log(tmp_path / "whole" / "run" / "metrics.jsonl")
    shutil.move(tmp_path / "after" / "tokens", tmp_path / "tokens")
    assert cli.main(["eval", str(tmp_path / "after" / "run")]) == 2
    assert f"the run's tokens are not in {tmp_path / 'after' / 'tokens'} any more; name the folder" in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path / "after" / "run"), "--data", str(tmp_path / "tokens")]) == 0
    assert cli.main(["export", str(tmp_path / "after" / "run"), str(tmp_path / "exported")]) == 0


@pytest.mark.parametrize("method", ["full", *map(common.long, ("control", "lora", "low_rank"))])
def test_the_other_arms_of_the_paper(content: dict[str, Any], tmp_path: Path, method: str) -> None:
    """On the recipe of a ReLoRA run: killed, resumed to the last digit, no restarts; the export has the run's perplexity."""
    content["relora"] |= {"trainable_scaling": True, "init": "orthonormal", "targets": WITH_VOCABULARY}
    content["method"] = method
    whole, pieces = at(content, tmp_path / "whole"), at(content, tmp_path / "pieces", checkpoint_every=1)
    assert run(2, train_here, whole) == [EXIT_DONE, EXIT_DONE]
    assert run(2, train_here, pieces, 7) == [-1, -1]
    assert run(2, train_here, pieces) == [EXIT_DONE, EXIT_DONE]
    records = read_log(tmp_path / "whole" / "metrics.jsonl")
    assert read_log(tmp_path / "pieces" / "metrics.jsonl") == records
    updates = [record for record in records if "loss" in record]
    phases_seen = {"full": {"full"}, "control": {"full"}, "lora": {"full", "lora"}, "low_rank": {"lora"}}[method]
    assert {record["phase"] for record in updates} == phases_seen
    assert {record["restarts"] for record in updates} == {0}
    assert updates[-1]["loss"] < updates[0]["loss"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(export_model(tmp_path / "whole", tmp_path / "exported"), dtype="auto").eval()
    width = 32 if method != "control" else model.config.hidden_size
    assert model.model.layers[1].self_attn.q_proj.weight.shape == (width, width) and (width < 32) == (method == "control")
    data = TokenDataset(Path(content["data"]["path"]), "validation", 16, shuffle=False)
    assert evaluate(model, data, batch_size=4, device=CPU).loss == pytest.approx(records[-1]["eval_loss"], rel=1e-5)


def test_low_rank_trains_as_many_parameters_as_lora_and_stores_no_weight(content: dict[str, Any]) -> None:
    content["method"] = "low_rank"
    content["relora"]["targets"] = WITH_VOCABULARY
    model = phases.initial_model(check(parse(content), Path("recipe.yaml"), 1), CPU, "lora")
    assert all(layer.weight is None for _, layer in lora.relora_layers(model))
    content["method"] = "lora"
    other = phases.initial_model(check(parse(content), Path("recipe.yaml"), 1), CPU, "lora")
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in other.named_parameters()}


def test_offloaded_optimizer_through_the_trainer(content: dict[str, Any], tmp_path: Path) -> None:
    """The masters and moments in host memory: warm start, restarts and resume give the losses of the run without offload."""
    content["relora"]["keep_moments"] = True
    here, offloaded = at(content, tmp_path / "here"), at(content, tmp_path / "offloaded")
    offloaded["deepspeed"]["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    run(2, train_here, here)
    run(2, train_here, offloaded, 11)
    assert run(2, train_here, offloaded) == [EXIT_DONE, EXIT_DONE]
    losses = [[r["loss"] for r in read_log(tmp_path / name / "metrics.jsonl") if "loss" in r] for name in ("here", "offloaded")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def test_gpt2_with_a_tied_head_through_the_trainer(content: dict[str, Any], tmp_path: Path) -> None:
    """Conv1D layers and a head tied to the embedding: warm start, restarts, checkpoint, resume, export."""
    settings = at(content, tmp_path / "gpt2")
    settings["model"] = {"config": GPT2, "gradient_checkpointing": True}
    run(2, train_here, settings, 11)
    assert run(2, train_here, settings) == [EXIT_DONE, EXIT_DONE]
    last = read_log(tmp_path / "gpt2" / "metrics.jsonl")[-1]
    model = AutoModelForCausalLM.from_pretrained(export_model(tmp_path / "gpt2", tmp_path / "exported"), dtype="auto").eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    data = TokenDataset(Path(content["data"]["path"]), "validation", 16, shuffle=False)
    assert evaluate(model, data, batch_size=4, device=CPU).loss == pytest.approx(last["eval_loss"], rel=1e-5)
