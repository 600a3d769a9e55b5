"""Checkpoints that would run a command when they are opened are refused by name on every way in, and nothing is run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import relora_ds
from relora_ds.checkpoint import reader as checkpoints
from relora_ds.checkpoint import universal as elastic
from relora_ds.checkpoint.listing import listing
from relora_ds.cli.main import main
from relora_ds.config import parse
from relora_ds.errors import EXIT_BAD_CONFIG, EXIT_DONE, ConfigError
from relora_ds.launch import places
from relora_ds.run import manifest as manifests
from relora_ds.run import unpickle
from relora_ds.run.folder import RunFolder
from relora_ds.training.loop import train
from relora_ds.training.preflight import check
from tests.conftest import TINY_LLAMA, tiny_settings
from tests.distributed import common
from tests.distributed.pool import run
from tests.distributed.test_training import train_here
from tests.fp16 import overruled

UPDATE = "update_0000003"
OPTIMIZER_STATES = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
WANTS = r"is a pickle that wants (posix|nt)\.system, which could run anything"


class Planted:
    """Its unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def plant(path: Path, marker: Path, where: str = "planted") -> None:
    """Puts the object into a checkpoint's file, and what the manifest beside it says of the file in order."""
    content = torch.load(path, weights_only=False)
    content = content if isinstance(content, dict) else {"param": content}
    torch.save({**content, where: Planted(marker)}, path)
    listed = path.parent / manifests.NAME
    if listed.is_file():
        entries = json.loads(listed.read_text())
        entries["files"][path.name] = {"bytes": path.stat().st_size, "sha256": manifests.digest(path)}
        listed.write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def made(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run of two ranks, three updates and a restart, which has its universal form beside it."""
    settings = tiny_settings(tmp_path_factory.mktemp("made") / "run", token_folder)
    settings["relora"] = {"rank": 4, "restart_every": 2, "restart_warmup": 1}
    settings["optimizer"] = {"lr": 0.002, "warmup": 1}
    settings["train"] = {"updates": 3, "global_batch": 8, "micro_batch": 4}
    settings["wandb"] = {"mode": "disabled"}
    assert run(2, train_here, settings) == [EXIT_DONE] * 2
    folder = RunFolder(Path(settings["run"]["dir"]))
    elastic.convert(folder.checkpoints / UPDATE, folder.universal / UPDATE, lambda _: None)
    return settings


class Case:
    """A copy of the run, for one test to plant in."""

    def __init__(self, made: dict[str, Any], folder: Path) -> None:
        shutil.copytree(made["run"]["dir"], folder / "run")
        self.settings = {**made, "run": {**made["run"], "dir": str(folder / "run")}}
        self.settings["train"] = {**made["train"], "updates": 4}
        self.run, self.marker = RunFolder(folder / "run"), folder / "marker"
        self.checkpoint = self.run.checkpoints / UPDATE
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(self.settings))

    def plant(self, name: str, where: str = "planted") -> Path:
        plant(self.checkpoint / name, self.marker, where)
        assert not list(checkpoints.faults(self.checkpoint)), "the manifest must not be what finds it"
        if name == checkpoints.MODEL_STATES:
            shutil.copy(self.checkpoint / name, self.run.universal / UPDATE)
        else:
            self.list_universal()
        return self.checkpoint / name

    def plant_universal(self, name: str) -> Path:
        path = next((self.run.universal / UPDATE / "zero").glob(f"**/{name}"))
        plant(path, self.marker)
        self.list_universal()
        return path

    def list_universal(self) -> None:
        """Writes the manifest that has what is there be reused."""
        folder = self.run.universal / UPDATE
        (folder / manifests.NAME).unlink()
        files = {
            str(path.relative_to(folder)): manifests.flush_and_describe(path) for path in folder.rglob("*") if path.is_file()
        }
        manifests.write(folder, {"source": manifests.digest(self.checkpoint / manifests.NAME), "files": files})


@pytest.fixture
def case(made: dict[str, Any], tmp_path: Path) -> Case:
    return Case(made, tmp_path)


COMMANDS = {
    "export": ["export", "RUN", "OUT"],
    "export of a checkpoint": ["export", "CHECKPOINT", "OUT"],
    "export --adapter": ["export", "RUN", "OUT", "--adapter"],
    "eval": ["eval", "RUN"],
    "a start by model.path": ["train", "RECIPE", "run.dir=OUT", "model={path: RUN}"],
    "a start by model.weights": ["train", "RECIPE", "run.dir=OUT", "model.weights=PLAIN"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_it_by_name(case: Case, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted = case.plant(checkpoints.MODEL_STATES)
    meanings = {"RUN": case.run.path, "CHECKPOINT": case.checkpoint, "OUT": tmp_path / "out", "RECIPE": case.recipe}
    words = COMMANDS[command]
    for name, meaning in {**meanings, "PLAIN": case.checkpoint}.items():
        words = [word.replace(name, str(meaning)) for word in words]
    assert main(words) == EXIT_BAD_CONFIG
    told = capsys.readouterr().err.strip().splitlines()[-1]
    key = next((word for word in ("model.path", "model.weights") if word in command), "CHECKPOINT")
    assert told.startswith(f"relora-ds: error: {key}={str(planted)!r}: is a pickle that wants ")
    assert told.endswith(".system, which could run anything; pass --trust if you trust whoever wrote it")
    assert not case.marker.exists() and not (tmp_path / "out").exists()


def test_the_optimizer_states_of_a_plain_checkpoint(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    planted = case.plant(OPTIMIZER_STATES)
    words = ["train", str(case.recipe), f"run.dir={case.run.path}2", f"model.weights={case.checkpoint}"]
    assert main(words) == EXIT_BAD_CONFIG
    assert str(planted) in capsys.readouterr().err
    with pytest.raises(ConfigError, match=WANTS):  # also where nobody has looked before
        relora_ds.models.adapters._masters(case.checkpoint, trust=False)
    assert not case.marker.exists()


def test_trust_opens_it(case: Case, tmp_path: Path) -> None:
    case.plant(checkpoints.MODEL_STATES)
    assert main(["export", str(case.run.path), str(tmp_path / "out"), "--trust"]) == EXIT_DONE
    assert case.marker.exists() and (tmp_path / "out" / "model.safetensors").is_file()


def test_verifying_reads_bytes_alone(case: Case) -> None:
    case.plant(checkpoints.MODEL_STATES)
    assert listing(case.run, deep=True)[1]
    assert not case.marker.exists()


def refused(settings: dict[str, Any]) -> str:
    """The error that ends training."""
    try:
        train_here(settings)
    except ConfigError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("ranks", [2, 1])
@pytest.mark.parametrize("name", [checkpoints.MODEL_STATES, OPTIMIZER_STATES])
def test_a_resume_refuses_it_on_all_ranks(case: Case, name: str, ranks: int) -> None:
    planted = case.plant(name)
    before = sorted(case.run.path.rglob("*"))
    for told in run(ranks, refused, case.settings):
        assert told.startswith(f"CHECKPOINT={str(planted)!r}: is a pickle that wants ") and told.endswith("whoever wrote it")
    assert sorted(case.run.path.rglob("*")) == before, "nothing is set aside, and the lock is free again"
    assert not case.marker.exists()


def trusting(settings: dict[str, Any]) -> int:
    """Trains as with ``--trust``."""
    place = places.discover()
    assert place is not None
    return train(check(parse(settings), Path("recipe.yaml"), place.world_size, trust=True), place, torch.device("cpu"))


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_resume_with_trust_opens_it(case: Case, ranks: int) -> None:
    for name in (checkpoints.MODEL_STATES, OPTIMIZER_STATES):
        case.plant(name)
    shutil.rmtree(case.run.universal)
    assert run(ranks, trusting, case.settings) == [EXIT_DONE] * ranks
    assert case.marker.exists()


@pytest.mark.parametrize("name", ["fp32.pt", "exp_avg.pt", "step.pt", "optimizer_state.pt"])
def test_the_universal_form_is_read_no_less_carefully(case: Case, name: str) -> None:
    planted = case.plant_universal(name)
    (told,) = run(1, refused, case.settings)
    assert told.startswith(f"CHECKPOINT={str(planted)!r}: is a pickle that wants ")
    assert not case.marker.exists()


def test_a_resume_on_another_number_of_ranks_needs_no_trust(case: Case) -> None:
    assert run(1, refused, case.settings) == ["trained"]


@pytest.mark.parametrize("name", [checkpoints.MODEL_STATES, OPTIMIZER_STATES])
def test_the_converter_opens_nothing_of_itself(case: Case, name: str) -> None:
    planted = case.plant(name)
    with pytest.raises(elastic.ConversionError, match=WANTS) as raised:
        elastic.convert(case.checkpoint, case.run.universal / "new", lambda _: None)
    assert str(planted) in str(raised.value) and not case.marker.exists()


def load_in_a_script(checkpoint: Path, trust: bool) -> str:
    """What ``engine.load_checkpoint`` says in a script of the user's own."""
    sizes = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
    engine, *_ = relora_ds.initialize(
        model=common.tiny_llama(vocab_size=300, **sizes), config=common.deepspeed_config(), relora={"rank": 4}, trust=trust
    )
    try:
        engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    except ConfigError as error:
        return str(error)
    finally:
        common.end(engine)
    return "loaded"


@pytest.mark.parametrize(
    ("name", "where"),
    [(checkpoints.MODEL_STATES, "planted"), (checkpoints.MODEL_STATES, "module"), (OPTIMIZER_STATES, "optimizer_state_dict")],
)
def test_a_script_of_ones_own_refuses_it(case: Case, name: str, where: str) -> None:
    """On the rank that opens the file; client_state lies beside the model's states."""
    planted = case.plant(name, where)
    if name == OPTIMIZER_STATES:
        shutil.copy(planted, planted.with_name(name.replace("rank_1", "rank_0")))  # so that no rank waits for the other
    for told in run(2, load_in_a_script, case.checkpoint, False):
        assert "which could run anything; pass trust=True to relora_ds.initialize" in told and "add_safe_globals" in told
    assert not case.marker.exists()
    if where == "planted":
        assert run(2, load_in_a_script, case.checkpoint, True) == ["loaded"] * 2
        assert case.marker.exists()


# What is written loads without trust

CLIENT_STATE = {
    "epoch": 3, "best": 0.5, "name": "run", "seen": {1, 2}, "nothing": None, "is_on": True, "sizes": (1, torch.Size([2])),
    "rng": torch.arange(9, dtype=torch.uint8), "nested": {"list": [1, {"dtype": torch.bfloat16}]}, "bytes": b"ab",
}  # fmt: skip
RELORA = {"rank": 3, "restart_every": 2, "restart_warmup": 1}
SHARDED = {**RELORA, "frozen": {"dtype": "int8", "group_size": 8, "master": "sharded"}, "trainable_scaling": True}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32, full rank, stage 1": ({"stage": 1}, {}),
    "fp32, stage 2": ({}, {"relora": RELORA}),
    "bf16, stage 1, sharded master": ({"stage": 1, "dtype": "bf16"}, {"relora": SHARDED}),
    "fp16, stage 2": ({"dtype": "fp16"}, {"relora": RELORA}),
    "offload": ({"offload_optimizer": {"device": "cpu", "pin_memory": False}}, {"relora": RELORA}),
    "a scheduler": ({}, {"relora": RELORA, "lr_scheduler": "ours"}),
}


