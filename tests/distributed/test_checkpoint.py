"""Checkpoints over real processes: what they hold, on how many ranks they can be gone on with, and what is done about damage."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from relora_ds import base as bases
from relora_ds import checkpoint as checkpoints
from relora_ds import launch, lock, metrics, train
from relora_ds import manifest as manifests
from relora_ds.checks import check
from relora_ds.config import parse
from relora_ds.errors import EXIT_DONE, ConfigError
from relora_ds.export import export, load_merged
from relora_ds.lora import relora_layers
from relora_ds.run_folder import RunFolder
from relora_ds.saver import FencedError, Saver
from relora_ds.train import Trainer, TrainingError
from tests.distributed import common
from tests.distributed.pool import run
from tests.distributed.test_training import at, read_log, train_here

CPU = torch.device("cpu")
INT8 = {"dtype": "int8", "group_size": 16}


@pytest.fixture
def content(settings: dict[str, Any]) -> dict[str, Any]:
    """Warm start of 4 updates, restarts after 8, 12 and 16 of 18, no dropout: any number of ranks sees the same."""
    content = copy.deepcopy(settings)
    content["relora"] = {"rank": 4, "alpha": 8, "warm_start": 4, "restart_every": 4, "restart_warmup": 2}
    content["optimizer"] = {"lr": 2e-3, "lora_lr": 4e-3, "warmup": 2}
    content["train"] = {"updates": 18, "global_batch": 12, "micro_batch": 2, "eval_every": 9, "checkpoint_every": 3, "keep": 9}
    content["wandb"] = {"mode": "disabled"}
    return content


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


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
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
        (4, 2, 2, {}, False),
        (2, 3, 2, INT8 | {"master": "sharded"}, False),
        (2, 1, 1, INT8, False),
        (1, 2, 2, {"dtype": "bf16", "master": "sharded"}, True),
        (1, 4, 1, {"master": "sharded"}, False),
        (3, 4, 2, INT8 | {"master": "sharded", "init": "residual"}, True),
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
    content["relora"] |= {"init": frozen.pop("init", "kaiming"), "frozen": frozen}
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
    place = launch.discover()
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
    trainer.engine.destroy()
    return state


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
    original = train.say
    train.say = told.append
    try:
        state_after_loading(content)
    finally:
        train.say = original
    return "\n".join(told)


def test_a_conversion_is_made_once_and_reused(content: dict[str, Any], tmp_path: Path) -> None:
    settings = at(content, tmp_path / "run")
    run(2, train_here, settings, 7)
    folder = tmp_path / "run" / "universal" / "update_0000006"
    assert "once (DeepSpeed's ds_to_universal)" in run(3, loading_says, settings)[0]
    made = (folder / "zero" / "optimizer_state.pt").stat().st_mtime_ns
    assert "reusing the universal checkpoint" in run(1, loading_says, settings)[0]
    assert (folder / "zero" / "optimizer_state.pt").stat().st_mtime_ns == made


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


@pytest.mark.parametrize("frozen", [{}, INT8 | {"master": "sharded"}])
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
    from relora_ds.data import TokenDataset
    from relora_ds.evaluate import evaluate

    data = TokenDataset(Path(content["data"]["path"]), "validation", 16, shuffle=False)
    for update in (3, 6, 12, 18):
        model = load_merged(tmp_path / "run" / "checkpoints" / f"update_{update:07d}")
        assert evaluate(model, data, batch_size=4, device=CPU).loss == pytest.approx(evals[update], rel=1e-5)
    export(tmp_path / "run" / "checkpoints" / "update_0000009", tmp_path / "exported")


# Damage


@pytest.fixture
def finished(content: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], RunFolder]:
    """A run that was killed after update 16: checkpoints after 9, 12 and 15, the last on the base of restart 2."""
    settings = at(content, tmp_path / "run", keep=3)
    run(2, train_here, settings, 16)
    folder = RunFolder(tmp_path / "run")
    assert [path.name for path in checkpoints.find_all(folder)] == ["update_0000009", "update_0000012", "update_0000015"]
    assert folders(folder) == ["restart_0001", "restart_0002"]
    return settings, folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = {
    "a flipped bit in the model states": ("mp_rank_00_model_states.pt", flip, "holds other bytes than were written"),
    "a flipped bit in a rank's moments": ("zero_pp_rank_1_mp_rank_00_optim_states.pt", flip, "holds other bytes"),
    "a truncated file": ("zero_pp_rank_0_mp_rank_00_optim_states.pt", cut, "bytes"),
    "a missing file": ("mp_rank_00_model_states.pt", Path.unlink, "is missing"),
    "an empty manifest": ("manifest.json", empty, "is not whole"),
    "a flipped bit in the manifest": ("manifest.json", flip, "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    finished: tuple[dict[str, Any], RunFolder], damage: str, tmp_path: Path
) -> None:
    settings, folder = finished
    name, hurt, problem = DAMAGE[damage]
    whole = at(settings, tmp_path / "whole")
    run(2, train_here, whole)
    hurt(folder.checkpoints / "update_0000015" / name)
    told = run(2, resume, settings)[0]
    assert f"update_0000015/{name}" in told and problem in told and "trying the checkpoint before" in told
    assert "resuming from" in told and "update_0000012" in told
    for log in ("metrics.jsonl", "restarts.jsonl"):
        assert read_log(folder.path / log) == read_log(tmp_path / "whole" / log)


@pytest.mark.parametrize(
    ("name", "hurt"),
    [("rank_00001.safetensors", flip), ("rank_00000.safetensors", cut), ("manifest.json", flip), ("manifest.json", Path.unlink)],
)
def test_a_damaged_base_takes_its_checkpoints_along(finished: tuple[dict[str, Any], RunFolder], name: str, hurt: Any) -> None:
    """Those after 12 and 15 need the base of restart 2: the run goes on from update 9, and writes that base anew."""
    settings, folder = finished
    hurt(folder.base / "restart_0002" / name)
    told = run(2, resume, settings)[0]
    assert told.count("trying the checkpoint before") == 2 and f"restart_0002/{name}" in told
    assert "update_0000009" in told.partition("resuming from")[2]
    assert not [problem for path in checkpoints.find_all(folder) for problem in checkpoints.faults(path)]


def resume(content: dict[str, Any]) -> str:
    """Trains to the end; returns all that the user is told, with the error that ended it."""
    told: list[str] = []
    originals = train.say, metrics.say
    train.say = metrics.say = told.append
    try:
        train_here(content)
    except (ConfigError, TrainingError) as error:
        told.append(f"{type(error).__name__}: {error}")
    finally:
        train.say, metrics.say = originals
    return "\n".join(told)


def test_where_none_is_whole_the_run_stops_and_says_so(finished: tuple[dict[str, Any], RunFolder]) -> None:
    settings, folder = finished
    before = (folder.path / "metrics.jsonl").read_bytes()
    for path in checkpoints.find_all(folder):
        flip(path / checkpoints.MODEL_STATES)
    for message in run(2, resume, settings):
        assert "ConfigError: run.dir=" in message and "none of its 3 checkpoint(s) is whole" in message
    assert (folder.path / "metrics.jsonl").read_bytes() == before
    assert len(checkpoints.find_all(folder)) == 3, "nothing is removed: a file that is missing may come back"


def test_a_pickle_is_opened_only_with_the_checksum_that_the_manifest_gives(finished: tuple[dict[str, Any], RunFolder]) -> None:
    _, folder = finished
    checkpoint = folder.checkpoints / "update_0000015"
    flip(checkpoint / checkpoints.MODEL_STATES)
    with pytest.raises(ConfigError, match="holds other bytes than were written"):
        checkpoints.read_model_state(checkpoint)
    entries = json.loads((checkpoint / manifests.NAME).read_text())
    del entries["files"][checkpoints.MODEL_STATES]
    (checkpoint / manifests.NAME).write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="its manifest does not list mp_rank_00_model_states.pt"):
        checkpoints.read_model_state(checkpoint)


# Places that cannot be written to


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def fill(ballast: Path, leave: int) -> None:
    """Fills a file system up but for some bytes."""
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    os.truncate(ballast, ballast.stat().st_size - leave)


def checkpoint_complete(trainer: Trainer) -> None:
    """Waits for the checkpoint on its way, on this rank alone."""
    job = trainer.saver._job
    if job is not None and job.thread is not None:
        job.thread.join()


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


BREAK: dict[str, Callable[[str], None]] = {
    "full": lambda disk: fill(Path(disk) / "ballast", leave=40_000),
    "read-only": lambda disk: mount("-o", "remount,ro", disk),
    "vanished": lambda disk: subprocess.run(["umount", "-l", disk], check=True) and None,
}
MEND: dict[str, Callable[[str], None]] = {
    "full": lambda disk: (Path(disk) / "ballast").unlink(),
    "read-only": lambda disk: mount("-o", "remount,rw", disk),
}


def train_over_a_broken_disk(content: dict[str, Any], disk: str, how: str, *, mended: bool) -> str:
    """The disk fails before update 7, when the checkpoint after 6 is complete, and works again before update 14, or never."""
    original, place = Trainer.update, launch.discover()
    assert place is not None

    def update(self: Trainer, number: int, stop_requested: bool) -> bool:
        if place.is_main and number == 7:
            checkpoint_complete(self)
            BREAK[how](disk)
        if place.is_main and number == 11:
            checkpoint_complete(self)
        if place.is_main and number == 12:
            train.say(f"failures known before update 12: {self.failed_saves}")
        if place.is_main and number == 14 and mended:
            MEND[how](disk)
        return original(self, number, stop_requested)

    Trainer.update = update  # type: ignore[method-assign]
    try:
        return resume(content)
    finally:
        Trainer.update = original  # type: ignore[method-assign]


def train_over_a_mended_disk(content: dict[str, Any], disk: str, how: str) -> str:
    return train_over_a_broken_disk(content, disk, how, mended=True)


def train_over_a_disk_that_stays_broken(content: dict[str, Any], disk: str, how: str) -> str:
    return train_over_a_broken_disk(content, disk, how, mended=False)


@pytest.mark.parametrize(("how", "asynchronous"), [("full", True), ("full", False), ("read-only", True)])
def test_a_disk_that_fails_for_a_while_does_not_stop_the_run(
    content: dict[str, Any], small_disk: Path, tmp_path: Path, how: str, asynchronous: bool
) -> None:
    """Checkpoints after 9 and 12 cannot be written, that after 15 can: the run ends as if nothing had been."""
    content["checkpoint"] = {"async": asynchronous, "max_failures": 3}
    whole = at(content, tmp_path / "whole", keep=2)
    run(2, train_here, whole)
    settings = at(content, small_disk / "run", keep=2)
    told, _ = run(2, train_over_a_mended_disk, settings, str(small_disk), how)
    assert "TrainingError" not in told
    assert "failures known before update 12: 1" in told, "told at once, not at the next checkpoint"
    assert "a checkpoint could not be written (1 in a row)" in told and "(2 in a row)" in told and "(3 in a row)" not in told
    assert read_log(small_disk / "run" / "metrics.jsonl") == read_log(tmp_path / "whole" / "metrics.jsonl")
    folder = RunFolder(small_disk / "run")
    assert [path.name for path in checkpoints.find_all(folder)] == ["update_0000015", "update_0000018"]
    assert not [problem for path in checkpoints.find_all(folder) for problem in checkpoints.faults(path)]


@pytest.mark.parametrize("how", ["full", "vanished"])
def test_a_disk_that_stays_broken_stops_the_run_after_a_limit(content: dict[str, Any], small_disk: Path, how: str) -> None:
    content["checkpoint"] = {"max_failures": 2}
    settings = at(content, small_disk / "run")
    for told in run(2, train_over_a_disk_that_stays_broken, settings, str(small_disk), how):
        assert "TrainingError: 2 checkpoints in a row could not be written (checkpoint.max_failures=2)" in told
    if how == "full":
        newest = checkpoints.find_all(RunFolder(small_disk / "run"))[-1]
        assert newest.name == "update_0000006" and not list(checkpoints.faults(newest)), "the last good one is kept"
        assert sorted(path.name for path in (small_disk / "run" / "checkpoints").glob("update_*"))[-1] == newest.name, "no pieces"
    else:
        assert not list(small_disk.iterdir()), "nothing is written beside the mount"


def train_with_a_rotation_that_fails(content: dict[str, Any]) -> str:
    def rotate(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    original = checkpoints.rotate
    checkpoints.rotate = rotate
    try:
        return resume(content)
    finally:
        checkpoints.rotate = original


def test_a_rotation_that_fails_takes_no_checkpoint_along(content: dict[str, Any], tmp_path: Path) -> None:
    for told in run(2, train_with_a_rotation_that_fails, at(content, tmp_path / "run", keep=1)):
        assert "Error" not in told and "could not be written" not in told
    folder = RunFolder(tmp_path / "run")
    assert len(checkpoints.find_all(folder)) == 6
    assert not [problem for path in checkpoints.find_all(folder) for problem in checkpoints.faults(path)]


# Another job


def train_until_fenced(content: dict[str, Any]) -> str:
    """After update 7 another job takes the folder over, as one does that has heard nothing from this one for long."""
    original, beat, place = Trainer.update, lock.BEAT_S, launch.discover()
    assert place is not None
    lock.BEAT_S = 0.02

    def update(self: Trainer, number: int, stop_requested: bool) -> bool:
        if place.is_main and number == 8:
            path = self.lock.path
            path.write_text(json.dumps({**json.loads(path.read_text()), "token": "another"}))
            while not self.lock.is_lost:
                time.sleep(0.01)
        return original(self, number, stop_requested)

    Trainer.update = update  # type: ignore[method-assign]
    try:
        return resume(content)
    except FencedError as error:
        return f"FencedError: {error}"
    finally:
        Trainer.update, lock.BEAT_S = original, beat  # type: ignore[method-assign]


def test_a_job_whose_folder_was_taken_over_writes_no_more(content: dict[str, Any], tmp_path: Path) -> None:
    for told in run(2, train_until_fenced, at(content, tmp_path / "run", checkpoint_every=1)):
        assert told.startswith("FencedError: another job has taken over")
    assert max(losses(tmp_path / "run")) == 7
    assert checkpoints.find_all(RunFolder(tmp_path / "run"))[-1].name <= "update_0000007"
    assert json.loads((tmp_path / "run" / "lock.json").read_text())["token"] == "another", "its lock is left alone"


def save_after_a_take_over(content: dict[str, Any]) -> str:
    """Another job takes the folder over between two heartbeats, right before a checkpoint is complete."""
    original, place = Saver._complete, launch.discover()
    assert place is not None

    def complete(self: Saver, job: Any) -> None:
        if job.manifest.update == 6:
            path = self.run.path / "lock.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "token": "another"}))
        original(self, job)

    Saver._complete = complete  # type: ignore[method-assign]
    try:
        return resume(content)
    except FencedError as error:
        return f"FencedError: {error}"
    finally:
        Saver._complete = original  # type: ignore[method-assign]


def test_a_checkpoint_is_not_completed_in_a_folder_that_was_taken_over(content: dict[str, Any], tmp_path: Path) -> None:
    for told in run(2, save_after_a_take_over, at(content, tmp_path / "run")):
        assert told.startswith("FencedError: another job has taken over")
    assert [path.name for path in checkpoints.find_all(RunFolder(tmp_path / "run"))] == ["update_0000003"]
