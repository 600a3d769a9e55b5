"""Where a model's first weights come from, and how they come in: unit by unit, so that one can be rounded before the next is there.

A unit is a block of the model (a member of its outermost module lists), or a module outside the blocks (embedding, last norm, head).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from relora_ds.errors import ConfigError
from relora_ds.run import unpickle

Source = Callable[[Sequence[str], Tensor], Tensor]
"""(all names of a parameter, the parameter on the meta device) -> its value: same shape, any floating dtype.

Also asked for the buffers that a model saves with its weights (the routing biases of DeepSeek-V3): a buffer as it was made is there
already, and given back by a source that does not hold it.
"""


def materialise(
    model: PreTrainedModel, source: Source | None, *, device: torch.device, seed: int = 0
) -> Iterator[tuple[str, nn.Module]]:
    """Gives a model whose parameters are on the meta device its weights, in fp32; yields every unit as soon as it is real.

    Args:
        model: from :func:`relora_ds.models.build.skeleton`; changed in place. Tied parameters stay tied.
        source: of the values; None for random ones, as the architecture initialises them, drawn on the CPU from the seed and the
            unit's name, so that they depend on neither the device nor what the caller does in between.
        device: where the weights go.
        seed: of random weights.

    Yields:
        (name, module) of the unit.
    """
    names: dict[int, list[str]] = {}
    metas: dict[int, nn.Parameter] = {}  # kept: an id is only unique while its owner lives
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
        metas[id(param)] = param
    if source is not None:
        _fill_buffers(model, source)
    tied: dict[int, nn.Parameter] = {}
    for name, unit in _units(model):
        is_new = False
        for module in unit.modules():
            for key, param in list(module._parameters.items()):
                if param is None or not param.is_meta:
                    continue
                real = tied.get(id(param))
                if real is None:
                    value = torch.empty_like(param, device="cpu") if source is None else source(names[id(param)], param)
                    real = nn.Parameter(value.to(torch.float32).contiguous(), requires_grad=param.requires_grad)
                    is_new = True
                if len(names[id(param)]) > 1:  # only these: any other reference would keep what the caller rounds
                    tied[id(param)] = real
                module._parameters[key] = real
        if source is None and is_new:
            _initialise(model, unit, f"{seed}/{name}")
        yield name, unit.to(device)


def _fill_buffers(model: nn.Module, source: Source) -> None:
    """Gives the buffers that are part of a model's state their values, each in its own dtype."""
    for name, buffer in _saved_buffers(model):
        module, _, key = name.rpartition(".")
        setattr(model.get_submodule(module), key, source([name], buffer).to(buffer.dtype, copy=True))


def _saved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that belong to a model's state, by name; others, such as rotary frequencies, follow from its configuration."""
    saved = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved]


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The members of the outermost module lists of ``model``, by name."""
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = {name for name in lists if not any(name.startswith(f"{other}.") for other in lists)}
    return [(name, module) for name, module in model.named_modules() if name.rpartition(".")[0] in outermost]


def _units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    inside = tuple(f"{name}." for name, _ in blocks(model))
    return [
        (name, module)
        for name, module in model.named_modules()
        if f"{name}." in inside or (not name.startswith(inside) and any(True for _ in module.parameters(recurse=False)))
    ]


@torch.no_grad()
def _initialise(model: PreTrainedModel, unit: nn.Module, text: str) -> None:
    """Random weights for the modules of a unit, children first, by the architecture's own rule."""
    digest = hashlib.sha256(text.encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        unit.apply(model._init_weights)


def blank(_names: Sequence[str], param: Tensor) -> Tensor:
    """A :data:`Source` of zeros, for a model whose weights a checkpoint will bring."""
    return torch.zeros(param.shape) if param.is_meta else param


def pretrained(place: str, model: PreTrainedModel) -> Source:
    """The weights of a Hugging Face folder or hub name.

    safetensors files whose names are the model's are read one tensor at a time; anything else (pickles, quantised weights, names that
    transformers converts) is loaded by transformers as a whole, in fp32.

    Raises:
        ConfigError: a weight of the model is missing, or has another shape than it wants, or a pickle could run something.
        OSError, ValueError: as transformers raises them where there are no weights.
    """
    where = _find_tensors(place)
    wanted = [name for name, _ in (*model.named_parameters(), *_saved_buffers(model))]
    resolved = {name: found for name in wanted if (found := _alias(name, model, where)) is not None}
    missing = [name for name, _ in model.named_parameters() if name not in resolved]
    if missing or getattr(model.config, "quantization_config", None) is not None:
        with unpickle.guarded(key="model.path", way_out="save it as safetensors, with save_pretrained"):
            found, report = AutoModelForCausalLM.from_pretrained(
                place, config=model.config, dtype=torch.float32, output_loading_info=True
            )
        lacking = sorted({name for name, _ in model.named_parameters()} & {*report["missing_keys"]})
        if lacking:  # transformers makes random ones in their place, others on each rank, and only warns
            more = f" and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
            way_out = "name a folder with all weights of a causal language model"
            raise ConfigError("model.path", place, f"holds no {lacking[0]}{more}", way_out)
        whole = found.state_dict()
        return lambda names, param: next((whole[name] for name in names if name in whole), param)

    def read(names: Sequence[str], param: Tensor) -> Tensor:
        found = next((resolved[name] for name in names if name in resolved), None)
        if found is None:  # a buffer that the files do not have
            return param
        with safe_open(where[found], framework="pt") as file:
            value = file.get_tensor(found)
        if value.shape != param.shape:
            raise ConfigError("model.path", place, f"{found} is {tuple(value.shape)}, the model wants {tuple(param.shape)}")
        return value

    return read


def _find_tensors(place: str) -> dict[str, str]:
    """{tensor: safetensors file}; empty where there are none."""
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    single = cached_file(place, SAFE_WEIGHTS_NAME, **lenient)
    if single is not None:
        files = [single]
    else:
        index = cached_file(place, SAFE_WEIGHTS_INDEX_NAME, **lenient)
        files = get_checkpoint_shard_files(place, index)[0] if index is not None else []
    where = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where.update(dict.fromkeys(file.keys(), str(path)))
    return where


def _alias(name: str, model: PreTrainedModel, where: dict[str, str]) -> str | None:
    """The name that a parameter has in the files: with or without the prefix of the model inside (``transformer.`` of GPT-2)."""
    prefix = f"{model.base_model_prefix}."
    candidates = (name, name.removeprefix(prefix), prefix + name)
    return next((candidate for candidate in candidates if candidate in where), None)