def save_and_load(folder: str, config: dict[str, Any], how: dict[str, Any]) -> None:
    """Three updates, a checkpoint with a client_state, and a fresh engine that loads it."""
    with overruled():  # where the CPU has no fp16 instructions, DeepSpeed would refuse fp16
        _save_and_load(folder, config, how)


def _save_and_load(folder: str, config: dict[str, Any], how: dict[str, Any]) -> None:
    if "lr_scheduler" in how:
        how = {
            **how,
            "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=9),
        }
    losses = []
    for is_first in (True, False):
        engine, *_ = relora_ds.initialize(model=common.tiny_llama(), config=common.deepspeed_config(**config), **how)
        if is_first:
            for index in range(3):
                common.train_update(engine, index)
            engine.save_checkpoint(folder, client_state=CLIENT_STATE)
        else:
            path, state = engine.load_checkpoint(folder)
            assert path is not None
            assert repr([state[key] for key in CLIENT_STATE]) == repr(list(CLIENT_STATE.values()))
        losses.append(common.fixed_loss(engine))
        common.end(engine)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_loads_without_trust(kind: str, tmp_path: Path) -> None:
    run(2, save_and_load, str(tmp_path), *KINDS[kind])
    files = sorted(tmp_path.rglob("*.pt"))
    assert len(files) == 3
    unpickle.check(files)


