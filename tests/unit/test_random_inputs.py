"""Random bad inputs: whatever a key holds and wherever a file is cut off, the answer is one ConfigError, or the input is good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st
from pydantic import BaseModel

from relora_ds.config import Config, parse
from relora_ds.data.token_dataset import read_index
from relora_ds.ds_config import fit as ds_config
from relora_ds.ds_config.file import read
from relora_ds.errors import ConfigError
from relora_ds.run import manifest
from relora_ds.text.yaml_text import read_yaml
from tests.unit.bad_inputs import BASE, INDEX, MANIFEST

bounded = hypothesis.settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


def keys(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key of the recipe, sections included."""
    for name, field in model.model_fields.items():
        here = (*path, field.alias or name)
        yield here
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, here)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4), st.dates())
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5
)


def refused_or_good(act: Any) -> None:
    """One line, or nothing wrong."""
    try:
        act()
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


@bounded
@hypothesis.given(path=st.sampled_from(list(keys(Config))), value=VALUES)
def test_any_value_of_any_key(settings: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    content = deepcopy(settings)
    inner = content
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner[path[-1]] = value
    refused_or_good(lambda: parse(content))


DEEPSPEED = {
    "bf16": {"enabled": False}, "fp16": {"enabled": False, "loss_scale": 0}, "zero_optimization": {"stage": 2, "overlap_comm": True},
    "data_types": {"grad_accum_dtype": "fp32"}, "timers": {"throughput": {"enabled": True}}, "checkpoint": {"tag_validation": "Warn"},
    "activation_checkpointing": {"profile": False}, "aio": {"queue_depth": 8}, "comms_logger": {"enabled": False},
    "steps_per_print": 10, "wall_clock_breakdown": False, "tensorboard": {"enabled": False}, "data_efficiency": {"enabled": False},
}  # fmt: skip
JSON = st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.text(max_size=6), st.just([]), st.just({}))


def places(content: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in content.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


@bounded
@hypothesis.given(path=st.sampled_from(list(places(DEEPSPEED))), value=JSON)
def test_any_value_in_deepspeeds_json(settings: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    content = deepcopy(DEEPSPEED)
    inner: dict[str, Any] = content
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    recipe = parse({**settings, "deepspeed": content})
    refused_or_good(lambda: ds_config.of_recipe(recipe))


@bounded
@hypothesis.given(text=st.text(alphabet="{}[]:,-\"'#&*!|>%@ \n\tab1.e", max_size=30))
def test_any_text_as_yaml(text: str) -> None:
    refused_or_good(lambda: read_yaml(text, "recipe"))


@bounded
@hypothesis.given(share=st.floats(0, 1), name=st.sampled_from([INDEX, MANIFEST, f"{BASE}/manifest.json", "ds.json"]))
def test_files_cut_off_anywhere(place: Path, share: float, name: str) -> None:
    (place / "ds.json").write_text(json.dumps(DEEPSPEED))
    whole, kept = (place / name).read_bytes(), place / f"{name}.kept"
    shutil.copyfile(place / name, kept)
    try:
        (place / name).write_bytes(whole[: int(share * len(whole))])
        refused_or_good(lambda: read(place / "ds.json"))
        refused_or_good(lambda: read_index(place / "tokens"))
        for folder in ((place / MANIFEST).parent, place / BASE):
            try:
                manifest.read_json(folder)
            except manifest.ManifestError as error:
                assert len(str(error).splitlines()) == 1
    finally:
        shutil.move(kept, place / name)
