"""From a checkpoint, or an engine, to a model: merged weights in memory, as a Hugging Face folder, or as a PEFT adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from relora_ds.checkpoint import reader as checkpoints
from relora_ds.checkpoint.base import Base
from relora_ds.data import tokenizer
from relora_ds.ds_config import fit as ds_config
from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.method.frozen_weights import FLOATS
from relora_ds.models import build as models
from relora_ds.models import generation, script_checkpoint
from relora_ds.models.adapters import save_adapter
from relora_ds.models.weights import Source
from relora_ds.paths import refuse_unwritable
from relora_ds.run.folder import RunFolder, give_usual_mode
from relora_ds.run.manifest import Manifest

BASE = "./base"
"""How an adapter names the model that it adapts, beside it: a path of the hub's form would be asked of the hub."""


@dataclass(frozen=True)
class Trained:
    """A model to export, wrapped in its LoRA phase.

    Attributes:
        model: itself, or one over files that stay on disk.
        dtype: that it was trained in.
        run: whose tokenizer goes with it; None for a script's.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    run: RunFolder | None = None


def load_merged(
    source: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    trust: bool = False,
) -> PreTrainedModel:
    """The model with W + s·B·A merged: an ordinary Hugging Face model.

    Args:
        source: a run's folder (its newest checkpoint is taken), one of its checkpoints, or what else :func:`export_model` takes.
        dtype: of the result; None for the one it was trained in (the engine's, where the weights are int8).
        device: of the result.
        attention: as in the recipe's ``model.attention``.
        trust: whether a pickle is opened that could run something, because the user trusts whoever wrote it.
    """
    trained = _find(source, trust)
    return _build(trained, _merged(trained.model), dtype or trained.dtype, device=device, attention=attention)


def merged_weights(place: Path, *, trust: bool = False) -> Source:
    """The weights of a run, or of one of its checkpoints, merged in fp32 one at a time; what is not asked for stays on disk."""
    return _merged(stored_model(place, trust=trust))


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Puts ordinary layers in the place of the wrapped ones, with W + s·B·A in the factors' dtype, as PEFT's of this name does.

    Args:
        model: the module of an engine that was released (:func:`relora_ds.release`); changed in place.

    Returns:
        ``model``.

    Raises:
        ConfigError: it is still an engine.
    """
    if hasattr(model, "save_checkpoint"):
        way_out = (
            "call relora_ds.export_model(engine, folder); or keep its module, call relora_ds.release(engine), and merge that"
        )
        raise ConfigError("model", type(model).__name__, "is an engine, which trains the layers that would go", way_out)
    plain: dict[nn.Module, nn.Module] = {layer: layer.plain() for _, layer in lora.relora_layers(model)}
    for parent in list(model.modules()):
        parent._modules.update({name: plain[child] for name, child in parent._modules.items() if child in plain})
    return model


def _find(source: Any, trust: bool) -> Trained:
    """What there is to export; raises ConfigError where there is nothing."""
    if not isinstance(source, (str, Path)):
        model = source.module if hasattr(source, "save_checkpoint") else source
        if not isinstance(model, PreTrainedModel) or type(model) is not MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None):
            way_out = "save what relora_ds.merge_and_unload(module) gives"
            raise ConfigError("model", type(model).__name__, "is no causal language model of transformers", way_out)
        return Trained(model, next(model.parameters()).dtype)
    tag = checkpoints.of_script(Path(source))
    if tag is not None:
        model = script_checkpoint.read(tag, trust=trust)
        return Trained(model, next(model.parameters()).dtype)
    run, checkpoint = checkpoints.locate(Path(source))
    return Trained(stored_model(checkpoint, trust=trust), _trained_in(run), run)


def _merged(model: PreTrainedModel) -> Source:
    """The weights of a wrapped model as an ordinary one has them."""
    return _source(model, lambda layer: layer.merged())


def _frozen(layer: lora.ReLoRALayer) -> Tensor:
    assert layer.weight is not None, "an adapter of it was refused"
    return layer.weight.read()


def _source(model: PreTrainedModel, weight_of: Callable[[lora.ReLoRALayer], Tensor]) -> Source:
    """The weights of a model, those of wrapped layers by ``weight_of`` (out, in)."""
    layers = {f"{name}.weight": layer for name, layer in lora.relora_layers(model)}

    def read(names: Sequence[str], param: Tensor) -> Tensor:
        layer = next((layers[name] for name in names if name in layers), None)
        if layer is None:
            return (model.get_parameter if param.is_meta else model.get_buffer)(names[0]).detach()
        return weight_of(layer).t() if layer.is_conv1d else weight_of(layer)

    return read


def _build(
    trained: Trained, weights: Source, dtype: torch.dtype, *, device: torch.device | str = "cpu", attention: str = "auto"
) -> PreTrainedModel:
    """An ordinary model of the same architecture; the one that is trained keeps its configuration."""
    architecture = copy.deepcopy(trained.model.config)
    return models.build(architecture, attention=attention, dtype=dtype, device=torch.device(device), weights=weights).eval()


def stored_model(place: Path, *, trust: bool = False) -> PreTrainedModel:
    """The model of a run, or of one of its checkpoints, as it was trained, wrapped in its LoRA phase, over files that stay on disk.

    Raises:
        ConfigError: no such checkpoint, one that is damaged or could run something, or another model's.
    """
    run, checkpoint = checkpoints.locate(place)
    content = checkpoints.read_manifest(checkpoint)
    model = model_beside_base(run, checkpoint, trust=trust)
    if content.base is not None:
        _load(model, checkpoint, _base_tensors(checkpoint, content), strict=False)
    refuse_unfilled(model, checkpoint)
    return model