# The reader itself


def test_what_is_known_is_forgotten_again(tmp_path: Path) -> None:
    """The list of the process stays the user's; what he named himself is read, too."""
    torch.save({"case": Case.__new__(Case)}, tmp_path / "own.pt")
    with pytest.raises(ConfigError, match=r"wants tests\.distributed\.test_unpickle\.Case, which could run anything"):
        unpickle.read(tmp_path / "own.pt")
    named = [Case, unpickle.known()[0]]
    with torch.serialization.safe_globals(named):
        assert type(unpickle.read(tmp_path / "own.pt")["case"]) is Case
        assert set(torch.serialization.get_safe_globals()) >= set(named)
    assert not set(torch.serialization.get_safe_globals()) & set(unpickle.known())


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("is_zip", [True, False])
def test_no_form_of_pickle_gets_through(tmp_path: Path, protocol: int, is_zip: bool) -> None:
    torch.save(Planted(tmp_path / "marker"), tmp_path / "f.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    for load in (unpickle.read, lambda path: torch.load(path, weights_only=False)):
        with unpickle.guarded(), pytest.raises(ConfigError, match=r"f\.pt': is a pickle that .*could run anything.*pass --trust"):
            load(tmp_path / "f.pt")
    assert not (tmp_path / "marker").exists()


def test_archives_of_code_and_of_old_are_not_opened(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "f.pt"))
    with pytest.raises(ConfigError, match="TorchScript"):
        unpickle.read(tmp_path / "f.pt")
    (tmp_path / "storages").write_bytes(b"")
    subprocess.run(["tar", "--format=pax", "-cf", "g.pt", "storages"], cwd=tmp_path, check=True)
    with pytest.raises(ConfigError, match=r"legacy \.tar format"):
        unpickle.read(tmp_path / "g.pt")


def test_a_torn_file_is_no_suspect(tmp_path: Path) -> None:
    torch.save({"tensor": torch.ones(1000)}, tmp_path / "f.pt")
    (tmp_path / "f.pt").write_bytes((tmp_path / "f.pt").read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"f\.pt': cannot be read"):
        unpickle.read(tmp_path / "f.pt")
    with pytest.raises(FileNotFoundError):
        unpickle.read(tmp_path / "missing.pt")
    unpickle.check([tmp_path / "missing.pt"])
