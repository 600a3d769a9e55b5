"""The run's configuration: strict models, a YAML file plus ``key.sub=value`` overrides, one error that names the key.

Only what can be judged from the text alone is judged here; what needs the model, the data or the number of ranks is judged in
:mod:`relora_ds.training.preflight`, still before any process group starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relora_ds.errors import ConfigError, nearest
from relora_ds.paths import LocalPath
from relora_ds.schedule import Interval, ScheduleName
from relora_ds.text.yaml_text import read_yaml, read_yaml_file

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Rate = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
USUAL_REWARMUP = 100


class Section(BaseModel):
    """Strict: no unknown keys, no type coercion (an int where a float is asked for is the one exception)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Run(Section):
    dir: LocalPath
    """Where everything of the run is written; holds a checkpoint: the run is resumed."""
    seed: Seed = 0
    """Of the weights, the data order, LoRA's initialisations, dropout and random pruning."""


LinearForm = Literal["auto", "split", "merged"]
Switch = bool | Literal["auto"]
Loss = Literal["auto", "torch", "chunked", "liger"]


class Model(Section):
    """Exactly one of ``preset``, ``path`` and ``config``."""

    preset: str | None = None
    """A row of the paper's table, e.g. ``llama_60m``; random weights."""
    path: LocalPath | None = None
    """A Hugging Face folder or hub name, a PEFT LoRA adapter's folder, or an earlier run's: its weights are the start."""
    config: dict[str, Any] | LocalPath | None = None
    """A Hugging Face configuration (with ``model_type``), or the path or hub name of one; random weights."""
    weights: LocalPath | None = None
    """A plain DeepSpeed checkpoint's folder, whose weights are the start instead of random ones."""
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """auto: flash-attention 2 on CUDA in bf16 where it is installed, else SDPA."""
    compile: Switch = "auto"
    """Each block by torch.compile; auto: on CUDA with Triton."""
    loss: Loss = "auto"
    """torch: over all logits at once. chunked, liger: never whole. auto: chunked where they are many and the model allows it."""
    multiple_of: Positive = 1
    """The MLP's width and the vocabulary's rows of a new model are rounded up to a multiple; 64 suits GPUs."""
    gradient_checkpointing: bool = False


class Data(Section):
    path: LocalPath
    """A token folder written by ``relora-ds prepare``."""
    sequence_length: Annotated[int, Field(ge=2)]
    """Tokens of one sample."""


class Reset(Section):
    """What becomes of the moments of A and B at a reset of the optimizer."""

    kind: Literal["magnitude", "random", "full", "none"] = "magnitude"
    ratio: Share = 0.99
    """Share of the entries that is zeroed, for magnitude and random: exactly floor(ratio·n) of n."""
    scope: Literal["tensor", "global"] = "tensor"
    """One threshold per tensor (the paper's), or one for all factors together."""
    mask: Literal["joint", "independent"] = "joint"
    """joint: the first moment's mask for both; independent: each moment by its own magnitudes (the paper's)."""
    every: Positive | None = None
    """Updates between resets, from the start of the LoRA phase; null: with every restart. The re-warmups follow the resets."""
    restart_bias_correction: bool = False
    """Whether Adam's step count of the factors goes back to 0 (the paper lets it run on, and so does the default)."""


class Frozen(Section):
    """How the frozen weights are kept."""

    dtype: Literal["auto", "fp32", "bf16", "int8", "none"] = "auto"
    """auto: the engine's dtype. int8: symmetric, by groups along the input dimension. none: no weight but B·A (``low_rank``)."""
    group_size: Annotated[int, Field(ge=8)] = 128
    """Of int8: inputs that share a scale."""
    master: Literal["none", "sharded"] = "none"
    """sharded: an fp32 master of the frozen weights, split by rows over the ranks, so that merges lose nothing."""
    master_device: Literal["host", "device"] = "host"
    """Where the sharded master lives."""
    verify_every: Positive | None = None
    """Updates between comparisons of all replicas' checksums, beside the one after every restart."""
    on_mismatch: Literal["stop", "repair"] = "stop"
    """repair: a replica that differs is set right from the master, or the majority of the ranks; without either the run stops."""


