"""Secrets in what is recorded or shown, such as the API key of one of DeepSpeed's monitors. PURE."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
_NAME = r"(?:(?:api|access|private|secret|wandb|comet)[_-]?key|secret|password|passwd|(?:auth|access|hf|api)[_-]?token)"
_SECTION = re.compile(rf"""({_NAME}['"]?[ \t]*[=:][ \t]*)("[^"]*"|'[^']*'|[^\s,}}'"]+)""", re.IGNORECASE)
_LINE = re.compile(rf"^([ \t]*(?:- )?[\w.-]*{_NAME}[ \t]*:[ \t]+)\S.*", re.IGNORECASE | re.MULTILINE)
"""Of YAML, whose values have blanks and commas without quotes around them."""
_WORD = re.compile(rf"([\w.-]*{_NAME}=).*", re.IGNORECASE | re.DOTALL)
_OPTION = re.compile(rf"--[\w.-]*{_NAME}", re.IGNORECASE)
_KEY = re.compile(rf".*{_NAME}", re.IGNORECASE)


def masked(text: str) -> str:
    """YAML, JSON or a command line with three stars in the place of each value whose name says that it is secret."""
    return _SECTION.sub(rf"\1{MASK}", _LINE.sub(rf"\1{MASK}", text))


def masked_values(settings: Any) -> Any:
    """The same for settings in dictionaries and lists, whatever is in them."""
    if isinstance(settings, Mapping):
        is_set = {key: value is not None and _KEY.fullmatch(str(key)) is not None for key, value in settings.items()}
        return {key: MASK if is_set[key] else masked_values(value) for key, value in settings.items()}
    return [masked_values(value) for value in settings] if isinstance(settings, list) else settings


def masked_words(words: Sequence[str]) -> list[str]:
    """The same for the words of a command line, where a value may also follow its ``--name`` and hold blanks."""
    found: list[str] = []
    for word, before in zip(words, ["", *words], strict=False):
        is_value = _OPTION.fullmatch(before) and not word.startswith("--")
        assigned = _WORD.fullmatch(word)
        found.append(MASK if is_value else f"{assigned[1]}{MASK}" if assigned else masked(word))
    return found
