"""Checkpoints over real processes: what they hold, on how many ranks they can be gone on with, and what is done about damage."""

from __future__ import annotations

import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from relora_ds.checkpoint import base as bases
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.checkpoint import universal as elastic
from relora_ds.config import parse
from relora_ds.engine.release import release
from relora_ds.errors import EXIT_DONE
from relora_ds.launch import places
from relora_ds.method.lora import relora_layers
from relora_ds.models.export import export_model, load_merged
from relora_ds.run import manifest as manifests
from relora_ds.run.folder import RunFolder
from relora_ds.training import trainer as trainers
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.distributed import common
from tests.distributed.pool import run
from tests.distributed.test_training import at, read_log, train_here

CPU = torch.device("cpu")
INT8 = {"dtype": "int8", "group_size": 16}


def folders(run_folder: RunFolder) -> list[str]:
    return sorted(path.name for path in bases.entries(run_folder))


# What they hold


@pytest.mark.parametrize("master", ["none", "sharded"])
def test_frozen_weights_are_written_once_per_restart(content: dict[str, Any], tmp_path: Path, master: str) -> None:
    """Checkpoints after 3, 6, 9, 12, 15 and 18: a base after the change of phase and after each restart that one of them needs."""
    content["relora"]["frozen"] = INT8 | {"master": master}
    settings, folder = at(content, tmp_path / "run"), RunFolder(tmp_path / "run")
    run(2, train_here, settings)
    needed = {path.name: checkpoints.read_manifest(path).base for path in checkpoints.find_all(folder)}
    assert [base and base["folder"] for base in needed.values()] == [
        None, "base/restart_0000", "base/restart_0001", "base/restart_0002", "base/restart_0002", "base/restart_0003",
    ]  # fmt: skip
    assert folders(folder) == [f"restart_000{index}" for index in range(4)]
    for base in bases.entries(folder):
        assert sorted(path.name for path in base.iterdir()) == [
            "manifest.json",
            "rank_00000.safetensors",
            "rank_00001.safetensors",
        ]
        assert bases.Base(base).is_master == (master == "sharded")
    for path in checkpoints.find_all(folder):
        assert not list(checkpoints.faults(path))
        state = checkpoints.read_model_state(path)
        assert any("lora_A" in name for name in state) == (path.name > "update_0000004")
        assert not any("values" in name for name in state)
    assert (folder.checkpoints / "latest").read_text() == "update_0000018"


@pytest.mark.parametrize("precision", [common.long("bf16"), "fp32"])
def test_a_checkpoint_takes_what_its_trainable_parameters_need(content: dict[str, Any], tmp_path: Path, precision: str) -> None:
    """2 + 12 bytes for each in bf16 (4 + 12 in fp32), within 5%; DeepSpeed's own way takes the frozen weights on top, every time."""
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    content["model"]["config"] |= sizes
    content["train"] |= {"updates": 6, "checkpoint_every": 5}
    content["relora"] |= {"warm_start": 0, "frozen": {"master": "sharded"}}
    if precision == "bf16":
        content["deepspeed"]["bf16"] = {"enabled": True}
    taken = {}
    for self_contained in (False, True):
        content["checkpoint"] = {"self_contained": self_contained}
        folder = RunFolder(tmp_path / f"contained_{self_contained}")
        run(2, train_here, at(content, folder.path))
        listed = checkpoints.read_manifest(folder.checkpoints / "update_0000005").files
        taken[self_contained] = sum(entry["bytes"] for entry in listed.values())
        if not self_contained:
            state = checkpoints.read_model_state(folder.checkpoints / "update_0000005")
            trainable = sum(value.numel() for value in state.values())
            base = sum(entry["bytes"] for entry in manifests.read_json(folder.base / "restart_0001")["files"].values())
    each = (2 if precision == "bf16" else 4) + 12
    assert each * trainable <= taken[False] <= 1.05 * each * trainable
    frozen = 3 * (4 * 96 * 96 + 3 * 96 * 256)
    assert base == pytest.approx(4 * frozen, rel=0.03)
    assert taken[True] > taken[False] + 4 * frozen, "what is saved again and again otherwise"


# Any number of ranks


def losses(folder: Path) -> dict[int, float]:
    return {record["update"]: record["loss"] for record in read_log(folder / "metrics.jsonl") if "loss" in record}


