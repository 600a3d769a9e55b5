"""What a recipe needs of the model, the data, DeepSpeed and the number of ranks: judged before any process group starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from relora_ds import checkpoint as checkpoints
from relora_ds import ds_config, lora
from relora_ds import model as models
from relora_ds.config import Config
from relora_ds.data import TokenDataset, TokenIndex, read_index
from relora_ds.errors import ConfigError
from relora_ds.run_folder import RunFolder

FIXED_SECTIONS = ("run.seed", "method", "model", "data", "relora", "optimizer", "train.global_batch")
"""What a resumed run must share with the run that it goes on with."""


@dataclass(frozen=True)
class Checked:
    """A recipe that can run here.

    Attributes:
        config: the recipe.
        deepspeed: DeepSpeed's configuration, fitted to the recipe and the number of ranks.
        architecture: the Hugging Face configuration of the model.
        index: of the token folder.
    """

    config: Config
    deepspeed: dict[str, Any]
    architecture: PretrainedConfig
    index: TokenIndex


def check(config: Config, recipe: Path, world_size: int) -> Checked:
    """Raises ConfigError for the first thing that could not be trained, or not be trained right.

    Args:
        config: the recipe as it was read.
        recipe: its file; DeepSpeed's JSON is also looked for beside it and one folder up.
        world_size: ranks of the job.
    """
    near = (recipe.resolve().parent, recipe.resolve().parent.parent)
    content = ds_config.read(config.deepspeed, *near)
    ds_config.refuse_unsupported(content)
    fitted = ds_config.fit(content, config, world_size)
    index = read_index(Path(config.data.path))
    architecture = models.hf_config(config.model, index.vocab_size)
    _check_data(config, index, architecture)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = ds_config.DTYPES[ds_config.precision(fitted)]
    models.attention_implementation(config.model.attention, dtype=dtype, device=device)  # raises where it cannot run
    if config.method != "full":
        model = models.build_meta(architecture)
        layers = lora.find_targets(model, config.relora.targets)
        lora.check_rank(layers, config.relora.rank)
        if config.method == "control":
            architecture = models.control_config(architecture, lora.num_trainable(model, layers, config.relora.rank))
    _check_resume(config, world_size)
    return Checked(config, fitted, architecture, index)


def _check_data(config: Config, index: TokenIndex, architecture: PretrainedConfig) -> None:
    length = config.data.sequence_length
    for split in ("train", "validation"):
        TokenDataset(index.folder, split, length)  # raises when a split is shorter than one sample
    positions = getattr(architecture, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError("data.sequence_length", length, f"longer than the model's {positions} positions")
    if index.vocab_size > architecture.vocab_size:
        raise ConfigError(
            "data.path",
            config.data.path,
            f"its tokenizer has {index.vocab_size} entries, the model's vocabulary {architecture.vocab_size}",
            "leave the model's vocab_size out, or prepare the data with the model's tokenizer",
        )


def _check_resume(config: Config, world_size: int) -> None:
    """A run's folder that holds a checkpoint can only be gone on with by the same run on as many ranks."""
    folder = RunFolder(Path(config.run.dir))
    newest = checkpoints.newest(folder)
    if newest is None:
        return
    old, new = (settings.model_dump(mode="json") for settings in (folder.read_config(), config))
    for key in FIXED_SECTIONS:
        before, now = ds_config.get(old, key), ds_config.get(new, key)
        if before != now:
            differing = [name for name in now if before.get(name) != now[name]] if isinstance(now, dict) else []
            name = f"{key}.{differing[0]}" if differing else key
            raise ConfigError(
                name,
                ds_config.get(new, name),
                f"the run in {folder.path} has {ds_config.get(old, name)!r}",
                "name another run.dir",
            )
    saved_with = checkpoints.read_manifest(newest).world_size
    if saved_with != world_size:
        raise ConfigError(
            "--nproc", world_size, f"the checkpoint {newest} was written by {saved_with} ranks", f"resume with {saved_with} ranks"
        )
