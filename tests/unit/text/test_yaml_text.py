"""YAML as people write it: how values are read, and keys that are given twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from relora_ds import config
from relora_ds.ds_config import fit as ds_config
from relora_ds.errors import ConfigError
from tests.unit.test_config import refusal

# How values are read


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-3", 1e-3),
        ("1e5", 1e5),
        ("1E+5", 1e5),
        (".5", 0.5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("2.5e-4", 2.5e-4),
        ("1_000.5", 1000.5),
        ("0.002", 0.002),
    ],
)
def test_numbers_that_people_write_are_floats(text: str, number: float) -> None:
    value = config.read_yaml(f"a: {text}", "recipe")["a"]
    assert isinstance(value, float)
    assert value == number


@pytest.mark.parametrize("text", ["e5", "1e", "v1e5", "1.2.3", "1e5x", "llama_60m", "runs/1e5", ".", "2e5-4", "24:00:00", "2-4"])
def test_strings_stay_strings(text: str) -> None:
    assert config.read_yaml(f"a: {text}", "recipe") == {"a": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("-1", -1),
        ("0", 0),
        ("0x1F", 31),
        ("20_000", 20000),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("'1e5'", "1e5"),
    ],
)
def test_everything_else_is_ordinary_yaml(text: str, value: object) -> None:
    read = config.read_yaml(f"a: {text}", "recipe")["a"]
    assert read == value
    assert type(read) is type(value)


def test_ordinary_yaml_loader_is_left_alone() -> None:
    assert yaml.safe_load("a: 1e-3\nb: 24:00:00") == {"a": "1e-3", "b": 86400}


# Keys that are given twice


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("run: {dir: a}\noptimizer:\n  lr: 1\nmethod: full\noptimizer:\n  eps: 1", "optimizer", (5, 2)),
        ("relora:\n  reset:\n    kind: full\n    ratio: 1\n    'kind': none", "relora.reset.kind", (5, 3)),
        ("deepspeed: {zero_optimization: {stage: 1,\n stage: 2}}", "deepspeed.zero_optimization.stage", (2, 1)),
        ("lines:\n- {a: 1}\n- {a: 1, b: 2, b: 2}", "lines.1.b", (3, 3)),
        ("sec: {base: &a {<<: &b {x: 1},\n x: 2, x: 3}}\nother: {<<: *a}", "sec.base.x", (2, 2)),
    ],
)
def test_a_key_given_twice_is_refused_at_any_depth(text: str, key: str, lines: tuple[int, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.read_yaml(text, "r.yaml")
    assert str(caught.value).startswith(f"{key}='line {lines[0]} of r.yaml': is given twice: line {lines[1]} has it, too; ")


def test_a_key_given_twice_in_recipe_and_override(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "optimizer: {lr: 0.5}\n")
    assert refusal(recipe).startswith("optimizer='line ")
    recipe.write_text(recipe.read_text().replace("optimizer: {lr: 0.5}", ""))
    assert refusal(recipe, "relora={rank: 4, rank: 8}").startswith("rank='line 1 of relora': is given twice")


def test_merge_keys_and_anchors_still_work() -> None:
    """Also where a merge is filled in before the mapping that it comes from is built: a mapping's own keys win, and are no twins."""
    text = "sec: {base: &b {<<: &a {x: 1, y: 2}, x: 3}}\nother: {<<: [*b, *a], y: 4}\nsame: *b\ntwo: {<<: *a, z: 1, <<: {q: 5}}"
    read = config.read_yaml(text, "r.yaml")
    assert read["sec"]["base"] == read["same"] == {"x": 3, "y": 2}
    assert read["other"] == {"x": 3, "y": 4}
    assert read["two"] == {"x": 1, "y": 2, "z": 1, "q": 5}
    assert config.read_yaml("a: {x: 1}\nb: {x: 1}\n1: x\n'1': y", "r.yaml") == {"a": {"x": 1}, "b": {"x": 1}, 1: "x", "1": "y"}


@pytest.mark.parametrize("text", ['{"bf16": {}, "bf16": {}}', '{"zero_optimization": {"stage": 1, "stage": 2}}'])
def test_a_key_given_twice_in_deepspeeds_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=r"ds\.json': is not valid JSON: '(bf16|stage)' is given twice in one object"):
        ds_config.read(tmp_path / "ds.json")