class ReLoRA(Section):
    rank: Positive = 128
    alpha: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 32.0
    """The low-rank product is scaled by alpha / rank."""
    trainable_scaling: bool = False
    """Scaled by the tanh of a trainable number per layer instead, which is 1 at the start and after every restart."""
    init: Literal["kaiming", "orthonormal", "residual"] = "kaiming"
    """Of A, with B = 0, at the start and at every restart; residual: B·A is what the store lost of the sharded master (an SVD)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """On the input of A, in linear layers; none in embeddings."""
    linear: LinearForm = "auto"
    """How linear layers multiply: ``split`` by W, A and B; ``merged`` by W + s·B·A, one product; auto: whichever loses nothing."""
    keep_merged: Switch = "auto"
    """Whether ``merged`` forms W + s·B·A once per update and keeps it beside W; auto: where an update has several micro batches."""
    targets: str | list[str] = "all-linear"
    """``all-linear`` (all but the head), ``output-head``, ``input-embedding``, or dotted parts of layer paths: ``[q_proj, mlp]``."""
    warm_start: Count = 0
    """Updates of full-rank training before the factors are added."""
    keep_moments: bool = False
    """Whether embeddings, norms and head keep Adam's moments over the change of phase (the paper starts them afresh)."""
    restart_every: Positive | None = None
    """Updates between restarts, counted from the start of the LoRA phase."""
    restart_growth: Annotated[float, Field(ge=1.0, le=100.0)] = 1.0
    """Each interval between restarts is so many times the one before."""
    restart_warmup: Count | None = None
    """Updates over which the learning rate climbs back from 0 after a reset, under ``schedule: jagged``; null: see ``rewarmup``."""
    rewarm: Literal["all", "factors"] = "all"
    """Whose learning rate climbs then: of all that is trained (the paper's), or of A and B alone."""
    reset: Reset = Reset()
    frozen: Frozen = Frozen()

    @property
    def restarts(self) -> Interval:
        """When A and B are merged and start afresh."""
        return Interval(self.restart_every or 0, self.restart_growth)

    def rank_after(self, restarts: int) -> int:
        """What rank the change of a layer can reach by so many restarts. Residual factors have a product from the start: theirs is
        of twice their rank."""
        return self.rank * (restarts + 1) * (2 if self.init == "residual" else 1)

    @property
    def resets(self) -> Interval:
        """When their moments are reset, and the learning rate re-warms."""
        return self.restarts if self.reset.every is None else Interval(self.reset.every)

    def kept_passes(self, accumulation: int) -> int:
        """Passes of an update of so many micro batches that share a W + s·B·A that is kept; 0 where none is."""
        keeps = accumulation > 1 if self.keep_merged == "auto" else self.keep_merged
        return accumulation if keeps else 0

    @property
    def rewarmup(self) -> int:
        """``restart_warmup``; where it is left out 100 updates, or a quarter of an interval that is not longer than these."""
        if self.restart_warmup is not None:
            return self.restart_warmup
        return self.resets.every // 4 if 0 < self.resets.every <= USUAL_REWARMUP else USUAL_REWARMUP


class Optimizer(Section):
    lr: Rate = 1e-3
    lora_lr: Rate | None = None
    """Of the factors; null: the same as ``lr``."""
    betas: Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1e-8
    weight_decay: Rate = 0.0
    """Not applied to norms and biases."""
    grad_clip: Rate = 1.0
    """Global gradient norm; 0 for no clipping."""
    warmup: Count = 0
    """Updates of the ramp at the start of each phase."""
    min_lr_ratio: Share = 0.1
    schedule: ScheduleName = "jagged"
    """jagged: one cosine over the whole run, re-warmed after every restart; the other three have no re-warmup."""

    def peak_lr(self, *, lora: bool) -> float:
        """The learning rate of the factors, or of everything else, before the schedule."""
        return self.lora_lr if lora and self.lora_lr is not None else self.lr


class Train(Section):
    """One of ``updates`` and ``tokens``."""

    updates: Positive | None = None
    tokens: Positive | None = None
    """Rounded up to whole updates."""
    global_batch: Positive
    """Sequences of one update, over all ranks and micro batches."""
    micro_batch: Positive
    """Sequences of one forward pass on one rank."""
    eval_every: Positive | None = None
    eval_tokens: Positive | None = None
    """Validation tokens of one evaluation; null: all of them."""
    checkpoint_every: Positive | None = None
    """A checkpoint is also written at the end and when a signal stops the run."""
    keep: Positive = 2
    """How many checkpoints stay on disk."""
    keep_every: Positive | None = None
    """Checkpoints after multiples of so many updates stay beside them."""
    keep_first_base: bool = False
    """The frozen weights as the LoRA phase began stay in base/, for ``relora-ds spectrum``."""
    max_skipped: Positive = 100
    """So many non-finite updates in a row stop the run."""
    stop_signal: Literal["USR1", "USR2", "HUP"] = "USR2"
    """Stops the run after its update, with a checkpoint, as TERM and INT do: what SLURM sends before a time limit."""
    hang_timeout: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = 1800.0
    """So many seconds without progress: every rank's stacks are written and the job is ended."""


