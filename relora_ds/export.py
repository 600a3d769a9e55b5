"""From a run's checkpoint to a model: merged weights in memory, or as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from relora_ds import checkpoint as checkpoints
from relora_ds import ds_config, generation, lora, tokenizer
from relora_ds import model as models
from relora_ds.adapters import save_adapter
from relora_ds.base import Base
from relora_ds.errors import ConfigError
from relora_ds.manifest import Manifest
from relora_ds.paths import refuse_unwritable
from relora_ds.run_folder import RunFolder, give_usual_mode
from relora_ds.weights import Source


def load_merged(
    place: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str = "auto",
    trust: bool = False,
) -> PreTrainedModel:
    """The model of a run, or of one of its checkpoints, with W + s·B·A merged: an ordinary Hugging Face model.

    Args:
        place: a run's folder (its newest checkpoint is taken) or a checkpoint.
        dtype: of the result; None for the one it was trained in (the engine's, where the weights are int8).
        device: of the result.
        attention: as in the recipe's ``model.attention``.
        trust: whether a pickle is opened that could run something, because the user trusts whoever wrote it.
    """
    folder, checkpoint = checkpoints.locate(place)
    trained_in = _trained_in(folder)
    architecture = models.read_hf_config(folder.model, "RUN_DIR")
    return models.build(
        architecture,
        attention=attention,
        dtype=dtype or trained_in,
        device=torch.device(device),
        weights=merged_weights(checkpoint, trust=trust),
    ).eval()


def merged_weights(place: Path, *, trust: bool = False) -> Source:
    """The weights of a run, or of one of its checkpoints, merged in fp32 one at a time; what is not asked for stays on disk."""
    model = stored_model(place, trust=trust)
    layers = {f"{name}.weight": layer for name, layer in lora.relora_layers(model)}

    def read(names: Sequence[str], _param: torch.Tensor) -> torch.Tensor:
        for name in names:
            if name in layers:
                merged = layers[name].merged()
                return merged.t() if layers[name].is_conv1d else merged
        return model.get_parameter(names[0]).detach()

    return read


def stored_model(place: Path, *, trust: bool = False) -> PreTrainedModel:
    """The model of a run, or of one of its checkpoints, as it was trained, wrapped in its LoRA phase, over files that stay on disk.

    Raises:
        ConfigError: no such checkpoint, one that is damaged or could run something, or another model's.
    """
    run, checkpoint = checkpoints.locate(place)
    content = checkpoints.read_manifest(checkpoint)
    model = models.build_meta(models.read_hf_config(run.model, "RUN_DIR"))
    if content.phase == "lora":
        settings = run.read_config().lora_settings
        lora.wrap(
            model,
            targets=settings.targets,
            rank=settings.rank,
            alpha=settings.alpha,
            frozen=settings.frozen,
            trainable_scaling=settings.trainable_scaling,
        )
    state = checkpoints.read_model_state(checkpoint, trust=trust)
    if content.base is not None:
        state |= _base_tensors(checkpoint, content)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ConfigError("CHECKPOINT", str(checkpoint), f"does not fit the run's model: {str(error).splitlines()[-1]}") from None
    if any(layer.weight is not None and layer.weight.values.is_meta for _, layer in lora.relora_layers(model)):
        problem = "it holds no frozen weights, and its manifest names no base that does"
        raise ConfigError("CHECKPOINT", str(checkpoint), problem, "take another checkpoint")
    return model


def _base_tensors(checkpoint: Path, content: Manifest) -> dict[str, torch.Tensor]:
    """The frozen weights of a checkpoint's base, as they are stored."""
    problem = next(checkpoints.faults(checkpoint), None)
    if problem is not None:
        raise ConfigError("CHECKPOINT", str(checkpoint), problem, "take another checkpoint")
    return Base(checkpoints.base_folder(checkpoint, content)).state()


def export_adapter(place: Path, out: Path, *, dtype: torch.dtype | None = None, trust: bool = False) -> Path:
    """Writes the current A and B as a PEFT adapter, and the model that they adapt, frozen weights not merged, as ``out/base``.

    Args:
        place: a run's folder or one of its checkpoints, in the LoRA phase.
        out: a folder that is new or empty.
        dtype: of the base; None for the one it was trained in, or fp32 where the frozen weights are stored in another.
        trust: as in :func:`load_merged`.
    """
    _refuse_full(out)
    run, checkpoint = checkpoints.locate(place)
    settings = run.read_config().lora_settings
    stored = stored_model(checkpoint, trust=trust)
    layers = dict(lora.relora_layers(stored))
    if not layers:
        raise ConfigError("RUN_DIR", str(place), "has no LoRA factors yet", "export the model")
    if dtype is None:
        dtype = _trained_in(run) if settings.frozen.dtype == "auto" else torch.float32

    def read(names: Sequence[str], _param: torch.Tensor) -> torch.Tensor:
        layer = next((layers[name.removesuffix(".weight")] for name in names if name.removesuffix(".weight") in layers), None)
        if layer is None or layer.weight is None:
            return stored.get_parameter(names[0]).detach()
        return layer.weight.read().t() if layer.is_conv1d else layer.weight.read()

    save_adapter(
        out, layers.items(), base_name=str((out / "base").resolve()), rank=settings.rank, alpha=settings.alpha
    )  # first: it refuses what cannot be an adapter
    base = models.build(stored.config, attention="auto", dtype=dtype, device=torch.device("cpu"), weights=read)
    _save(base, out / "base", run)
    return out


def _trained_in(run: RunFolder) -> torch.dtype:
    return ds_config.DTYPES[ds_config.precision(ds_config.read(str(run.deepspeed)))]


def _refuse_full(out: Path) -> None:
    refuse_unwritable("OUT", out)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError("OUT", str(out), "is not empty", "name a new folder")


def _save(model: PreTrainedModel, out: Path, run: RunFolder) -> None:
    """As a Hugging Face folder, with the run's tokenizer."""
    model.config.use_cache = True
    generation.save(model, out, run)
    give_usual_mode(*out.glob("*.safetensors"))
    tokenizer.hand_on(run.model, out)


def export(place: Path, out: Path, *, dtype: torch.dtype | None = None, trust: bool = False) -> Path:
    """Writes a Hugging Face folder (config, safetensors, tokenizer) that ``AutoModelForCausalLM.from_pretrained`` loads.

    Args:
        place: a run's folder or one of its checkpoints.
        out: a folder that is new or empty.
        dtype: of the exported weights; None for the one they were trained in.
        trust: as in :func:`load_merged`.
    """
    _refuse_full(out)
    run, checkpoint = checkpoints.locate(place)
    _save(load_merged(checkpoint, dtype=dtype, trust=trust), out, run)
    return out
