"""Weights that come from other tools, and go to them: PEFT's LoRA adapters, and plain DeepSpeed checkpoints.

What comes in is a :data:`~relora_ds.models.weights.Source` for :func:`relora_ds.models.build.fill`. Its files are checked when
the source is made, so that what does not fit is told in one line before any weight is there.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from relora_ds.checkpoint.reader import MODEL_STATES
from relora_ds.errors import ConfigError
from relora_ds.method import exact
from relora_ds.method.lora import ReLoRAEmbedding, ReLoRALayer
from relora_ds.models.weights import Source
from relora_ds.run import unpickle
from relora_ds.run.folder import give_usual_mode, write_atomically
from relora_ds.text import json_text

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_ADAPTER = "adapter_model.bin"
PREFIX = "base_model.model."
LINEAR, EMBEDDING, COPY = "lora_{}.weight", "lora_embedding_{}", "base_layer.weight"
"""PEFT's names of a linear layer's factors, of an embedding's, and of the weight of either that it may save beside them."""
TENSOR = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.(lora_[AB]\.weight|lora_embedding_[AB]|base_layer\.weight)")
MERGE_FIRST = "merge it with peft's merge_and_unload first"
UNDERSTOOD = frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    ]
)
"""Settings of a LoRA adapter that are followed, or that do not matter once it is trained. Any other one must be off."""
INITS_BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""First values of the factors that leave the base as it is; others (PiSSA, OLoRA, ...) take their product out of it."""

LATEST = "latest"


class Factors(NamedTuple):
    """Where the factors of one layer are, and how their product is added to its weight.

    Attributes:
        A, B: names of the tensors (rank, in) and (out, rank) in the adapter's file.
        scaling: of B·A.
        is_in_out: whether the weight is kept (in, out), as those of Conv1D and of embeddings are.
        base: name of the weight that the adapter brings along for the layer, which counts in the base's place; None for none.
    """

    A: str
    B: str
    scaling: float
    is_in_out: bool
    base: str | None


def is_peft(place: str | Path) -> bool:
    """Whether ``place`` is the folder of a PEFT adapter."""
    return (Path(place) / ADAPTER_CONFIG).is_file()


def peft_base(folder: Path) -> str:
    """The model that an adapter adapts: a folder or a hub name.

    A relative folder is relative to the current one, or else to the adapter's; one that begins with ``./``, as exports of this
    package have it, the other way round.

    Raises:
        ConfigError: the adapter names no base model, or one revision of it on the hub.
    """
    config = _read_adapter_config(folder)
    name = config.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise _refusal(folder, f"names no base model in {ADAPTER_CONFIG}")
    places = [Path(name), folder / name]
    for place in reversed(places) if name.startswith("./") else places:
        if place.exists():
            return str(place)
    if config.get("revision") not in (None, "main"):
        raise _refusal(folder, f"adapts revision {config['revision']!r} of {name}")
    return name


def peft_weights(folder: Path, base: Source, model: PreTrainedModel) -> Source:
    """The weights of a base model with a PEFT LoRA adapter merged in: W + scaling·B·A, formed in fp32; the rest as in the base.

    Args:
        folder: of the adapter: adapter_config.json and adapter_model.safetensors.
        base: the base model's weights.
        model: the base model, with or without weights: its layers decide which tensors fit and which weights are (in, out).

    Raises:
        ConfigError: the adapter does more than add B·A to linear layers and embeddings, does not fit the model, or cannot be read.
    """
    config = _read_adapter_config(folder)
    _check_mergeable(folder, config)
    layers = _find_factors(folder, config, model)

    def read(names: Sequence[str], param: Tensor) -> Tensor:
        found = next((layers[name] for name in names if name in layers), None)
        if found is None:
            return base(names, param)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            A, B = (file.get_tensor(key).to(torch.float32) for key in (found.A, found.B))
            value = base(names, param) if found.base is None else file.get_tensor(found.base)
        change = exact.product(B, exact.columns(A)).mul_(found.scaling).to(torch.float32)
        return value.to(torch.float32) + (change.t() if found.is_in_out else change)

    return read


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = json_text.parse((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("model.path", str(folder), f"its {ADAPTER_CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError("model.path", str(folder), f"its {ADAPTER_CONFIG} is no JSON object")
    return config


def _refusal(folder: Path, problem: str) -> ConfigError:
    return ConfigError("model.path", str(folder), problem, MERGE_FIRST)


def _check_mergeable(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the adapter adds B·A to weights and does nothing else."""
    if config.get("peft_type") != "LORA":
        raise _refusal(folder, f"is an adapter of type {config.get('peft_type')!r}, not LORA")
    more = [name for name, value in config.items() if value and name not in UNDERSTOOD]
    if config.get("bias", "none") != "none":
        more.insert(0, "bias")
    if more:
        raise _refusal(folder, f"has {more[0]}={config[more[0]]!r}, which does more than add low-rank products to weights")
    if config.get("init_lora_weights") not in INITS_BESIDE_THE_BASE:
        init = config["init_lora_weights"]
        raise _refusal(folder, f"has init_lora_weights={init!r}, which changes the base model's weights, too")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if (folder / PICKLED_ADAPTER).is_file():
            way_out = "save it as safetensors: load it with peft and call save_pretrained"
            raise ConfigError("model.path", str(folder), f"its {PICKLED_ADAPTER} is a pickle that could run anything", way_out)
        raise ConfigError("model.path", str(folder), f"holds no {ADAPTER_WEIGHTS}", "name the folder that save_pretrained wrote")


