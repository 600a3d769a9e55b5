"""The models: the paper's LLaMA sizes, any Hugging Face causal language model, or an earlier run."""

from __future__ import annotations

import bisect
import copy
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, is_flash_attn_2_available

from relora_ds.config import Model
from relora_ds.errors import ConfigError, nearest
from relora_ds.models.adapters import is_peft, peft_base
from relora_ds.models.weights import Source, materialise, pretrained
from relora_ds.run.folder import RunFolder

PRESETS: dict[str, tuple[int, int, int, int, int]] = {
    # hidden, MLP, heads, layers, positions: the table of Lialin et al., arXiv 2307.05695
    "llama_60m": (512, 1376, 8, 8, 1024),
    "llama_130m": (768, 2048, 12, 12, 1024),
    "llama_250m": (768, 2560, 16, 24, 1024),
    "llama_350m": (1024, 2736, 16, 24, 1024),
    "llama_1b": (2048, 5461, 32, 24, 2048),
    "llama_3b": (2560, 6848, 32, 32, 2048),
    "llama_7b": (4096, 11008, 32, 32, 2048),
}
"""Vocabulary apart, which is the tokenizer's (32,100 in the paper: T5's)."""
MLP_KEYS = ("intermediate_size", "n_inner", "ffn_dim")
"""How architectures call the width of the MLP."""


def preset_config(name: str, vocab_size: int) -> LlamaConfig:
    """The paper's LLaMA of that size: RMSNorm before each block, SwiGLU, rotary positions, head and embedding not tied."""
    if name not in PRESETS:
        raise ConfigError("model.preset", name, "unknown preset", nearest(name, PRESETS))
    hidden, mlp, heads, layers, positions = PRESETS[name]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        max_position_embeddings=positions,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def hf_config(settings: Model, vocab_size: int) -> PretrainedConfig:
    """The Hugging Face configuration that ``settings`` stands for.

    Args:
        settings: the recipe's ``model`` section.
        vocab_size: of the token folder; taken where the settings do not name one.

    Raises:
        ConfigError: unknown preset or model type, or a configuration that cannot be read.
    """
    if settings.preset is not None:
        return _rounded_up(preset_config(settings.preset, vocab_size), settings.multiple_of)
    if isinstance(settings.config, dict):
        return _rounded_up(_inline_config(settings.config, vocab_size), settings.multiple_of)
    if settings.multiple_of != 1:
        way_out = "leave it out, or write the configuration's keys into the recipe"
        raise ConfigError("model.multiple_of", settings.multiple_of, "is for a preset or keys of model.config", way_out)
    key, source = ("model.path", settings.path) if settings.path is not None else ("model.config", settings.config)
    assert source is not None, "validated"
    run = RunFolder(Path(source))
    if run.exists():
        return read_hf_config(run.model, key)
    return read_hf_config(peft_base(Path(source)) if is_peft(source) else source, key)


def _rounded_up(config: PretrainedConfig, multiple: int) -> PretrainedConfig:
    """With the MLP's width and the vocabulary's rows rounded up; rows beyond the tokenizer's stand for no token."""
    for key in ("vocab_size", *MLP_KEYS):
        if getattr(config, key, None):
            setattr(config, key, -(-getattr(config, key) // multiple) * multiple)
    return config


def slow_widths(config: PretrainedConfig) -> str | None:
    """One line where a GPU's matrix products would be slow by their widths; None where they are not."""
    odd = {key: getattr(config, key) for key in ("hidden_size", *MLP_KEYS, "vocab_size") if (getattr(config, key, None) or 0) % 8}
    if not odd:
        return None
    named = ", ".join(f"{key} {value:,}" for key, value in odd.items())
    return f"{named}: no multiple of 8, which GPUs multiply slowly; model.multiple_of=64 rounds a new model's up"


def read_hf_config(source: str | Path, key: str) -> PretrainedConfig:
    """A configuration from a folder, a file or the hub; ``key`` is the setting that named it, for the error."""
    if isinstance(source, Path) and not (source / CONFIG_NAME).is_file():  # else its name would be asked of the hub
        raise ConfigError(key, str(source), f"holds no {CONFIG_NAME}", "restore it, or name another folder")
    with explained(key, str(source), "cannot be loaded"):
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False)  # None would ask, and wait for an answer


@contextmanager
def explained(key: str, value: object, problem: str) -> Iterator[None]:
    """Turns what transformers raises about a user's input into one ConfigError of one line."""
    try:
        yield
    except (OSError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, StrictDataclassError) as error:
        if isinstance(error, ConfigError):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(key, value, f"{problem}: {text[:300]}") from None


def _inline_config(content: dict[str, Any], vocab_size: int) -> PretrainedConfig:
    fields = dict(content)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError("model.config.model_type", None, "is required", "name an architecture, such as llama, gpt2, gpt_neox")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            "model.config.model_type",
            model_type,
            "is no causal language model of transformers",
            nearest(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        )
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map, *_optional_keys(default)}
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ConfigError(f"model.config.{unknown[0]}", fields[unknown[0]], "unknown key", nearest(unknown[0], known))
    fields.setdefault("vocab_size", vocab_size)
    with explained("model.config", content, "cannot be built"):
        config = AutoConfig.for_model(model_type, **fields)
    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and shared and heads % shared:
        problem, way_out = f"does not divide the {heads} heads", "a default may not fit: give num_key_value_heads, too"
        raise ConfigError("model.config.num_key_value_heads", shared, problem, way_out)
    return config


