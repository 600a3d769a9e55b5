"""From a run's checkpoint to a model: merged weights in memory, or as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from relora_ds import checkpoint as checkpoints
from relora_ds import ds_config, lora
from relora_ds import model as models
from relora_ds.errors import ConfigError
from relora_ds.weights import Source


def load_merged(
    place: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", attention: str = "auto"
) -> PreTrainedModel:
    """The model of a run, or of one of its checkpoints, with W + s·B·A merged: an ordinary Hugging Face model.

    Args:
        place: a run's folder (its newest checkpoint is taken) or a checkpoint.
        dtype: of the result; None for the one it was trained in (the engine's, where the weights are int8).
        device: of the result.
        attention: as in the recipe's ``model.attention``.
    """
    folder, checkpoint = checkpoints.locate(place)
    trained_in = ds_config.DTYPES[ds_config.precision(ds_config.read(str(folder.deepspeed)))]
    architecture = models.read_hf_config(folder.model, "RUN_DIR")
    model = models.skeleton(architecture, attention=attention, dtype=dtype or trained_in, device=torch.device(device))
    source = merged_weights(checkpoint)
    return models.fill(model, dtype=dtype or trained_in, device=torch.device(device), weights=source).eval()


def merged_weights(place: Path) -> Source:
    """The weights of a run, or of one of its checkpoints, merged in fp32 one at a time; what is not asked for stays on disk."""
    folder, checkpoint = checkpoints.locate(place)
    config = folder.read_config()
    architecture = models.read_hf_config(folder.model, "RUN_DIR")
    stored = models.build_meta(architecture)
    if checkpoints.read_manifest(checkpoint).phase == "lora":
        settings = config.lora_settings
        lora.wrap(
            stored,
            targets=settings.targets,
            rank=settings.rank,
            alpha=settings.alpha,
            frozen=settings.frozen,
            trainable_scaling=settings.trainable_scaling,
        )
    try:
        stored.load_state_dict(checkpoints.read_model_state(checkpoint), assign=True)
    except RuntimeError as error:
        raise ConfigError("CHECKPOINT", str(checkpoint), f"does not fit the run's model: {str(error).splitlines()[-1]}") from None
    layers = {f"{name}.weight": layer for name, layer in lora.relora_layers(stored)}

    def read(names: Sequence[str], _param: torch.Tensor) -> torch.Tensor:
        for name in names:
            if name in layers:
                merged = layers[name].merged()
                return merged.t() if layers[name].is_conv1d else merged
        return stored.get_parameter(names[0]).detach()

    return read


def export(place: Path, out: Path, *, dtype: torch.dtype | None = None) -> Path:
    """Writes a Hugging Face folder (config, safetensors, tokenizer) that ``AutoModelForCausalLM.from_pretrained`` loads.

    Args:
        place: a run's folder or one of its checkpoints.
        out: a folder that is new or empty.
        dtype: of the exported weights; None for the one they were trained in.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError("OUT", str(out), "is not empty", "name a new folder")
    folder, _ = checkpoints.locate(place)
    model = load_merged(place, dtype=dtype)
    model.config.use_cache = True
    model.save_pretrained(out)
    if (folder.model / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(folder.model).save_pretrained(out)
    return out
