"""DeepSpeed's JSON in the names and values that DeepSpeed reads in it: its spellings, the word "auto", and what it refuses itself."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, get_args

from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum, get_zero_config
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import BaseModel, TypeAdapter, ValidationError

from relora_ds.errors import ConfigError, nearest
from relora_ds.zero.versions import section_readers

AUTO = "auto"
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
DEFAULTS = re.compile(
    r"zero_optimization\.(reduce_bucket_size|stage3_\w+|zenflow\.\w+)|data_types\.keep_in_fp32_modules|pipeline\.stages"
)
"""Where "auto" is DeepSpeed's default: it has the word itself, or the Hugging Face Trainer sizes a buffer with it."""
STAGE_3 = (
    *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "zero_hpz_partition_size"),
    *("sub_group_size", "memory_efficient_linear", "override_module_apply", "pipeline_loading_checkpoint", "leaf_module"),
    *("log_trace_cache_warnings", "save_muon_momentum_buffer_in_memory", "allgather_partitions"),
)
"""Keys of ``zero_optimization`` that stages 1 and 2 do not look at, beside those that begin with stage3_."""
DECIDING = ("bf16", "bfloat16", "fp16", "zero_optimization", "data_types", "gradient_clipping", "communication_data_type")
OTHERS = """
    managed_gradient_accumulation gradient_allreduce_op prescale_gradients gradient_predivide_factor optimizer scheduler
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer torch_autocast amp disable_allgather sequence_parallel_size
    seq_parallel_communication_data_type data_parallel_size tensor_parallel pipeline expert_parallel hybrid_engine
    use_data_before_expert_parallelism weight_quantization activation_checkpointing compile checkpoint datastates_ckpt aio
    data_efficiency dataloader_drop_last autotuning timers flops_profiler comms_logger wall_clock_breakdown memory_breakdown
    dump_state steps_per_print log_level disable_python_gc vocabulary_size tensorboard wandb csv_monitor comet
"""
KEYS = frozenset((*DECIDING, *BATCH, *OTHERS.split()))
"""The settings and sections that DeepSpeed looks up; it passes over any other."""
LIKENESS = 0.85
"""From here on two names, as :mod:`difflib` compares them, are one and its misspelling; ``comment`` and ``comet`` are not."""

_SECTIONS = section_readers()
"""What DeepSpeed makes of the sections that decide the arithmetic."""