def _optional_keys(config: PretrainedConfig) -> set[str]:
    """What an architecture's code takes from its configuration if it is there: no attribute of the class tells of it."""
    with suppress(OSError):  # an installation without sources: such keys are refused there
        source = inspect.getsource(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__])
        return set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', source))
    return set()


SUPPORT = {"sdpa": ("_supports_sdpa",), "flash_attention_2": ("_supports_flash_attn", "_supports_flash_attn_2")}
"""How transformers' classes say which attention they have; all have the eager one."""


def attention_implementation(choice: str, config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device) -> str:
    """What ``model.attention`` means for an architecture here: ``auto`` is the best that it has.

    Raises:
        ConfigError: one was asked for by name that the architecture does not have, or flash-attention 2 where it cannot run.
    """
    flash_runs = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and is_flash_attn_2_available()
    if choice == "auto":
        able = [name for name in ("flash_attention_2", "sdpa") if _has_attention(config, name)]
        return next((name for name in able if name != "flash_attention_2" or flash_runs), "eager")
    if not _has_attention(config, choice):
        raise ConfigError("model.attention", choice, f"transformers has none for a {config.model_type}", "use auto")
    if choice == "flash_attention_2" and not flash_runs:
        raise ConfigError(
            "model.attention",
            choice,
            "needs CUDA, bf16 or fp16, and the flash-attn package",
            "install relora_ds[flash] or use auto",
        )
    return choice


def _has_attention(config: PretrainedConfig, name: str) -> bool:
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    classes = found if isinstance(found, (list, tuple)) else [found]
    flags = SUPPORT.get(name, ())
    return not flags or all(any(getattr(cls, flag, False) for flag in flags) for cls in classes)