def refuse_unfilled(model: PreTrainedModel, checkpoint: Path) -> None:
    """Raises ConfigError where frozen weights of a checkpoint's model were nowhere."""
    if any(layer.weight is not None and layer.weight.values.is_meta for _, layer in lora.relora_layers(model)):
        problem = "it holds no frozen weights, and its manifest names no base that does"
        raise ConfigError("CHECKPOINT", str(checkpoint), problem, "take another checkpoint")


def model_beside_base(run: RunFolder, checkpoint: Path, *, trust: bool = False) -> PreTrainedModel:
    """What a checkpoint itself holds of its model, over files that stay on disk: frozen weights of a base are on the meta device.

    Args:
        run: whose checkpoint it is.
        checkpoint: its folder.
        trust: as in :func:`load_merged`.

    Raises:
        ConfigError: it is damaged, could run something, or is another model's.
    """
    model = models.build_meta(models.read_hf_config(run.model, "RUN_DIR"))
    if checkpoints.read_manifest(checkpoint).phase == "lora":
        settings = run.read_config().lora_settings
        lora.wrap(
            model,
            targets=settings.targets,
            rank=settings.rank,
            alpha=settings.alpha,
            frozen=settings.frozen,
            trainable_scaling=settings.trainable_scaling,
        )
    _load(model, checkpoint, checkpoints.read_model_state(checkpoint, trust=trust), strict=True)
    return model


def _load(model: PreTrainedModel, checkpoint: Path, state: dict[str, Tensor], *, strict: bool) -> None:
    try:
        model.load_state_dict(state, assign=True, strict=strict)
    except RuntimeError as error:
        raise ConfigError("CHECKPOINT", str(checkpoint), f"does not fit the run's model: {str(error).splitlines()[-1]}") from None


def _base_tensors(checkpoint: Path, content: Manifest) -> dict[str, torch.Tensor]:
    """The frozen weights of a checkpoint's base, as they are stored."""
    problem = next(checkpoints.faults(checkpoint), None)
    if problem is not None:
        raise ConfigError("CHECKPOINT", str(checkpoint), problem, "take another checkpoint")
    return Base(checkpoints.base_folder(checkpoint, content)).state()


def export_model(source: Any, out: str | Path, *, dtype: torch.dtype | None = None, trust: bool = False) -> Path:
    """Writes a Hugging Face folder that ``AutoModelForCausalLM.from_pretrained`` loads: config, safetensors, and a run's tokenizer.

    Rank 0 writes; of the other ranks nothing is asked. An engine goes on as if nothing had been.

    Args:
        source: an engine of :func:`relora_ds.initialize` or its module, a folder that such an engine saved, or a run's folder or one
            of its checkpoints.
        out: a folder that is new or empty.
        dtype: of the exported weights; None for the one they were trained in.
        trust: as in :func:`load_merged`.

    Returns:
        ``out``.

    Raises:
        ConfigError: ``out`` is not empty, there is no checkpoint, or no causal language model of transformers.
    """
    if _is_writer():
        _refuse_full(Path(out))
        trained = _find(source, trust)
        _save(_build(trained, _merged(trained.model), dtype or trained.dtype), Path(out), trained)
    return Path(out)


def export_adapter(source: Any, out: str | Path, *, dtype: torch.dtype | None = None, trust: bool = False) -> Path:
    """Writes the current A and B as a PEFT adapter, and the model that they adapt, frozen weights not merged, as ``out/base``.

    Args:
        source: as for :func:`export_model`, in its LoRA phase.
        out: a folder that is new or empty.
        dtype: of the base; None for the one it was trained in, or fp32 where the frozen weights are stored in another.
        trust: as in :func:`load_merged`.

    Returns:
        ``out``.

    Raises:
        ConfigError: as :func:`export_model`, or there are no factors on frozen weights.
    """
    out = Path(out)
    if not _is_writer():
        return out
    _refuse_full(out)
    trained = _find(source, trust)
    layers = dict(lora.relora_layers(trained.model))
    if not layers:
        raise ConfigError("RUN_DIR", str(source), "has no LoRA factors yet", "export the model")
    first = next(iter(layers.values()))
    stored = {FLOATS.get(layer.weight.dtype_name) for layer in layers.values() if layer.weight is not None}
    # First: it refuses what cannot be an adapter.
    save_adapter(out, layers.items(), base_name=BASE, rank=first.rank, alpha=first.scaling * first.rank)
    base = _build(
        trained, _source(trained.model, _frozen), dtype or (trained.dtype if stored == {trained.dtype} else torch.float32)
    )
    _save(base, out / BASE, trained)
    return out


def _is_writer() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _trained_in(run: RunFolder) -> torch.dtype:
    return ds_config.DTYPES[ds_config.precision(ds_config.read(str(run.deepspeed)))]


def _refuse_full(out: Path) -> None:
    refuse_unwritable("OUT", out)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError("OUT", str(out), "is not empty", "name a new folder")


def _save(model: PreTrainedModel, out: Path, trained: Trained) -> None:
    """As a Hugging Face folder, with the run's tokenizer."""
    model.config.use_cache = True
    if trained.run is not None:
        generation.save(model, out, trained.run)
        tokenizer.hand_on(trained.run.model, out)
    else:
        model.generation_config = copy.deepcopy(trained.model.generation_config)
        model.save_pretrained(out)
    give_usual_mode(*out.glob("*.safetensors"))