@pytest.mark.parametrize(
    ("before", "after", "stage", "frozen", "contained"),
    [
        common.long(4, 2, 2, {}, False),
        common.long(2, 3, 2, INT8 | {"master": "sharded", "targets": common.WITH_VOCABULARY}, False),
        (2, 1, 1, INT8, False),
        common.long(1, 2, 2, {"dtype": "bf16", "master": "sharded"}, True),
        common.long(1, 4, 1, {"master": "sharded"}, False),
        common.long(3, 4, 2, INT8 | {"master": "sharded", "init": "residual"}, True),
    ],
)
def test_resume_on_another_number_of_ranks(
    content: dict[str, Any], tmp_path: Path, before: int, after: int, stage: int, frozen: dict[str, Any], contained: bool
) -> None:
    """Killed after update 7 (checkpoint 6, in the LoRA phase), gone on with over three restarts: the losses of the whole run.

    In fp32 only the order of sums differs. The residual of an int8 store turns with it: an entry that rounds to the other side moves
    the factors' subspace, so there the losses agree as two runs do, to three digits."""
    frozen = dict(frozen)
    content["train"]["micro_batch"] = 1
    tolerance = 1e-3 if frozen.get("init") == "residual" else 1e-5
    content["deepspeed"] = {"zero_optimization": {"stage": stage}}
    others = {key: frozen.pop(key) for key in ("init", "targets") if key in frozen}
    content["relora"] |= {"frozen": frozen, **others}
    content["checkpoint"] = {"self_contained": contained}
    whole, moved = at(content, tmp_path / "whole"), at(content, tmp_path / "moved")
    run(before, train_here, whole)
    run(before, train_here, moved, 7)
    assert run(after, train_here, moved) == [EXIT_DONE] * after
    first, second = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert list(first) == list(second) == list(range(1, 19))
    assert [second[update] for update in range(1, 7)] == [first[update] for update in range(1, 7)]
    assert list(second.values()) == pytest.approx(list(first.values()), rel=tolerance)
    restarts = [read_log(tmp_path / name / "restarts.jsonl") for name in ("whole", "moved")]
    assert [record["pruned_fraction"] for record in restarts[0]] == [record["pruned_fraction"] for record in restarts[1]]
    assert checkpoints.read_manifest(tmp_path / "moved" / "checkpoints" / "update_0000018").world_size == after


