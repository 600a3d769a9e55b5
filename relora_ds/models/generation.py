"""Which tokens begin, end and fill a text: a model's configuration says what the tokenizer of its run says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from relora_ds.config import Model
from relora_ds.data import tokenizer
from relora_ds.models.adapters import is_peft, peft_base
from relora_ds.run.folder import RunFolder, write_atomically

Ids = int | list[int] | None


def origin(settings: Model) -> str | None:
    """The Hugging Face folder, or hub name, that a recipe's model starts from, for all but its weights; None without ``path``."""
    if settings.path is None:
        return None
    run = RunFolder(Path(settings.path))
    if run.exists():
        return str(run.model)
    return peft_base(Path(settings.path)) if is_peft(settings.path) else settings.path


def is_others(settings: Model) -> bool:
    """Whether the model was made elsewhere, with settings of its own that it should keep."""
    if settings.path is None:
        return False
    run = RunFolder(Path(settings.path))
    return is_others(run.read_config().model) if run.exists() else True


def name_tokens(config: PretrainedConfig, settings: Model, tokens: Path) -> None:
    """Gives the architecture of a run the bos and eos of its token folder; another's model keeps its own unless they contradict.

    No pad token for random weights: the row of a ``pad_token_id`` is not trained, and an architecture's default may be any word of
    this vocabulary.
    """
    ids, keeps = _ids(tokens, config), is_others(settings)
    if not ids:
        return
    _set(config, {role: ids[role] for role in ("bos", "eos")}, keeps)
    if not keeps:
        _set(config, {"pad": None}, keeps)


def keep_generation_config(settings: Model, folder: Path) -> None:
    """Copies what the model that a run starts from says about generation, if it was made elsewhere, into the run's ``model/``."""
    source = origin(settings)
    if source is None or not is_others(settings):
        return
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(source, GENERATION_CONFIG_NAME, **lenient)
    if file is not None:
        shutil.copyfile(file, folder / GENERATION_CONFIG_NAME)


def save(model: PreTrainedModel, out: Path, run: RunFolder) -> None:
    """``model.save_pretrained``, with the tokens that the run's tokenizer names in config.json and generation_config.json."""
    ids, keeps = _ids(run.model, model.config), is_others(run.read_config().model)
    _set(model.config, ids, keeps)
    model.save_pretrained(out)
    kept, written = run.model / GENERATION_CONFIG_NAME, out / GENERATION_CONFIG_NAME
    if not kept.is_file() and not written.is_file():
        return  # a model that cannot generate
    content = json.loads((kept if kept.is_file() else written).read_text(encoding="utf-8"))
    if not kept.is_file():
        content.pop("use_cache", None)  # of the training, which never generates
    for role, number in ids.items():
        content[f"{role}_token_id"] = _chosen(content.get(f"{role}_token_id"), number, keeps)
    write_atomically(written, json.dumps({key: value for key, value in content.items() if value is not None}, indent=2) + "\n")


def _ids(folder: Path, config: PretrainedConfig) -> dict[str, int | None]:
    """bos, eos and pad of a folder's tokenizer, as far as the model has rows for them; empty where there is no tokenizer."""
    rows = config.get_text_config().vocab_size
    ids = tokenizer.special_ids(folder) or {}
    return {role: number if number is not None and number < rows else None for role, number in ids.items()}


def _set(config: PretrainedConfig, ids: Mapping[str, int | None], keeps: bool) -> None:
    """In a configuration, and in the one of its text model, where that is another."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for role, number in ids.items():
            key = f"{role}_token_id"
            setattr(part, key, _chosen(getattr(part, key, None), number, keeps))


def _chosen(given: Ids, own: int | None, keeps: bool) -> Ids:
    """``own``, the tokenizer's; or what was given, if that is to be kept and says nothing else, of which a list may say more."""
    agrees = own is None or own == given or (isinstance(given, list) and own in given)
    return given if keeps and given is not None and agrees else own
