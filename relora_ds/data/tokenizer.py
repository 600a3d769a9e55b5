"""A tokenizer: the files that it consists of, handed on whole from where it is given to the token folder, the run and the export."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.utils import cached_file

from relora_ds.errors import ConfigError
from relora_ds.run.folder import write_atomically
from relora_ds.text import json_text

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
FILES = (
    TOKENIZER_FILE, CONFIG_FILE, MAP_FILE, ADDED_FILE, "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
    "tokenization*.py",
)  # fmt: skip
"""Patterns of the files that a tokenizer of transformers may consist of."""
ANY_VERSION = "PreTrainedTokenizerFast"
"""The class of a tokenizer.json alone that transformers 4 and 5 both know; 5 writes its own name for it, which 4 does not."""
NEW_NAMES = ("TokenizersBackend",)
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
KNOWN_EOS = ("</s>", "<|endoftext|>", "<eos>")  # what ends a document in published tokenizers, for those that do not name theirs


@dataclass(frozen=True)
class Given:
    """A tokenizer that documents can be encoded with.

    Attributes:
        encoder: without the cutting and filling that its file may ask for, which would silently change documents.
        eos: the token that ends a document.
        file: the tokenizer.json that it is; None for one that was converted, or trained.
        folder: where the other files are that belong to it; None where there is nothing else.
        named: special tokens by their role, as far as the folder says or its model's kind implies.
    """

    encoder: Tokenizer
    eos: str
    file: Path | None = None
    folder: Path | None = None
    named: dict[str, str] = field(default_factory=dict)


def load(name: str) -> Given:
    """A tokenizer from a file, a folder or the hub.

    Raises:
        ConfigError: on ``--tokenizer``, when there is none under that name or it has no token that ends a document.
    """
    path = Path(name)
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith("/") or path.suffix == ".json"):
        raise ConfigError("--tokenizer", name, "there is no such file or folder")
    try:
        if path.is_file():
            folder = path.parent if path.name == TOKENIZER_FILE else None
        else:
            folder = path if path.is_dir() else Path(snapshot_download(name, allow_patterns=[*FILES, "config.json"]))
        file = path / TOKENIZER_FILE if path.is_dir() else path
        encoder = (
            Tokenizer.from_file(str(file))
            if file.is_file()
            else AutoTokenizer.from_pretrained(name, trust_remote_code=False).backend_tokenizer
        )
        named = _named(folder) if folder is not None else special_tokens(path.parent)
        if folder is not None:
            _completed(encoder.get_vocab(), folder)  # or raises: before anything of it is written
    except Exception as error:  # both libraries raise many kinds, `tokenizers` nothing but this one
        raise ConfigError("--tokenizer", name, f"it cannot be loaded as a fast tokenizer ({error})") from error
    eos = next(
        (token for token in (named.get("eos_token"), *KNOWN_EOS) if token and encoder.token_to_id(token) is not None), None
    )
    if eos is None:
        problem = f"it has no token that ends a document (eos_token, or {', '.join(KNOWN_EOS)})"
        raise ConfigError("--tokenizer", name, problem, f"name one of its tokens as eos_token in a {CONFIG_FILE} beside it")
    return Given(_whole(encoder), eos, file if file.is_file() else None, folder, named)


def _named(folder: Path) -> dict[str, str]:
    """:func:`special_tokens`; where the files leave the tokenizer's class open, also those that the model beside them implies."""
    named = special_tokens(folder)
    if not _read(folder / CONFIG_FILE).get("tokenizer_class") and (folder / "config.json").is_file():
        with suppress(Exception):  # of many kinds; then nothing is implied
            named = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False).special_tokens_map | named
    return named


def read_encoder(folder: Path) -> Tokenizer:
    """The tokenizer in a folder that :func:`write` filled, as :attr:`Given.encoder`."""
    return _whole(Tokenizer.from_file(str(folder / TOKENIZER_FILE)))


def _whole(encoder: Tokenizer) -> Tokenizer:
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def write(given: Given, out: Path) -> int:
    """Fills a folder with all that belongs to a tokenizer, as it was given; returns the size of its vocabulary.

    Ids may have gaps, and a model needs a row for the largest. That may be of a token that only the configuration names, such as a
    pad token, which transformers adds to the vocabulary when it loads the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    if given.folder is not None:
        hand_on(given.folder, out)
    if given.file is not None:
        shutil.copyfile(given.file, out / TOKENIZER_FILE)
    else:
        given.encoder.save(str(out / TOKENIZER_FILE))
    before = _read(out / CONFIG_FILE)
    config = dict(before) if before.get("tokenizer_class") else {**given.named, **before, "tokenizer_class": ANY_VERSION}
    if special_tokens(out).get("eos_token") != given.eos:
        config["eos_token"] = given.eos
    if not before:
        config["clean_up_tokenization_spaces"] = False  # decoding gives back the text
    _write(out / CONFIG_FILE, config, before)
    return max(vocabulary(out).values()) + 1


def files(folder: Path) -> list[Path]:
    """The files in a folder that a tokenizer consists of; none where it has no tokenizer."""
    return sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()})


def is_one_of_them(name: str) -> bool:
    """Whether a file of this name may be part of a tokenizer."""
    return any(PurePath(name).match(pattern) for pattern in FILES)


def hand_on(source: Path, target: Path) -> None:
    """Copies a tokenizer's files, whole and as they are, but for a class name that not every version of transformers can load."""
    for file in files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    before = _read(target / CONFIG_FILE)
    config = dict(before)
    if config.get("tokenizer_class") in NEW_NAMES and (target / TOKENIZER_FILE).is_file():
        config["tokenizer_class"] = ANY_VERSION
        if isinstance(config.get("extra_special_tokens"), list):  # version 4 wants names for these, and both know the older key
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        _write(target / CONFIG_FILE, config, before)


