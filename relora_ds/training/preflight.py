"""What a recipe needs of the model, the data, DeepSpeed and the number of ranks: judged before any process group starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PretrainedConfig

from relora_ds.checkpoint import reader as checkpoints
from relora_ds.config import Config, Switch
from relora_ds.data import tokenizer
from relora_ds.data.token_dataset import TRAIN, VALIDATION, TokenDataset, TokenIndex, read_index
from relora_ds.ds_config import fit as ds_config
from relora_ds.errors import ConfigError, nearest
from relora_ds.method import lora
from relora_ds.method.full_rank import full_rank_line
from relora_ds.method.targets import check_rank, find_targets, in_role
from relora_ds.models import adapters, compiling, generation, loss
from relora_ds.models import build as models
from relora_ds.run import unpickle
from relora_ds.run.changes import differences, is_under
from relora_ds.run.folder import RunFolder
from relora_ds.run.lock import WAY_OUT, RunLock
from relora_ds.run.manifest import Manifest


@dataclass(frozen=True)
class Checked:
    """A recipe that can run here.

    Attributes:
        config: the recipe.
        deepspeed: DeepSpeed's configuration, fitted to the recipe and the number of ranks.
        architecture: the Hugging Face configuration of the model.
        index: of the token folder.
        trust: whether the user trusts whoever wrote the checkpoints that it begins from, so that pickles are opened that could run
            something.
        remarks: lines that the user should hear before it starts, once.
    """

    config: Config
    deepspeed: dict[str, Any]
    architecture: PretrainedConfig
    index: TokenIndex
    trust: bool = False
    remarks: tuple[str, ...] = ()


def check(
    config: Config,
    recipe: Path,
    world_size: int,
    allow_changed: Sequence[str] = (),
    trust: bool = False,
    on_cuda: bool | None = None,
) -> Checked:
    """Raises ConfigError for the first thing that could not be trained, or not be trained right.

    Args:
        config: the recipe as it was read.
        recipe: its file; DeepSpeed's JSON is also looked for beside it and one folder up.
        world_size: ranks of the job.
        allow_changed: settings, or sections, in which a resumed run may differ from what it was, because the user insists.
        trust: as in :class:`Checked`.
        on_cuda: whether the ranks have GPUs; None: as this machine, which will run them.
    """
    _refuse_unknown(allow_changed)
    index = read_index(Path(config.data.path))
    resumed = _check_resume(config, index, allow_changed)
    if resumed is not None:  # whatever number of ranks wrote the newest checkpoint: it may be one that had to adapt as well
        config = ds_config.adapt(config, world_size)
    content = ds_config.of_recipe(config, recipe.resolve().parent, recipe.resolve().parent.parent)
    fitted = ds_config.fit(content, config, world_size)
    if on_cuda is None and not torch.cuda.is_available():  # asked of a GPU, it would start CUDA in the launching process
        ds_config.refuse_unrunnable(ds_config.precision(fitted))
    architecture = _architecture(config, index, resumed)
    evaluates = _check_data(config, index, architecture)
    if resumed is None:
        _check_tokenizer(config, index)
    generation.name_tokens(architecture, config.model, index.folder)
    here, uncompiled, device = torch.cuda.is_available(), None, None
    if on_cuda in (None, here):  # a login node cannot judge what runs on the GPUs of others
        dtype, device = ds_config.DTYPES[ds_config.precision(fitted)], torch.device("cuda" if here else "cpu")
        models.attention_implementation(config.model.attention, architecture, dtype=dtype, device=device)  # or raises
        uncompiled = _check_compile(config.model.compile, device)
    full_rank, model, layers = None, models.build_meta(architecture), {}
    models.refuse_encoder(model, "model.config" if config.model.path is None else "model.path")
    if config.method != "full":
        layers = find_targets(model, config.relora.targets)
        check_rank(layers, config.relora.rank)
        full_rank = full_rank_line(model) if config.has_lora_phase else None
        if config.method == "control":
            architecture = models.control_config(architecture, lora.num_trainable(model, layers, config.relora.rank))
    if config.model.loss == "liger":
        gets_factors = config.has_lora_phase and in_role(model, "output-head") in layers.values()
        _check_liger(ds_config.precision(fitted), device, gets_factors)
    if resumed is not None and resumed.precision != ds_config.precision(fitted):
        _refuse_changes([("deepspeed", resumed.precision, ds_config.precision(fitted))], config.run.dir, allow_changed)
    if resumed is None:
        _check_start(config, trust)
    slow = models.slow_widths(architecture) if on_cuda or (on_cuda is None and here) else None
    remarks = (
        evaluates,
        ds_config.idle(content),
        full_rank,
        config.never_restarts(),
        config.never_rewarms(),
        config.never_kept(),
        config.never_at_its_peak(),
        config.short_last_interval(),
        slow,
        uncompiled,
    )
    return Checked(config, fitted, architecture, index, trust, tuple(filter(None, remarks)))


def _check_compile(choice: Switch, device: torch.device) -> str | None:
    """One line where ``auto`` compiles nothing on a GPU. Raises ConfigError where it was asked for and cannot be."""
    problem = compiling.obstacle(device) if choice is True or (choice == "auto" and device.type == "cuda") else None
    if problem is not None and choice is True:
        raise ConfigError("model.compile", True, problem, "install it, or leave compile out")
    return None if problem is None else f"model.compile: auto compiles nothing, since {problem}; updates take longer"


def _check_liger(precision: str, device: torch.device | None, head_gets_factors: bool) -> None:
    """Raises ConfigError where Liger's kernel cannot run, or would lose gradients; ``device`` None: not to be judged here."""
    if device is not None and (found := loss.liger_obstacle(device)):
        raise ConfigError("model.loss", "liger", *found)
    if head_gets_factors:
        raise ConfigError("model.loss", "liger", "the output head gets factors (relora.targets)", "use chunked")
    if precision == "fp16":
        raise ConfigError("model.loss", "liger", "forms gradients before fp16's loss scale is known", "use chunked")


