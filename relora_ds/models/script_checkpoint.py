"""What lies beside the tensors of a script's checkpoint, and the model that is read by it.

DeepSpeed's checkpoints are tensors alone. Beside those of a script's engine lie ``relora_ds.json`` (which layers were wrapped, and
how) and ``model/`` (the Hugging Face configuration), so that ``relora-ds export`` needs nothing but the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from relora_ds.checkpoint.reader import DESCRIPTION, MODEL_STATES
from relora_ds.config import Frozen
from relora_ds.errors import ConfigError
from relora_ds.method import lora
from relora_ds.models import build as models
from relora_ds.run import unpickle
from relora_ds.run.folder import write_atomically

MODEL = "model"


def describe(model: Any, tag: Path) -> None:
    """Writes what :func:`read` needs beside the tensors of a checkpoint."""
    if isinstance(model, PreTrainedModel):
        model.config.save_pretrained(tag / MODEL)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(tag / MODEL)
    layers = {
        name: {
            "rank": layer.rank,
            "alpha": layer.scaling * layer.rank,
            "trainable_scaling": layer.lora_scaling is not None,
            "frozen": {"dtype": "none"} if layer.weight is None else _store(layer.weight),
        }
        for name, layer in lora.relora_layers(model)
    }
    write_atomically(tag / DESCRIPTION, json.dumps({"layers": layers}, indent=2) + "\n")


def _store(weight: Any) -> dict[str, Any]:
    return {"dtype": "auto" if weight.dtype_name == "fp16" else weight.dtype_name, "group_size": weight.group_size}


def read(tag: Path, *, trust: bool = False) -> PreTrainedModel:
    """The model of a script's checkpoint, wrapped as it was trained, over tensors that stay on disk.

    Args:
        tag: from :func:`relora_ds.checkpoint.reader.of_script`.
        trust: whether a pickle is opened that could run something, because the user trusts whoever wrote it.

    Raises:
        ConfigError: the model is none of transformers, or the file is missing, damaged or could run something.
    """
    if not (tag / MODEL).is_dir():
        problem = "its model is none of transformers, whose layers this could build"
        raise ConfigError(
            "CHECKPOINT", str(tag), problem, "load it in its script, and call relora_ds.merge_and_unload(engine.module)"
        )
    model = models.build_meta(models.read_hf_config(tag / MODEL, "CHECKPOINT"))
    try:
        for name, how in json.loads((tag / DESCRIPTION).read_text(encoding="utf-8"))["layers"].items():
            lora.wrap_layers(model, {name: model.get_submodule(name)}, **{**how, "frozen": Frozen(**how["frozen"])})
        state = unpickle.read(tag / MODEL_STATES, trust=trust)["module"]
        model.load_state_dict(state, assign=True)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError("CHECKPOINT", str(tag), f"cannot be read: {type(error).__name__}: {error}"[:300]) from None
    return model