def _find_factors(folder: Path, config: Mapping[str, Any], model: nn.Module) -> dict[str, Factors]:
    """{weight in the model: its factors}, every tensor of the adapter accounted for.

    Raises:
        ConfigError: a tensor is no factor of a linear layer or an embedding of the model, or has another shape than that needs.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    weights = dict(model.named_parameters(remove_duplicate=False))
    keys: dict[str, dict[str, str]] = {}
    shapes = _tensor_shapes(folder)
    for key in shapes:
        match = TENSOR.fullmatch(key)
        name = match[1] if match else ""
        if not match or f"{name}.weight" not in weights:
            raise _refusal(folder, f"its tensor {key} matches no parameter of the model")
        keys.setdefault(name, {})[match[2]] = key
    found: dict[str, Factors] = {}
    for name, tensors in keys.items():
        module, weight = modules[name], weights[f"{name}.weight"]
        kinds = {nn.Linear: LINEAR, Conv1D: LINEAR, nn.Embedding: EMBEDDING}
        layout = next((layout for kind, layout in kinds.items() if isinstance(module, kind)), None)
        wanted = [] if layout is None else [layout.format("A"), layout.format("B")]
        unfit = next((key for what, key in tensors.items() if layout is None or what not in (*wanted, COPY)), None)
        if unfit is not None:
            raise _refusal(folder, f"its tensor {unfit} cannot adapt {name}, a {type(module).__name__}")
        if not tensors.keys() >= {*wanted}:
            raise _refusal(folder, f"its tensor {next(iter(tensors.values()))} has no counterpart")
        shared = [other for other, param in weights.items() if param is weight and other != f"{name}.weight"]
        if shared:
            raise _refusal(folder, f"adapts {name}, whose weight is {shared[0]}, too: no merge can change one of them alone")
        rank = _by_pattern(config.get("rank_pattern"), name, config.get("r", 8))
        alpha = _by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
        is_in_out = not isinstance(module, nn.Linear)
        num_out, num_in = reversed(weight.shape) if is_in_out else weight.shape
        for what, shape in zip((*wanted, COPY), ([rank, num_in], [num_out, rank], list(weight.shape)), strict=True):
            if what in tensors and shapes[tensors[what]] != shape:
                raise _refusal(folder, f"its tensor {tensors[what]} is {shapes[tensors[what]]}, the model and r want {shape}")
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)  # rank-stabilised: arXiv 2312.03732
        A, B = (tensors[what] for what in wanted)
        found[f"{name}.weight"] = Factors(A, B, scaling, is_in_out, tensors.get(COPY))
    return found


def _tensor_shapes(folder: Path) -> dict[str, list[int]]:
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise ConfigError("model.path", str(folder), f"its {ADAPTER_WEIGHTS} cannot be read: {error}") from None


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression for a layer's name, or for its end from a dot on; the first that matches counts."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def save_adapter(out: Path, layers: Iterable[tuple[str, ReLoRALayer]], *, base_name: str, rank: int, alpha: float) -> None:
    """Writes the factors of wrapped layers as a PEFT adapter, which ``peft.PeftModel.from_pretrained(base_model, out)`` loads.

    The base model must hold everything else as it is now: the frozen weights, not merged, and what is trained beside the factors.
    Factors keep their dtype. A scale that is not alpha / rank (a trainable one) goes into B, in fp32, because not every tool that
    reads adapters knows of a scale per layer.

    Args:
        out: a folder; made where it is missing.
        layers: names in the model, and layers, as :func:`relora_ds.method.lora.relora_layers` gives them.
        base_name: folder or hub name of the base model, for those who load the adapter.
        rank, alpha: what the layers were wrapped with.

    Raises:
        ConfigError: there is no layer, or one without a frozen weight (method ``low_rank``): nothing to adapt.
    """
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    is_conv1d = False
    for name, layer in layers:
        if layer.weight is None:
            raise ConfigError("method", "low_rank", f"layer {name} has no frozen weight to adapt", "export the merged model")
        assert layer.rank == rank, f"layer {name} has rank {layer.rank}"
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        trained = layer.lora_scaling
        scale = float(layer.scale(None if trained is None else trained.detach().to(torch.float32)))
        if scale != alpha / rank:
            B = B.to(torch.float32) * (scale * rank / alpha)
        layout = LINEAR
        if isinstance(layer, ReLoRAEmbedding):  # PEFT's factors of one stand for the transpose of its weight
            layout, A, B = EMBEDDING, B.t(), A.t()
        for letter, factor in (("A", A), ("B", B)):
            tensors[f"{PREFIX}{name}.{layout.format(letter)}"] = factor.cpu().contiguous()
        targets.append(name)
        is_conv1d = is_conv1d or layer.is_conv1d
    if not targets:
        raise ConfigError("OUT", str(out), "the model has no LoRA factors to write as an adapter", "export the merged model")
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": is_conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # PEFT's own type, which other readers insist on
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    give_usual_mode(out / ADAPTER_WEIGHTS)
    write_atomically(out / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")  # last: it makes the folder an adapter


def check_deepspeed(folder: Path, *, trust: bool) -> None:
    """Raises ConfigError where there is no checkpoint, or where its files could run something and the user does not trust them."""
    tag = _find_tag(folder)
    unpickle.check([tag / MODEL_STATES, *sorted(tag.glob("*_optim_states.pt"))], trust=trust, key="model.weights")


def deepspeed_weights(folder: Path, model: PreTrainedModel, *, trust: bool) -> Source:
    """The weights of a plain DeepSpeed checkpoint: of ZeRO 1 or 2, or of none; the whole is read at once, or mapped, on the CPU.

    Of ZeRO's checkpoints the fp32 masters are taken; of others, and of weights that were not trained, what the module held, in its
    own dtype.

    Args:
        folder: given to ``engine.save_checkpoint`` (of several tags the one that ``latest`` names), or a tag's folder in it.
        model: with or without weights: its parameters are what must be there.
        trust: whether files are opened that could run something, because the user trusts whoever wrote them.

    Raises:
        ConfigError: could run something; split over model-parallel or ZeRO-3 ranks; unreadable; or not this model's weights.
    """
    tag = _find_tag(folder)
    try:
        content = unpickle.read(tag / MODEL_STATES, trust=trust, key="model.weights")
        # Both: ZeRO 1 saves no frozen parameters with its masters.
        state: dict[str, Tensor] = {**content["module"], **_masters(tag, trust)}
        buffers = list(content.get("buffer_names") or ())
    except ConfigError:
        raise
    except Exception as error:  # DeepSpeed's reader, or a pickle that is trusted, can fail in any way
        problem = f"cannot be read: {type(error).__name__}: {error}"[:400]
        raise ConfigError("model.weights", str(folder), problem) from None
    return _state_source(folder, {_strip(name): value for name, value in state.items()}, {*map(_strip, buffers)}, model)


def _strip(name: str) -> str:
    """The name without what a wrapper around the model (such as DistributedDataParallel) puts before it."""
    return name.removeprefix("module.")


def _find_tag(folder: Path) -> Path:
    """The folder with the states. Raises ConfigError where there is none, or where the model's parts lie in several files."""
    latest = folder / LATEST
    tag = (folder / latest.read_text(encoding="utf-8").strip() if latest.is_file() else folder).resolve()
    files = {path.name for path in tag.glob("*model_states.pt")}
    if not files:
        problem = f"{LATEST} names {tag.name}, which holds no {MODEL_STATES}" if latest.is_file() else f"holds no {MODEL_STATES}"
        raise ConfigError("model.weights", str(folder), problem, "name the folder that was given to save_checkpoint")
    if files != {MODEL_STATES}:
        parts = "is of ZeRO 3, or of a model split over tensor, pipeline or expert-parallel ranks"
        way_out = "write a Hugging Face folder with DeepSpeed's zero_to_fp32.py, or with the tool that trained it"
        raise ConfigError("model.weights", str(folder), parts, way_out)
    return tag