def special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by role, ``{"eos_token": "</s>", …}``, as far as the folder's files name them."""
    named = {**_read(folder / MAP_FILE), **{key: token for key, token in _read(folder / CONFIG_FILE).items() if token}}
    found = {role: token for role in ROLES if (token := _content(named.get(role)))}
    if strange := next((role for role, token in found.items() if not isinstance(token, str)), None):
        raise _damaged(folder / CONFIG_FILE, f"its {strange} is {found[strange]!r}, not text")
    return found


def special_ids(folder: Path) -> dict[str, int | None] | None:
    """The ids of bos, eos and pad, by those names, None for what the tokenizer lacks; None in all where there is no tokenizer."""
    if not (folder / TOKENIZER_FILE).is_file():
        return None
    named, ids = special_tokens(folder), vocabulary(folder)
    return {role: ids.get(named.get(f"{role}_token", "")) for role in ("bos", "eos", "pad")}


def vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id, as transformers has them: to those of tokenizer.json it adds what the other files name and that one lacks.

    Raises:
        ConfigError: a file is damaged.
    """
    try:
        found = Tokenizer.from_file(str(folder / TOKENIZER_FILE)).get_vocab()
    except Exception as error:  # `tokenizers` raises nothing but this
        raise _damaged(folder / TOKENIZER_FILE, error) from None
    return _completed(found, folder)


def _completed(found: dict[str, int], folder: Path) -> dict[str, int]:
    """Token -> id, with what the files beside tokenizer.json add. Raises ConfigError for one that is damaged."""
    config, added = _read(folder / CONFIG_FILE), _read(folder / ADDED_FILE)
    if not all(isinstance(number, int) for number in added.values()):
        raise _damaged(folder / ADDED_FILE, "not every token in it has a number")
    try:
        listed = {str(_content(token)): int(number) for number, token in config.get("added_tokens_decoder", {}).items()}
        more = [token for key in ("additional_special_tokens", "extra_special_tokens") for token in config.get(key) or ()]
    except (TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder / CONFIG_FILE, error) from None
    found = {**listed, **added, **found}
    for token in (*special_tokens(folder).values(), *map(_content, more)):
        if not isinstance(token, str | None):
            raise _damaged(folder / CONFIG_FILE, f"its special token {token!r} is not text")
        if token is not None and token not in found:
            found[token] = max(found.values()) + 1
    return found


def find(place: str) -> Tokenizer | None:
    """The tokenizer of a model's folder or hub name; None where there is none, or none that can be read here."""
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    with suppress(Exception):  # the libraries raise many kinds, and who has no tokenizer need not have one
        file = cached_file(place, TOKENIZER_FILE, **lenient)
        if file is not None:
            return Tokenizer.from_file(str(file))
        if files(Path(place)):
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False).backend_tokenizer
    return None


def difference(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """What makes one's ids mean something else to the other, in words; None where nothing does.

    The vocabularies are compared, not files, which differ from saving to saving. A token that was added, as pad tokens are, may be
    there in one alone.
    """
    here, there = ours.get_vocab(), theirs.get_vocab()
    added = {token.content for tokenizer in (ours, theirs) for token in tokenizer.get_added_tokens_decoder().values()}
    in_one = here.keys() ^ there.keys()
    differing = [token for token in here.keys() | there.keys() if here.get(token) != there.get(token)]
    differing = sorted(token for token in differing if token not in added or token not in in_one)
    if not differing:
        return None
    token = differing[0]
    ids = " and ".join(
        f"{'no' if number is None else number} {where}"
        for number, where in ((here.get(token), "here"), (there.get(token), "there"))
    )
    return f"{len(differing):,} tokens differ, such as {token!r} ({ids})"


def _content(token: Any) -> str | None:
    """A token as a configuration has it: a string, or an object with ``content``."""
    return token.get("content") if isinstance(token, dict) else token


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file. Raises ConfigError for anything else."""
    try:
        content = json_text.parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise _damaged(path, "no JSON object")
    return content


def _damaged(path: Path, why: object) -> ConfigError:
    return ConfigError(path.name, str(path.parent), f"cannot be read: {why}", "copy it anew from where the tokenizer comes from")


def _write(path: Path, content: dict[str, Any], before: dict[str, Any]) -> None:
    if content != before:  # else the file stays the bytes that it was
        write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