def _check_start(config: Config, trust: bool) -> None:
    """Raises ConfigError where the weights that a new run starts from are a checkpoint that could run something."""
    if config.model.weights is not None:
        adapters.check_deepspeed(Path(config.model.weights), trust=trust)
    start = checkpoints.newest(RunFolder(Path(config.model.path))) if config.model.path is not None else None
    if start is not None:
        unpickle.check([start / checkpoints.MODEL_STATES], trust=trust, key="model.path")


def _check_data(config: Config, index: TokenIndex, architecture: PretrainedConfig) -> str | None:
    """Raises ConfigError for data that the model or the recipe cannot take; one line where nothing is held out."""
    length = config.data.sequence_length
    for split in (TRAIN, VALIDATION) if index.holds_out else (TRAIN,):
        TokenDataset(index.folder, split, length)  # raises when a split is shorter than one sample
    for key in ("eval_every", "eval_tokens"):
        if not index.holds_out and getattr(config.train, key) is not None:
            problem = f"{config.data.path} holds out nothing (--holdout 0)"
            raise ConfigError(f"train.{key}", getattr(config.train, key), problem, "leave it out, or prepare with a holdout")
    positions = getattr(architecture, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError("data.sequence_length", length, f"longer than the model's {positions} positions")
    if index.encoder_size > architecture.vocab_size:
        raise ConfigError(
            "data.path",
            config.data.path,
            f"its tokenizer has {index.encoder_size} entries, the model's vocabulary {architecture.vocab_size}",
            "leave the model's vocab_size out, or prepare the data with the model's tokenizer",
        )
    return None if index.holds_out else f"no evaluation: {config.data.path} holds out nothing (--holdout 0)"


def _check_tokenizer(config: Config, index: TokenIndex) -> None:
    """The tokens of the data must mean to the model that a run starts from what they meant to it so far, as far as it says."""
    source = generation.origin(config.model)
    ours = tokenizer.find(str(index.folder)) if source is not None else None
    theirs = tokenizer.find(source) if source is not None else None
    problem = tokenizer.difference(ours, theirs) if ours is not None and theirs is not None else None
    if problem is not None:
        raise ConfigError(
            "data.path",
            config.data.path,
            f"its tokenizer is not that of model.path={config.model.path!r}: {problem}",
            f"prepare the data with --tokenizer {source}",
        )


def _architecture(config: Config, index: TokenIndex, resumed: Manifest | None) -> PretrainedConfig:
    """As the recipe says; of a run that goes on, what it noted of the place that the recipe names, which may be gone."""
    own = RunFolder(Path(config.run.dir)).model
    is_elsewhere = config.model.path is not None or isinstance(config.model.config, str)
    if resumed is not None and is_elsewhere and config.method != "control" and (own / "config.json").is_file():
        return models.read_hf_config(own, "run.dir")
    return models.hf_config(config.model, index.vocab_size)


def _check_resume(config: Config, index: TokenIndex, allow_changed: Sequence[str]) -> Manifest | None:
    """A run's folder that holds a checkpoint can only be gone on with by the same run; returns the manifest of the newest that has
    all its files, whose contents rank 0 will read."""
    folder = RunFolder(Path(config.run.dir))
    try:
        newest = checkpoints.choose(folder, lambda problem: None, deep=False)
    except OSError as error:
        raise ConfigError(
            "run.dir", config.run.dir, f"{error.filename}: {error.strerror}", "give yourself access to it"
        ) from None
    if newest is None:
        return None
    content = checkpoints.read_manifest(newest)
    changes = differences(folder.read_config(), config)
    if before := content.data.get("sha256"):  # the tokens count, and not where they lie
        changes = [change for change in changes if change[0] != "data.path"]
        changes += [("data.path", "other tokens", config.data.path)] if before != index.digests else []
    _refuse_changes(changes, config.run.dir, allow_changed)
    return content


def refuse_busy(config: Config, attempt: str = "") -> None:
    """Raises ConfigError when another job has the run's folder: asked before the ranks are started, of which rank 0 then takes it.

    Args:
        config: the recipe.
        attempt: this start of a SLURM job, which may take the folder from an earlier one; empty outside of one.
    """
    folder = Path(config.run.dir)
    try:
        other = RunLock(folder, attempt).holder() if folder.is_dir() else None
    except OSError as error:
        raise ConfigError("run.dir", config.run.dir, f"{error.filename}: {error.strerror}", "name another folder") from None
    if other is not None:
        raise ConfigError("run.dir", config.run.dir, f"in use by {other}", WAY_OUT)


def _refuse_unknown(allowed: Sequence[str]) -> None:
    """Raises ConfigError for a word of ``--allow-changed`` that no setting, and no section of them, has for its name."""
    known = list(_settings(Config))
    for key in allowed:
        if not any(is_under(name, [key]) for name in known):
            raise ConfigError("--allow-changed", key, "is no setting of a recipe", nearest(key, known))


def _settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{path}.")
        else:
            yield path


def _refuse_changes(changes: list[tuple[str, Any, Any]], run_dir: str, allowed: Sequence[str]) -> None:
    """Raises ConfigError with all the differences that the user does not insist on."""
    refused = [(key, before, now) for key, before, now in changes if not is_under(key, allowed)]
    if refused:
        (key, before, now), others = refused[0], refused[1:]
        more = "".join(f"; {key} was {before!r} and is {now!r}" for key, before, now in others)
        override = " ".join(f"--allow-changed {key}" for key, _, _ in refused)
        raise ConfigError(
            key, now, f"the run in {run_dir} has {before!r}{more}", f"name another run.dir, or override: {override}"
        )