def _masters(tag: Path, trust: bool) -> dict[str, Tensor]:
    """ZeRO's fp32 masters by parameter; empty where there are none.

    Raises:
        Exception: of any kind, as DeepSpeed and pickle raise them.
    """
    if not any(tag.glob("*_optim_states.pt")):
        return {}
    # Before the streams are redirected: DeepSpeed's logger keeps the stdout that it finds when it is imported.
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        silent = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())  # lines and a progress bar on every rank
        with silent[0], silent[1], unpickle.guarded(trust=trust, key="model.weights"):
            return get_fp32_state_dict_from_zero_checkpoint(str(tag.parent), tag=tag.name)
    except ValueError as error:
        if "is not a zero checkpoint" not in str(error):
            raise
        # So it says of ZeRO 1 in bf16 with gradients accumulated in fp32, which has an optimizer of its own in DeepSpeed.
        text = f"{tag}: DeepSpeed cannot read the fp32 masters of this kind of checkpoint; taking the module's weights"
        warnings.warn(text, stacklevel=3)
        return {}


def _state_source(folder: Path, state: Mapping[str, Tensor], buffers: set[str], model: nn.Module) -> Source:
    """A source that reads from ``state``, which must hold the model's parameters, and besides them nothing but ``buffers``."""
    if any(name.endswith(".lora_A") for name in state):
        way_out = "make a Hugging Face folder of it (relora-ds export) and name that as model.path"
        raise ConfigError(
            "model.weights", str(folder), "is of a script that trained by ReLoRA: part of its weights is in factors", way_out
        )
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(param, []).append(name)
    for param, names in aliases.items():
        found = next((name for name in names if name in state), None)
        if found is None:
            raise ConfigError("model.weights", str(folder), f"lacks {names[0]}", "name the model that it was trained with")
        if state[found].shape != param.shape:
            problem = f"{found} is {tuple(state[found].shape)}, the model wants {tuple(param.shape)}"
            raise ConfigError("model.weights", str(folder), problem, "name the model that it was trained with")
    known = {name for names in aliases.values() for name in names} | {name for name, _ in model.named_buffers()} | buffers
    foreign = [name for name in state if name not in known]
    if foreign:
        problem = f"holds {foreign[0]}, which the model has not"
        raise ConfigError("model.weights", str(folder), problem, "name the model that it was trained with")
    return lambda names, param: next((state[name] for name in names if name in state), param)