class Checkpoint(Section):
    """How checkpoints are written."""

    asynchronous: Annotated[bool, Field(alias="async")] = True
    """Training goes on as soon as the state is copied to host memory; else it waits until the files are written."""
    self_contained: bool = False
    """Frozen weights in every checkpoint, instead of once per restart in base/."""
    max_failures: Positive = 3
    """So many checkpoints in a row that could not be written stop the run."""


class Wandb(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when an API key is there, else offline."""
    project: str = "relora_ds"
    name: str | None = None


class Config(Section):
    run: Run
    method: Literal["full", "control", "lora", "low_rank", "relora"] = "relora"
    """control: full-rank, as many parameters as the others train. low_rank: B·A alone, without frozen weights."""
    model: Model
    data: Data
    relora: ReLoRA = ReLoRA()
    optimizer: Optimizer = Optimizer()
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    wandb: Wandb = Wandb()
    deepspeed: LocalPath | dict[str, Any]
    """DeepSpeed's own JSON file (or its content): precision, ZeRO stage, buckets."""

    @property
    def total_updates(self) -> int:
        if self.train.updates is not None:
            return self.train.updates
        assert self.train.tokens is not None, "validated"
        return math.ceil(self.train.tokens / (self.train.global_batch * self.data.sequence_length))

    @property
    def first_base_update(self) -> int | None:
        """The update whose checkpoint brings the first base, where that is to be kept: the first of the LoRA phase."""
        return self.full_updates + 1 if self.train.keep_first_base and self.has_lora_phase else None

    @property
    def has_lora_phase(self) -> bool:
        return self.method not in ("full", "control")

    @property
    def full_updates(self) -> int:
        """Updates of the full-rank phase: all of them for ``full`` and ``control``."""
        return self.lora_settings.warm_start if self.has_lora_phase else self.total_updates

    @property
    def lora_settings(self) -> ReLoRA:
        """The ``relora`` section as the method uses it: ``lora`` never restarts, ``low_rank`` has nothing to restart from."""
        if self.method not in ("lora", "low_rank"):
            return self.relora
        never: dict[str, Any] = {"restart_every": None, "reset": Reset()}
        if self.method == "low_rank":
            never |= {"warm_start": 0, "init": "kaiming", "frozen": Frozen(dtype="none")}
        return self.relora.model_copy(update=never)

    def phase_of(self, update: int) -> Literal["full", "lora"]:
        """The phase that ``update`` (1-based) belongs to."""
        return "full" if update <= self.full_updates else "lora"

    def short_last_interval(self) -> str | None:
        """A line on a last restart that comes so late that it costs more than its factors can learn; None where none does."""
        restarts, updates = self.lora_settings.restarts, self.total_updates - self.full_updates
        last = restarts.newest(updates - 1) if self.has_lora_phase else 0  # one after the last update costs nothing
        if updates - last >= (last - restarts.newest(last - 1)) / 2 or not last:
            return None
        return (
            f"the last restart, after update {self.full_updates + last:,} of {self.total_updates:,}, is followed by "
            f"{updates - last:,} updates: a longer relora.restart_every does without it, a shorter one gives it more"
        )

    def never_restarts(self) -> str | None:
        """A line on restarts, or resets, that were asked for and come too late for any update to follow; None where all come."""
        relora, updates = self.lora_settings, self.total_updates - self.full_updates
        for key, every in (("relora.restart_every", relora.restart_every), ("relora.reset.every", relora.reset.every)):
            if self.has_lora_phase and every is not None and every >= updates:
                return f"{key}={every} does nothing: it is not shorter than the LoRA phase, which has {updates:,} updates"
        return None

    def never_rewarms(self) -> str | None:
        """A line on a re-warmup that was asked for and that the schedule does not have; None where there is none, or it has."""
        given, usual = self.relora.rewarmup, self.relora.model_copy(update={"restart_warmup": None}).rewarmup
        if (
            self.optimizer.schedule == "jagged"
            or given in (0, usual)
            or not self.has_lora_phase
            or not self.lora_settings.resets.every
        ):
            return None
        return (
            f"relora.restart_warmup={given} does nothing: optimizer.schedule={self.optimizer.schedule} has no re-warmup; "
            "jagged is a cosine that has"
        )

    def never_kept(self) -> str | None:
        """A line on checkpoints that are to stay and that nothing writes; None where what is written meets what is to stay."""
        kept, every = self.train.keep_every, self.train.checkpoint_every
        if kept is None or (every is not None and (kept % every == 0 or every % kept == 0)):
            return None
        written = "no checkpoint is written on the way without train.checkpoint_every"
        if every is not None:
            written = f"with train.checkpoint_every={every} only multiples of {math.lcm(kept, every):,} have a checkpoint to keep"
        return f"train.keep_every={kept} does not keep what it says: {written}"

    def never_at_its_peak(self) -> str | None:
        """A line on phases that are over before their learning rate has climbed; None where it reaches its peak in all."""
        warmup, total = self.optimizer.warmup, self.total_updates
        phases = {"full-rank": self.full_updates, "LoRA": total - self.full_updates} if self.has_lora_phase else {}
        short = [f"the {name} phase, which has {updates:,} updates" for name, updates in phases.items() if 0 < updates <= warmup]
        if not short:
            return None
        return f"the learning rate does not reach its peak: optimizer.warmup={warmup} is not shorter than {', and '.join(short)}"


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe and applies ``key.sub=value`` overrides, whose values are YAML.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value has the wrong type or range, or two values contradict.
    """
    content = read_yaml_file(Path(recipe), "RECIPE")
    if not isinstance(content, dict):
        raise ConfigError("RECIPE", str(recipe), "holds no settings", "write sections such as 'run:' and 'model:'")
    for override in overrides:
        _apply(content, override)
    return parse(content)


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError("override", override, "is not of the form key.sub=value")
    *sections, last = key.strip().split(".")
    place = content
    for depth, name in enumerate(sections):
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            is_file = sections[: depth + 1] == ["deepspeed"]
            way_out = "change a copy of that file, or write its content into the recipe" if is_file else ""
            raise ConfigError(key, text, f"{'.'.join(sections[: depth + 1])} is a value, not a section", way_out)
    place[last] = read_yaml(text, key)


def parse(content: dict[str, Any]) -> Config:
    """Validates settings given as nested dictionaries; raises ConfigError for the first fault."""
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise explain(error, Config, content) from None
    _check_contradictions(config)
    rewarmup = {"restart_warmup": config.lora_settings.rewarmup}  # as a number, so that a run's config.yaml says what it was
    return config.model_copy(update={"relora": config.relora.model_copy(update=rewarmup)})


def parse_relora(settings: dict[str, Any] | ReLoRA) -> ReLoRA:
    """The ``relora`` section alone, for users of :func:`relora_ds.initialize`."""
    try:
        relora = settings if isinstance(settings, ReLoRA) else ReLoRA.model_validate(settings)
    except ValidationError as error:
        raise explain(error, ReLoRA, settings, prefix=("relora",)) from None
    check_relora(relora)
    return relora


def explain(error: ValidationError, model: type[BaseModel], content: Any, prefix: tuple[str, ...] = ()) -> ConfigError:
    """pydantic's first complaint as one line: the key, the value, what is wrong, the nearest valid name."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    names = [str(part) for part in first["loc"]]
    section, depth = model, 0
    while depth < len(names) - 1 and names[depth] in section.model_fields:
        annotation = section.model_fields[names[depth]].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        section, depth = annotation, depth + 1
    named = names[: depth + 1]  # what follows in loc are union branches and list positions
    key = ".".join((*prefix, *named))
    if first["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in section.model_fields.items()]
        return ConfigError(key, first["input"], "unknown key", nearest(named[-1], known))
    if first["type"] == "missing":
        return ConfigError(key, None, "is required")
    if first["type"] == "literal_error":
        valid = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return ConfigError(key, first["input"], "not one of the valid names", nearest(str(first["input"]), valid))
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return ConfigError(key, first["input"], "must be a section with keys of its own")
    if first["type"] == "string_pattern_mismatch" and (examples := section.model_fields[named[-1]].examples):
        return ConfigError(key, first["input"], f"is not of the form {' or '.join(map(str, examples))}")
    if first["type"] == "string_type" and first["input"] is not None and not isinstance(first["input"], (dict, list)):
        return ConfigError(
            key, first["input"], "input should be a valid string", f'write {named[-1]}: "…", or {key}=\'"…"\' in a shell'
        )
    said = str(first.get("ctx", {}).get("error") or first["msg"])  # a check of our own, or pydantic's
    return ConfigError(key, first["input"], said[0].lower() + said[1:])


def _check_contradictions(config: Config) -> None:
    """What two settings say together and cannot both hold."""
    train, relora, total = config.train, config.relora, 0
    if (train.updates is None) == (train.tokens is None):
        way_out = "" if train.updates is None else "leave one out: train.updates=null or train.tokens=null"
        raise ConfigError("train.updates", train.updates, f"give either this or train.tokens (now {train.tokens!r})", way_out)
    total = config.total_updates
    sources = {key: getattr(config.model, key) for key in ("preset", "path", "config")}
    given = [key for key, source in sources.items() if source is not None]
    if len(given) != 1:
        way_out = f"leave one out: {' or '.join(f'model.{key}=null' for key in given)}" if given else ""
        raise ConfigError("model", sources, "give exactly one of the three", way_out)
    if config.model.weights is not None and (config.model.path is not None or config.method == "control"):
        problem = "are the start for preset or config, of a model of their size"
        raise ConfigError("model.weights", config.model.weights, problem, "leave out this or model.path, or take another method")
    if train.global_batch % train.micro_batch:
        raise ConfigError("train.global_batch", train.global_batch, f"is not a multiple of train.micro_batch={train.micro_batch}")
    if config.optimizer.warmup >= total:
        raise ConfigError("optimizer.warmup", config.optimizer.warmup, f"not shorter than the run of {total} updates")
    if config.method == "control" and config.model.path is not None:
        raise ConfigError("model.path", config.model.path, "the control is a smaller model", "name it as model.config")
    if not config.has_lora_phase:
        return
    if config.full_updates >= total:
        raise ConfigError("relora.warm_start", relora.warm_start, f"not shorter than the run of {total} updates")
    if config.method == "relora" and relora.restart_every is None and relora.reset.every is None:
        raise ConfigError("relora.restart_every", None, "ReLoRA needs restarts", "give a number of updates, or method: lora")
    if config.method == "relora" and relora.rewarm != "all" and config.optimizer.schedule != "jagged":
        problem = f"nothing re-warms with optimizer.schedule={config.optimizer.schedule}"
        raise ConfigError("relora.rewarm", relora.rewarm, problem, "take jagged, or leave this out")
    check_relora(config.lora_settings)
    if train.keep_first_base and config.checkpoint.self_contained:
        problem = "there is no base where frozen weights are in every checkpoint"
        raise ConfigError("train.keep_first_base", True, problem, "set train.keep_every or checkpoint.self_contained=false")
    if train.keep_first_base and config.lora_settings.restart_every == 1:
        problem = "the first update's restart changes the weights before a checkpoint can hold them"
        raise ConfigError("train.keep_first_base", True, problem, "set relora.restart_every to 2 or more")


def check_relora(relora: ReLoRA) -> None:
    """Raises ConfigError for settings of the ``relora`` section that contradict each other."""
    key = "relora.restart_every" if relora.reset.every is None else "relora.reset.every"
    if relora.resets.every and relora.rewarmup >= relora.resets.every:
        raise ConfigError("relora.restart_warmup", relora.rewarmup, f"not shorter than {key}={relora.resets.every}")
    if relora.frozen.dtype == "none" and relora.restart_every is not None:
        problem = "there is no frozen weight to merge into"
        raise ConfigError("relora.frozen.dtype", "none", problem, "leave relora.restart_every out")
    if relora.frozen.dtype == "none" and relora.frozen.master != "none":
        problem = "there is no frozen weight to keep exactly"
        raise ConfigError("relora.frozen.master", relora.frozen.master, problem, "set it to none")
    if relora.init == "residual" and relora.frozen.master != "sharded":
        problem = "needs the exact weights beside the stored ones"
        raise ConfigError("relora.init", "residual", problem, "set relora.frozen.master=sharded")
    if relora.linear == "merged" and (relora.dropout or relora.trainable_scaling):
        problem = "one product has neither A's own input, which dropout makes, nor a gradient of a trainable scaling"
        raise ConfigError("relora.linear", "merged", problem, "use auto, or leave those out")
    never = relora.linear == "split" or relora.dropout or relora.trainable_scaling or relora.frozen.dtype == "none"
    if relora.keep_merged is True and never:
        problem = "no layer multiplies merged with relora.linear=split, dropout, a trainable scaling, or without frozen weights"
        raise ConfigError("relora.keep_merged", True, problem, "use auto")


def dump(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
