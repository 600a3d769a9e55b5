"""A sweep's file: named arms over one recipe, and seeds. Without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from relora_ds.config import Config, Positive, Section, Seed, explain, load
from relora_ds.errors import ConfigError
from relora_ds.paths import LocalPath
from relora_ds.run.folder import RunFolder
from relora_ds.text.yaml_text import read_yaml, read_yaml_file

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)
TAKEN = ("plots", "sweep.md", "sweep.csv", "runs.csv", "report.md", "report.html", "events.jsonl", "lock.json")
"""What a sweep's folder holds beside the folders of its arms."""
OURS = ("run", "run.dir", "run.seed")
"""Settings that the sweep itself decides."""


class SweepFile(Section):
    """What the file holds."""

    recipe: LocalPath | Annotated[list[LocalPath], Field(min_length=1)]
    """The recipe of all arms, or several that each have all arms; looked for here, beside the sweep's file and one folder up."""
    dir: LocalPath
    """The folder of the sweep; the runs are in DIR/ARM/seed-S, with several recipes in DIR/RECIPE/ARM/seed-S."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    overrides: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Settings that all arms replace in the recipe, dotted or as sections."""
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """By name, the settings that the arm replaces; they stand over ``overrides``."""
    nproc: Positive | None = None
    """Processes of a run; null: as ``relora-ds train`` decides."""


@dataclass(frozen=True)
class SweepRun:
    """One arm with one seed.

    Attributes:
        arm, seed: which; an arm of several recipes is called RECIPE/ARM.
        recipe: its recipe, where it was found.
        config: the recipe as it is trained.
        words: the ``key.sub=value`` words that make it of the recipe, as a user would type them.
    """

    arm: str
    seed: int
    recipe: Path = field(repr=False, compare=False)
    config: Config = field(repr=False, compare=False)
    words: tuple[str, ...] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.arm}/seed-{self.seed}"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.run.dir))

    @property
    def output(self) -> Path:
        """What the run says."""
        return self.folder.path.with_name(f"seed-{self.seed}.log")


