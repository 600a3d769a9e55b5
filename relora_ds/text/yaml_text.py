"""YAML as people write it: recipes, overrides, site files. PURE but for reading a file."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from relora_ds.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-3`` as a number and ``24:00:00`` as text, as YAML 1.2 does; PyYAML takes the one for text and
    the other for 86400. A key that is given twice is refused, of which PyYAML would drop the first."""

    def __init__(self, text: str, origin: str) -> None:
        super().__init__(text)
        self.origin = origin

    def get_single_node(self) -> Any:
        tree = super().get_single_node()
        self._refuse_twice(tree, (), set())
        return tree

    def _refuse_twice(self, node: Any, path: tuple[str, ...], seen: set[int]) -> None:
        """Raises ConfigError for the first key that a mapping, at any depth, has twice, also where the two are written differently
        (``8`` and ``0x8``). Before merge keys (``<<``) are filled in, whose values a mapping's own keys may replace."""
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            return
        seen.add(id(node))  # aliases lead to one node by many ways, or back to itself
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self._refuse_twice(item, (*path, str(number)), seen)
            return
        lines: dict[Any, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                here, line, name = (*path, key.value), key.start_mark.line + 1, self.construct_object(key)
                if name in lines:
                    problem = f"is given twice: line {lines[name]} has it, too"
                    raise ConfigError(".".join(here), f"line {line} of {self.origin}", problem, "make one of the two")
                lines[name] = line
                self._refuse_twice(value, here, seen)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*)?\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*\.?(?:[eE][-+]?\d+)|\d[\d_]*\.|\.(?:inf|Inf|INF|nan))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"), list("-+0123456789")
)


def read_yaml(text: str, origin: str) -> Any:
    """Parses YAML; raises ConfigError with the place of a syntax error, or of a key that is given twice."""
    try:
        return yaml.load(text, Loader=partial(_Loader, origin=origin))  # type: ignore[arg-type]
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:  # a date that does not exist, a tag
        raise ConfigError(origin, " ".join(str(error).split()), "is not valid YAML") from None


def read_yaml_file(path: Path, key: str) -> Any:
    """Parses a file of YAML; raises ConfigError as :func:`read_yaml`, and on ``key`` for a file that cannot be read as text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
        problem = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or str(error)
        raise ConfigError(key, str(path), problem, "name a YAML file") from None
    return read_yaml(text, str(path))