def skeleton(config: PretrainedConfig, *, attention: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers real, to be filled.

    Args:
        config: the architecture.
        attention: as in the recipe's ``model.attention``.
        dtype, device: of the computation: they decide which attention can run.
    """
    implementation = attention_implementation(attention, config, dtype=dtype, device=device)
    config.use_cache = False  # a training run never generates, and gradient checkpointing warns about it

    def to_meta(_module: nn.Module, _name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if param is None or param.is_meta:  # a tied one stays the same object
            return param
        return nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        with explained("model", config.model_type, "cannot be built"):
            return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    finally:
        hook.remove()


def fill(
    model: PreTrainedModel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    weights: str | Source | None = None,
    finish: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """Gives a skeleton its weights; no more than one unit (a block, an embedding) is in fp32 at a time.

    Args:
        model: from :func:`skeleton`.
        dtype, device: of the result.
        seed: of random weights.
        weights: a Hugging Face folder or hub name, or another source; None for random ones.
        finish: called with the name of each unit while it is in fp32, before it is rounded to ``dtype``.
    """
    with explained("model", weights if isinstance(weights, str) else model.config.model_type, "cannot be built"):
        source = pretrained(weights, model) if isinstance(weights, str) else weights
        for name, _ in materialise(model, source, device=device, seed=seed):
            if finish is not None:
                finish(name)
            for param in model.get_submodule(name).parameters():  # not buffers: rotary frequencies stay fp32
                param.data = param.data.to(dtype)
    return model.to(device)


def build(
    config: PretrainedConfig,
    *,
    attention: str,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    weights: str | Source | None = None,
) -> PreTrainedModel:
    """:func:`skeleton` and :func:`fill`."""
    model = skeleton(config, attention=attention, dtype=dtype, device=device)
    return fill(model, dtype=dtype, device=device, seed=seed, weights=weights)


def build_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model without weights, to check a recipe against: shapes and names only, in milliseconds."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with explained("model.config", config.model_type, "cannot be built"):
            try:
                model = AutoModelForCausalLM.from_config(config)
            except RuntimeError as error:  # torch on a size that no tensor can have
                raise ValueError(str(error)) from None
            model.tie_weights()  # transformers 5.0 leaves that out on the meta device
            return model


def refuse_encoder(model: PreTrainedModel, key: str) -> None:
    """Raises ConfigError for a model whose tokens see those that follow them, of which a loss would say nothing: it only falls."""
    sees = {module.is_decoder for module in model.modules() if isinstance(getattr(module, "is_decoder", None), bool)}
    if sees == {False} and getattr(model.config, "is_decoder", None) is False:
        problem = f"a {model.config.model_type} is an encoder, whose tokens see those that follow them"
        raise ConfigError(f"{key}.is_decoder", False, problem, "set it to true, or take another architecture")


def num_parameters(config: PretrainedConfig) -> int:
    """Of the whole model, tied ones once."""
    return sum(param.numel() for param in build_meta(config).parameters())


def control_config(target: PretrainedConfig, wanted: int) -> PretrainedConfig:
    """The paper's control: a narrower model of the same depth, heads and vocabulary with about ``wanted`` parameters.

    The width goes in steps that keep the heads' size even, the MLP in proportion; then the MLP alone takes up the difference.

    Raises:
        ConfigError: the architecture has no width to change, or not even its narrowest model is so small.
    """
    mlp_key = next((key for key in MLP_KEYS if hasattr(target, key)), None)
    heads = getattr(target, "num_attention_heads", None)
    if not hasattr(target, "hidden_size") or mlp_key is None or heads is None:
        raise ConfigError("method", "control", f"cannot tell the width of a {target.model_type}", "use a LLaMA or GPT")
    hidden, step = target.hidden_size, 2 * heads
    mlp = getattr(target, mlp_key) or 4 * hidden  # GPT-2 leaves it open

    def sized(width: int, mlp_width: int) -> PretrainedConfig:
        config = copy.deepcopy(target)
        config.hidden_size = width
        setattr(config, mlp_key, mlp_width)
        if getattr(target, "head_dim", None) == hidden // heads:
            config.head_dim = width // heads
        return config

    def size(width: int) -> int:
        return num_parameters(sized(width, round(mlp * width / hidden)))

    if size(step) > wanted:
        raise ConfigError(
            "method", "control", f"no such {target.model_type} is as small as {wanted:,} parameters", "raise the rank"
        )
    widths = range(step, 4 * hidden, step)
    below = widths[bisect.bisect_right(widths, wanted, key=size) - 1]
    width = min(below, below + step, key=lambda candidate: abs(size(candidate) - wanted))
    start = round(mlp * width / hidden)
    slope = num_parameters(sized(width, start + 1)) - num_parameters(sized(width, start))
    return sized(width, max(1, start + round((wanted - size(width)) / slope)))


def describe(config: PretrainedConfig) -> str:
    """One line for people, e.g. ``llama: hidden 128, 4 layers, 4 heads, vocabulary 1,024``."""
    content = json.loads(config.to_json_string(use_diff=False))
    parts = [
        ("hidden", "hidden_size"),
        ("layers", "num_hidden_layers"),
        ("heads", "num_attention_heads"),
        ("vocabulary", "vocab_size"),
    ]
    return f"{config.model_type}: " + ", ".join(f"{label} {getattr(config, key, content.get(key))}" for label, key in parts)