@dataclass(frozen=True)
class Sweep:
    """A sweep whose runs have all been judged.

    Attributes:
        folder: of the sweep.
        nproc: processes of a run; None: as ``relora-ds train`` decides.
        runs: all arms with the first seed, then all with the second, and so on: they can be compared early.
    """

    folder: Path
    nproc: int | None
    runs: tuple[SweepRun, ...]

    @property
    def recipes(self) -> list[Path]:
        return list(dict.fromkeys(run.recipe for run in self.runs))

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    def of(self, arm: str) -> list[SweepRun]:
        """The runs of an arm."""
        return [run for run in self.runs if run.arm == arm]


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep's file, and judges every arm with every seed as far as their text allows.

    Raises:
        ConfigError: with the arm and the key.
    """
    content = read_yaml_file(path, "SWEEP")
    if not isinstance(content, dict):
        raise ConfigError("SWEEP", str(path), "is no sweep", "write recipe, dir, seeds and arms")
    content = _with_names(content)
    try:
        found = SweepFile.model_validate(content)
    except ValidationError as error:
        raise explain(error, SweepFile, content) from None
    for number, seed in enumerate(found.seeds):
        if seed in found.seeds[:number]:
            raise ConfigError("seeds", found.seeds, f"names {seed} twice", "name each once")
    several = isinstance(found.recipe, list)
    recipes = _recipes(found.recipe if isinstance(found.recipe, list) else [found.recipe], path)
    runs = [
        _run(found, f"{name}/" if several else "", recipe, arm, seed)
        for seed in found.seeds
        for name, recipe in recipes.items()
        for arm in found.arms
    ]
    return Sweep(Path(found.dir), found.nproc, tuple(runs))


def _recipes(named: Sequence[str], sweep: Path) -> dict[str, Path]:
    """Where recipes are, by the names of their files without the ending, which become folders."""
    found: dict[str, Path] = {}
    for recipe in named:
        path = _find(recipe, sweep)
        read_yaml_file(path, "recipe")  # what is wrong with the file itself is no fault of an arm
        if path.stem in found or path.stem in TAKEN or path.stem.startswith("."):
            raise ConfigError("recipe", recipe, "is named as another thing in the sweep's folder, or hidden", "rename the file")
        found[path.stem] = path
    return found


def _with_names(content: dict[str, Any]) -> dict[str, Any]:
    """The content with arms that can be judged: names that are text, and can be folders; settings or nothing behind each."""
    content = {**content, "overrides": content.get("overrides") or {}}
    if not isinstance(content.get("arms"), dict):
        return content
    arms: dict[str, Any] = {}
    for given, settings in content["arms"].items():
        name = str(given) if type(given) in (int, float) else given  # arms of a sweep over ranks may be called 8 and 16
        if not isinstance(name, str):
            problem = f"is what YAML makes of a name such as yes, on or null: a {type(given).__name__}, no text"
            raise ConfigError("arms", given, problem, "write the name in quotes")
        if not NAME.fullmatch(name):
            raise ConfigError("arms", given, "is no name for a folder", "use letters, digits, and . _ + - after the first")
        if name in TAKEN:
            raise ConfigError("arms", name, "is the name of another thing in the sweep's folder", "name the arm otherwise")
        if name in arms:
            raise ConfigError("arms", given, "is the name of two arms", "give each its own")
        if not isinstance(settings, dict | None):
            raise ConfigError(f"arms.{name}", settings, "must be a section with the settings that the arm replaces")
        arms[name] = settings or {}
    return {**content, "arms": arms}


def _find(recipe: str, sweep: Path) -> Path:
    beside = sweep.resolve().parent
    found = next((place for place in (Path(recipe), beside / recipe, beside.parent / recipe) if place.is_file()), None)
    if found is None:
        raise ConfigError("recipe", recipe, "no such file", "name a recipe, here or beside the sweep's file")
    return found


def _run(found: SweepFile, prefix: str, recipe: Path, arm: str, seed: int) -> SweepRun:
    name = f"{prefix}{arm}"
    words = [
        f"wandb.name={as_text(f'{Path(found.dir).name}/{name}/seed-{seed}')}"
    ]  # not all alike, by the last part of their folders
    for where, settings in (("overrides", found.overrides), (f"arms.{arm}", found.arms[arm])):
        replaced: dict[str, Any] = {}
        for key, value in flat(settings):
            if key in OURS:
                raise ConfigError(where, key, "is decided by the sweep", "leave it out")
            if key in replaced:
                raise ConfigError(where, key, "is given twice, dotted and in its section", "make one of the two")
            replaced[key] = value
        words += [f"{key}={as_text(value)}" for key, value in replaced.items()]
    words += [f"run.dir={as_text(str(Path(found.dir, name, f'seed-{seed}')))}", f"run.seed={seed}"]
    try:
        return SweepRun(name, seed, recipe, load(recipe, words), tuple(words))
    except ConfigError as error:
        raise error.within(f"arms.{name}") from None


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted keys. What is no section of a recipe (``model.config``, ``deepspeed``) is a value as a whole."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and _is_section(key):
            yield from flat(value, f"{key}.")
        else:
            yield key, value


def _is_section(key: str) -> bool:
    section: Any = Config
    for name in key.split("."):
        named = section.model_fields.get(name)
        section = named.annotation if named is not None else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return False
    return True


def as_text(value: Any) -> str:
    """A value as ``key.sub=value`` takes it: text as it is where that reads back as the same, all else as JSON, which is YAML."""
    if isinstance(value, str) and not set(value) & set(":#\n"):
        try:
            if read_yaml(value, "") == value:
                return value
        except ConfigError:
            pass
    return json.dumps(value, ensure_ascii=False, default=str)
