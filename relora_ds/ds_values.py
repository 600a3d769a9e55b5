"""DeepSpeed's JSON in the names and values that DeepSpeed reads in it: its spellings, the word "auto", and what it refuses itself."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum, get_zero_config
from pydantic import BaseModel, TypeAdapter, ValidationError

from relora_ds.errors import ConfigError, nearest
from relora_ds.zero_versions import section_readers

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
        if section in content and not (section == "zero_optimization" and isinstance(content[section], bool)):
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
    """Raises ConfigError for what DeepSpeed would pass over, and was meant to decide what is trained."""
    for key in content:
        meant = () if key in KEYS else difflib.get_close_matches(str(key).lower(), DECIDING, n=1, cutoff=0.8)
        if meant:
            raise ConfigError(f"deepspeed.{key}", content[key], "DeepSpeed has no such setting", f"did you mean {meant[0]!r}?")


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
        raise _refusal(error, section, given, understand({})) from None
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


def _refusal(error: ValidationError, section: str, given: Any, default: BaseModel | None = None) -> ConfigError:
    """The first thing that one of DeepSpeed's classes refuses, by its key."""
    first = error.errors()[0]
    path = [str(name) for name in first["loc"]]
    value = get(given, ".".join(path), given) if path and isinstance(given, Mapping) else given
    key = ".".join(("deepspeed", section, *path))
    if first["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in type(default).model_fields.items()] if default else []
        hint = nearest(path[-1], known) if known and len(path) == 1 else ""
        return ConfigError(key, value, "DeepSpeed has no such setting", hint)
    return ConfigError(key, value, first["msg"])


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
    error = _error_of_deepspeed(settings)
    if error is None:
        return
    rest = {key: {name: value for name, value in settings.items() if name != key} for key in settings}
    key = next((key for key in settings if _error_of_deepspeed(rest[key]) is None), None)
    if key is None:
        raise ConfigError("deepspeed", list(content), f"DeepSpeed cannot read this: {error}")
    if isinstance(error, ValidationError):
        raise _refusal(error, key, content[key])
    raise ConfigError(f"deepspeed.{key}", content[key], str(error) or type(error).__name__)


def _error_of_deepspeed(settings: Mapping[str, Any]) -> Exception | None:
    """What DeepSpeed's own reading raises, if anything."""
    try:
        DeepSpeedConfig({**deepcopy(dict(settings)), "train_micro_batch_size_per_gpu": 1})
    except Exception as error:
        return error
    return None


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