def state_after_loading(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Everything that a resumed run begins with, gathered from all ranks."""
    place = places.discover()
    assert place is not None
    trainer = Trainer(check(parse(content), Path("recipe.yaml"), place.world_size), place, CPU)
    optimizer = trainer.engine.optimizer
    state: dict[str, torch.Tensor] = {"counts": torch.tensor([optimizer.updates, optimizer.restarts, trainer.done.update])}
    for name in optimizer.masters.params:
        state[name] = optimizer.masters.gather(name)
        state[f"{name} step"] = torch.tensor(optimizer.masters.step_count(name))
        for key in optimizer.masters.moment_keys():
            state[f"{name} {key}"] = optimizer.masters.gather(name, key)
    for name, layer in relora_layers(trainer.engine.module):
        state[f"{name} values"] = layer.weight.values.clone()
        if optimizer.frozen_master is not None:
            rows = torch.zeros(layer.weight.shape)
            rows[optimizer.frozen_master.own(name)] = optimizer.frozen_master.rows[name]
            state[f"{name} master"] = optimizer.comm.all_reduce(rows, "checkpoint")
    optimizer.restart()  # from equal state: the same masks, factors and merged weights
    for name in optimizer.masters.params:
        state[f"{name} restarted"] = optimizer.masters.gather(name)
        for key in optimizer.masters.moment_keys():
            state[f"{name} {key} restarted"] = optimizer.masters.gather(name, key)
    for name, layer in relora_layers(trainer.engine.module):
        state[f"{name} merged"] = layer.weight.values.clone()
    trainer.close(exit_code=1)
    release(trainer.engine)
    return state


@pytest.mark.long
@pytest.mark.parametrize("frozen", [{}, INT8 | {"master": "sharded"}])
def test_another_number_of_ranks_begins_with_the_same_bits(
    content: dict[str, Any], tmp_path: Path, frozen: dict[str, Any]
) -> None:
    content["relora"]["frozen"] = frozen
    settings = at(content, tmp_path / "run")
    run(2, train_here, settings, 10)
    expected = run(2, state_after_loading, settings)[0]
    assert expected["counts"].tolist() == [5, 1, 9]
    for world_size in (1, 3, 4):
        for found in run(world_size, state_after_loading, settings):
            assert found.keys() == expected.keys()
            for what, value in expected.items():
                assert torch.equal(found[what], value), f"{what} differs at {world_size} ranks"


def loading_says(content: dict[str, Any]) -> str:
    told: list[str] = []
    original = trainers.say
    trainers.say = told.append
    try:
        state_after_loading(content)
    finally:
        trainers.say = original
    return "\n".join(told)


def test_a_conversion_is_made_once_and_reused(content: dict[str, Any], tmp_path: Path) -> None:
    settings = at(content, tmp_path / "run")
    run(2, train_here, settings, 7)
    folder = tmp_path / "run" / "universal" / "update_0000006"
    assert "once (DeepSpeed's ds_to_universal)" in run(3, loading_says, settings)[0]
    made = (folder / "zero" / "optimizer_state.pt").stat().st_mtime_ns
    assert "reusing the universal checkpoint" in run(1, loading_says, settings)[0]
    assert (folder / "zero" / "optimizer_state.pt").stat().st_mtime_ns == made


def convert_slowly(folder: str, problem: str) -> str:
    """Rank 0 converts for three seconds, where collectives end in error after one; what each rank learns."""

    def slow(*_: Any, **__: Any) -> None:
        time.sleep(3)
        if problem:
            raise elastic.ConversionError(problem)

    original, elastic.convert = elastic.convert, slow
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    try:
        return str(elastic._convert_on_rank_0(RunFolder(Path(folder)), Path("update_0000001"), print, False))
    except elastic.ConversionError as error:
        return str(error)
    finally:
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=30))
        elastic.convert = original


@pytest.mark.long
def test_a_conversion_may_take_longer_than_collectives() -> None:
    assert run(2, convert_slowly, "run", "") == ["run/universal/update_0000001"] * 2
    assert run(2, convert_slowly, "run", "no space left") == ["no space left"] * 2


# DeepSpeed's own ways


def load_in_a_script_of_ones_own(folder: str, rank: int, frozen: dict[str, Any]) -> tuple[float, float]:
    """relora_ds.initialize and engine.load_checkpoint on a folder of ``relora-ds train``; the loss before and after loading."""
    model = common.tiny_llama(
        seed=5, vocab_size=300, hidden_size=32, intermediate_size=48, num_attention_heads=4, max_position_embeddings=64
    )
    relora = {"alpha": 8, "restart_every": 4, "restart_warmup": 2, "frozen": frozen}
    engine = common.build(model, {**relora, "rank": rank})
    losses = [common.fixed_loss(engine)]
    path, client_state = engine.load_checkpoint(folder)  # the tag in "latest"
    assert path is not None and client_state["progress"]["update"] == 18
    losses.append(common.fixed_loss(engine))
    assert engine.optimizer.restarts == 3
    common.end(engine)
    return losses[0], losses[1]


@pytest.mark.parametrize("frozen", [common.long({}), INT8 | {"master": "sharded"}])
def test_a_users_own_script_loads_the_folder(content: dict[str, Any], tmp_path: Path, frozen: dict[str, Any]) -> None:
    content["relora"]["frozen"] = frozen
    run(2, train_here, at(content, tmp_path / "run"))
    model = load_merged(tmp_path / "run")
    with torch.no_grad():
        expected = float(model(input_ids=common.batch(99), labels=common.batch(99)).loss)
    for before, after in run(2, load_in_a_script_of_ones_own, str(tmp_path / "run" / "checkpoints"), 4, frozen):
        assert after == pytest.approx(expected, rel=1e-5)
        assert abs(before - after) > 0.005
    shutil.rmtree(tmp_path / "run" / "base")
    with pytest.raises(AssertionError, match="it holds no frozen weights and has no manifest that says where they are"):
        run(2, load_in_a_script_of_ones_own, str(tmp_path / "run" / "checkpoints"), 4, frozen)


def test_zero_to_fp32_reads_a_self_contained_checkpoint(content: dict[str, Any], tmp_path: Path) -> None:
    content["checkpoint"] = {"self_contained": True}
    run(2, train_here, at(content, tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "zero_to_fp32.py").is_file()
    assert not folders(RunFolder(tmp_path / "run"))
    state = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    trained = checkpoints.read_model_state(folder / "update_0000018")
    assert set(trained) <= set(state)
    for name, value in trained.items():
        assert torch.equal(state[name].to(value.dtype), value), name


def test_export_from_any_checkpoint(content: dict[str, Any], tmp_path: Path) -> None:
    content["train"] |= {"eval_every": 3, "checkpoint_every": 3}
    content["relora"]["frozen"] = INT8 | {"master": "sharded"}
    run(2, train_here, at(content, tmp_path / "run"))
    evals = {r["update"]: r["eval_loss"] for r in read_log(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in r}
    from relora_ds.data.token_dataset import TokenDataset
    from relora_ds.training.evaluate import evaluate

    data = TokenDataset(Path(content["data"]["path"]), "validation", 16, shuffle=False)
    for update in (3, 6, 12, 18):
        model = load_merged(tmp_path / "run" / "checkpoints" / f"update_{update:07d}")
        assert evaluate(model, data, batch_size=4, device=CPU).loss == pytest.approx(evals[update], rel=1e-5)
    export_model(tmp_path / "run" / "checkpoints" / "update_0000009", tmp_path / "exported")