def normalise(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` in DeepSpeed's present names and in values of the type that it takes them for, without "auto".

    So ``bfloat16`` becomes ``bf16``, ``"enabled": "true"`` true, ``cpu_offload`` ``offload_optimizer``, ``"float32"`` ``fp32``.

    Raises:
        ConfigError: what DeepSpeed itself refuses; an "auto" that nothing here gives a value; two ways to say one thing.
    """
    content: dict[str, Any] = deepcopy(dict(config))
    _refuse_misspelt(content)
    _rename(content)
    for section, understand in _SECTIONS.items():
        if section in content:
            content[section] = _typed(section, content[section], understand)
    for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype"):
        _name_dtype(content, name)
    for key in ("communication_data_type", "gradient_allreduce_op"):  # DeepSpeed takes these in any case
        if isinstance(content.get(key), str):
            content[key] = content[key].lower()
    _replace_autos(content)
    precision(content)
    _refuse_what_deepspeed_refuses(content)
    return content


def _refuse_misspelt(content: Mapping[str, Any]) -> None:
    """Raises ConfigError for a name that DeepSpeed would pass over, and that was meant to be another."""
    for key in content:
        if key not in KEYS and (meant := _meant(key, KEYS)):
            raise ConfigError(f"deepspeed.{key}", content[key], "DeepSpeed has no such setting", meant)


def _meant(key: str, names: Iterable[str]) -> str:
    """A hint where a key is one of these names, misspelt; empty where it is none."""
    found = difflib.get_close_matches(str(key).lower(), sorted(names), n=1, cutoff=LIKENESS)
    return f"did you mean {found[0]!r}?" if found else ""


def _rename(content: dict[str, Any]) -> None:
    """Brings DeepSpeed's deprecated names to the present ones, in place."""
    if "bfloat16" in content:
        old = content.pop("bfloat16")
        if content.get("bf16") is not None:
            raise ConfigError("deepspeed.bfloat16", old, "is the old name of bf16, which is given, too", "leave it out")
        content["bf16"] = old
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict):
        return
    pin_memory = zero.pop("cpu_offload_use_pin_memory", None)
    if pin_memory is not None and not {"cpu_offload", "cpu_offload_param"} & set(zero):
        key = "deepspeed.zero_optimization.cpu_offload_use_pin_memory"
        raise ConfigError(key, pin_memory, "DeepSpeed reads it no more", "use offload_optimizer.pin_memory")
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        value = zero.pop(old, None)
        if value is None:
            continue
        if zero.get(new) is not None:
            problem = f"is the old name of {new}, which is given, too"
            raise ConfigError(f"deepspeed.zero_optimization.{old}", value, problem, "leave it out")
        if _boolean(f"deepspeed.zero_optimization.{old}", value):
            zero[new] = {"device": "cpu"} if pin_memory is None else {"device": "cpu", "pin_memory": pin_memory}


def _boolean(key: str, value: Any) -> bool:
    """Whatever DeepSpeed's classes take for a boolean."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ConfigError(key, value, "is neither true nor false", "write true or false") from None


def _typed(section: str, given: Any, understand: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    """A section with the values that DeepSpeed reads in it; "auto" is left for later. Raises ConfigError."""
    if not isinstance(given, Mapping):
        way_out = '{"stage": 2}' if section == "zero_optimization" else '{"enabled": true}'
        raise ConfigError(f"deepspeed.{section}", given, "is not a section", f"write {way_out}")
    try:
        return _as_read(given, understand({section: given}))
    except ValidationError as error:
        raise _refusal(error, section, given) from None
    except Exception as error:  # DeepSpeed asserts, too
        raise ConfigError(f"deepspeed.{section}", given, str(error)) from None


def _as_read(given: Mapping[str, Any], parsed: BaseModel) -> dict[str, Any]:
    """``given`` with the values that ``parsed`` has for it, sections within included."""
    fields = {field.alias or name: name for name, field in type(parsed).model_fields.items()}
    content: dict[str, Any] = {}
    for key, value in given.items():
        found = getattr(parsed, fields.get(key, key), value)
        if isinstance(value, Mapping) and isinstance(found, BaseModel):
            content[key] = _as_read(value, found)
        else:
            content[key] = found if value != AUTO and isinstance(found, (bool, int, float, str)) else value
    return content


def _refusal(error: ValidationError, section: str, given: Any) -> ConfigError:
    """The first thing that one of DeepSpeed's classes refuses, by its key."""
    first = error.errors()[0]
    loc = [str(name) for name in first["loc"]]
    path = _path_in(given, loc[1:] if loc[:1] == [section] else loc)
    key, value = ".".join(("deepspeed", section, *path)), get(given, ".".join(path), given) if path else given
    if first["type"] == "extra_forbidden":
        known = _settings_at(error.title, loc[:-1])
        return ConfigError(key, value, "DeepSpeed has no such setting", nearest(loc[-1], known) if known else "leave it out")
    return ConfigError(key, value, first["msg"].removeprefix("Value error, "))


def _path_in(given: Any, path: list[str]) -> list[str]:
    """Where a class's ``path`` lies in its section, or in a section within, which may have a class of its own."""
    dotted, missing = ".".join(path), object()
    if not path or not isinstance(given, Mapping) or get(given, dotted, missing) is not missing:
        return path
    return next(([name, *path] for name, inner in given.items() if get(inner, dotted, missing) is not missing), path)


def _settings_at(title: str, path: list[str]) -> list[str]:
    """The settings that the class of DeepSpeed's of this name has, at a path within; none where it cannot be told."""
    classes: list[type[BaseModel]] = [DeepSpeedConfigModel]
    classes += [more for one in classes for more in one.__subclasses__()]  # grows while it is walked
    model = next((one for one in classes if one.__name__ == title), None)
    for name in path:
        annotation = model.model_fields[name].annotation if model is not None and name in model.model_fields else None
        model = next((one for one in (annotation, *get_args(annotation)) if one in classes), None)
    return [field.alias or name for name, field in model.model_fields.items()] if model is not None else []


def _name_dtype(content: dict[str, Any], name: str) -> None:
    """Brings a dtype of ``data_types`` to its short name, in place."""
    value = get(content, f"data_types.{name}")
    if value in (None, AUTO):
        return
    try:
        content["data_types"][name] = DtypeEnum(value).name
    except ValueError:
        raise ConfigError(f"deepspeed.data_types.{name}", value, "is no dtype that DeepSpeed knows", "use fp32") from None


def _replace_autos(content: dict[str, Any]) -> None:
    """Gives each "auto" the value that follows, in place. Raises ConfigError for one that nothing decides.

    The word is the Hugging Face Trainer's, for its own arguments; DeepSpeed's classes take it for a setting that is not there.
    """
    for path in list(_autos(content)):
        other = {"bf16.enabled": "fp16", "fp16.enabled": "bf16"}.get(path)
        if DEFAULTS.fullmatch(path):
            remove(content, path)
        elif other and _SECTIONS[other](content).enabled:
            content[path.partition(".")[0]]["enabled"] = False
        elif other:
            problem = "says nothing here: it stands for the Trainer's --bf16 or --fp16"
            raise ConfigError(f"deepspeed.{path}", AUTO, problem, "write true or false")
        else:
            raise ConfigError(f"deepspeed.{path}", AUTO, "nothing here decides this", "write a value, or leave it out")


def _autos(value: Any, path: str = "") -> Iterator[str]:
    """The dotted keys of every "auto"."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _autos(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _autos(inner, f"{path}.{index}")
    elif isinstance(value, str) and value == AUTO:
        yield path


def remove(content: dict[str, Any], path: str) -> None:
    """Takes the dotted key ``path`` out, in place."""
    *sections, name = [path] if path in content else path.split(".")
    for section in sections:
        content = content[section]
    del content[name]


def _refuse_what_deepspeed_refuses(content: Mapping[str, Any]) -> None:
    """Raises ConfigError, by its section, for what would end in an error of DeepSpeed's inside the ranks."""
    settings = {key: value for key, value in content.items() if key not in BATCH}  # sizes are judged where ranks are counted
    error, looked_up = _read_by_deepspeed(settings)
    _refuse_unread(settings, looked_up)
    if error is None:
        return
    _refuse_other_kinds(settings, looked_up)
    rest = {key: {name: value for name, value in settings.items() if name != key} for key in settings}
    key = next((key for key in settings if _error_of_deepspeed(rest[key]) is None), None)
    if key is None:
        raise ConfigError("deepspeed", list(content), f"DeepSpeed cannot read this: {error}")
    if isinstance(error, ValidationError):
        raise _refusal(error, key, content[key])
    if not isinstance(content[key], Mapping) and re.search(r"has no attribute|mapping|iterable", str(error)):
        raise ConfigError(f"deepspeed.{key}", content[key], "is not a section", "write its settings in braces, or leave it out")
    raise ConfigError(f"deepspeed.{key}", content[key], f"DeepSpeed refuses it: {error or type(error).__name__}")


LookedUp = Mapping[tuple[str, ...], Any]
"""What is looked up in settings, by its path, with the default that it has there."""


def _error_of_deepspeed(settings: Mapping[str, Any]) -> Exception | None:
    """What DeepSpeed's own reading raises, if anything."""
    return _read_by_deepspeed(settings)[0]


def _read_by_deepspeed(settings: Mapping[str, Any]) -> tuple[Exception | None, LookedUp]:
    """What DeepSpeed's own reading raises, if anything, and what it looks up until then."""
    looked_up: dict[tuple[str, ...], Any] = {}
    try:
        DeepSpeedConfig(_Read({**deepcopy(dict(settings)), "train_micro_batch_size_per_gpu": 1}, looked_up))
    except Exception as error:
        return error, looked_up
    return None, looked_up


def refuse_other_kinds(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value, of what :func:`normalise` gives, that DeepSpeed would use as what it is not."""
    _refuse_other_kinds(config, _read_by_deepspeed(config)[1])


class _Read(dict[str, Any]):
    """Settings that note what is looked up in them.

    DeepSpeed has classes for some sections, which refuse what they do not know. All else it asks for key by key, and takes whatever
    is there, so that a misspelt key is passed over, and ``"false"`` is true.
    """

    def __init__(self, content: Mapping[str, Any], looked_up: dict[tuple[str, ...], Any], path: tuple[str, ...] = ()) -> None:
        inner = {
            key: _Read(value, looked_up, (*path, key)) if isinstance(value, Mapping) else value for key, value in content.items()
        }
        super().__init__(inner)
        self.looked_up, self.path = looked_up, path

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_up.setdefault((*self.path, key), default)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.looked_up.setdefault((*self.path, str(key)), None)
        return super().__contains__(key)


def _paths(settings: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything in settings, with its path."""
    for name, value in settings.items():
        yield (*path, name), value
        if isinstance(value, Mapping):
            yield from _paths(value, (*path, name))


def _refuse_unread(settings: Mapping[str, Any], looked_up: LookedUp) -> None:
    """Raises ConfigError for a name beside those that DeepSpeed looks up in a section, and that was meant to be one of them."""
    for path, value in _paths(settings):
        names = [found[-1] for found in looked_up if found[:-1] == path[:-1]]
        if len(path) > 1 and path not in looked_up and (meant := _meant(path[-1], names)):
            raise ConfigError(".".join(("deepspeed", *path)), value, "DeepSpeed has no such setting", meant)


def _refuse_other_kinds(settings: Mapping[str, Any], looked_up: LookedUp) -> None:
    """Raises ConfigError for a value that DeepSpeed would take as it is, and use as what its default is."""
    for path, value in _paths(settings):
        key, default = ".".join(("deepspeed", *path)), looked_up.get(path)
        if isinstance(default, bool):
            if value not in (True, False):
                raise ConfigError(key, value, "is neither true nor false", "write true or false")
        elif isinstance(default, (int, float)):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ConfigError(key, value, "is no number", f"DeepSpeed's own is {default}")
        elif isinstance(default, Mapping) and not isinstance(value, Mapping):
            raise ConfigError(key, value, "is not a section", "write its settings in braces, or leave it out")


def get(config: Mapping[str, Any], dotted: str, default: Any = None) -> Any:
    """The value at ``section.key``; ``default`` where a section or the key is missing."""
    value: Any = config
    for name in dotted.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return default
        value = value[name]
    return value


def precision(config: Mapping[str, Any]) -> str:
    """``bf16``, ``fp16`` or ``fp32``: the dtype in which DeepSpeed will hold the model."""
    enabled = [name for name in ("bf16", "fp16") if _SECTIONS[name](config).enabled]
    if len(enabled) > 1:
        raise ConfigError("deepspeed.bf16.enabled", True, "bf16 and fp16 are both enabled", "enable one of them")
    return enabled[0] if enabled else "fp32"


def without_effect(config: Mapping[str, Any]) -> list[str]:
    """The dotted keys that were set to something, and do nothing under the ZeRO stage 1 or 2 of ``config``."""
    zero = config["zero_optimization"]
    fields: dict[str, tuple[str, Any]] = {}
    for name, field in type(get_zero_config({})).model_fields.items():
        fields |= dict.fromkeys((name, field.alias or name), (field.alias or name, field.get_default(call_default_factory=True)))
    idle = [key for key in zero if key in fields and (fields[key][0].startswith("stage3_") or key in STAGE_3)]
    unknown = [key for key in config if key not in KEYS]
    return [f"zero_optimization.{key}" for key in idle if zero[key] != fields[key][1]] + unknown
