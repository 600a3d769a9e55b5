"""A sweep's file: what it makes of a recipe, and how it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from relora_ds.config import load
from relora_ds.errors import ConfigError
from relora_ds.sweeps.sweep_file import Sweep, as_text, flat, read_sweep

Read = Callable[..., Sweep]


def test_arms_by_seeds(sweep: Sweep, recipe: Path, tmp_path: Path) -> None:
    assert [run.name for run in sweep.runs] == ["lora/seed-1", "relora/seed-1", "lora/seed-2", "relora/seed-2"]
    first, *_, last = sweep.runs
    assert (first.config.method, first.config.run.seed, first.config.wandb.mode) == ("lora", 1, "disabled")
    assert (last.config.method, last.config.run.seed) == ("relora", 2)
    assert last.folder.path == tmp_path / "sweep" / "relora" / "seed-2"
    assert last.config.wandb.name == "sweep/relora/seed-2", "not all runs seed-2"
    assert load(recipe, last.words) == last.config, "a user may type them"


def test_settings_dotted_or_as_sections(read: Read) -> None:
    dotted = {"relora.rank": 2, "relora.reset.kind": "full", "optimizer.betas": [0.9, 0.95]}
    nested = {"relora": {"rank": 2, "reset": {"kind": "full"}}, "optimizer": {"betas": [0.9, 0.95]}}
    first, second, *_ = read(arms={"dotted": dotted, "nested": nested}).runs
    assert first.config.relora == second.config.relora and first.config.relora.rank == 2
    assert first.config.relora.restart_every == 8, "what an arm does not name is the recipe's"
    assert first.config.optimizer == second.config.optimizer and first.config.optimizer.betas == [0.9, 0.95]


def test_an_arm_stands_over_what_all_replace(read: Read) -> None:
    found = read(overrides={"relora.rank": 2, "train": {"updates": 30}}, arms={"a": {"relora": {"rank": 3}}, "b": {}})
    assert [(run.config.relora.rank, run.config.total_updates) for run in found.runs[:2]] == [(3, 30), (2, 30)]


def test_numbers_may_be_names(read: Read) -> None:
    assert read(arms={2: {"relora.rank": 2}, 4: {"relora.rank": 4}}).arms == ["2", "4"]


def test_what_is_no_section_is_a_value() -> None:
    settings = {"model": {"config": {"model_type": "gpt2"}, "preset": None}, "deepspeed": {"bf16": {"enabled": True}}}
    assert dict(flat(settings)) == {
        "model.config": {"model_type": "gpt2"},
        "model.preset": None,
        "deepspeed": {"bf16": {"enabled": True}},
    }


@pytest.mark.parametrize(
    "value", ["lora", "null", "1e-3", "24:00", " x", "", "a#b", "é", 1e-08, 0.002, 3, True, None, [1, "a"], {"a": {"b": None}}]
)
def test_values_read_back_as_they_were(value: Any, recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text()) | {"deepspeed": {"x": "replaced"}}
    recipe.write_text(yaml.safe_dump(content))
    assert load(recipe, [f"deepspeed.x={as_text(value)}"]).deepspeed == {"x": value}


def test_the_recipe_is_looked_for_beside_the_file_and_one_folder_up(recipe: Path, content: dict[str, Any]) -> None:
    for folder in (recipe.parent, recipe.parent / "sweeps"):
        folder.mkdir(exist_ok=True)
        (folder / "s.yaml").write_text(yaml.safe_dump({**content, "recipe": recipe.name}))
        assert read_sweep(folder / "s.yaml").recipes[0].samefile(recipe)


def test_several_recipes_have_all_arms(read: Read, recipe: Path, tmp_path: Path) -> None:
    larger = recipe.with_name("larger.yaml")
    larger.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"method": "full"}))
    found = read(recipe=[str(recipe), str(larger)], seeds=[1], arms={"a": {}, "b": {"train.updates": 17}})
    assert found.recipes == [recipe, larger]
    assert found.arms == [f"{recipe.stem}/a", f"{recipe.stem}/b", "larger/a", "larger/b"]
    assert [run.config.method for run in found.of("larger/b")] == ["full"]
    assert found.of("larger/b")[0].config.total_updates == 17
    assert found.of("larger/a")[0].folder.path == found.folder / "larger" / "a" / "seed-1"
    assert found.of("larger/a")[0].config.wandb.name == f"{found.folder.name}/larger/a/seed-1"
    with pytest.raises(ConfigError, match=r"^recipe=.* is named as another thing in the sweep's folder"):
        read(recipe=[str(recipe), str(recipe)])
    above = recipe.with_name("...yaml")  # whose name without the ending is ".."
    above.write_text(larger.read_text())
    with pytest.raises(ConfigError, match=r"^recipe=.* rename the file"):
        read(recipe=[str(above)])
    with pytest.raises(ConfigError, match=r"^arms\.larger/a: relora\.rank='x'"):
        read(recipe=[str(larger)], arms={"a": {"relora.rank": "x"}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"lora": {"relora.rnak": 8}}}, "arms.lora: relora.rnak=8: unknown key; did you mean 'rank'?"),
        ({"arms": {"lora": {"relora": {"rank": "x"}}}}, "arms.lora: relora.rank='x': input should be a valid integer"),
        ({"arms": {"a": {}, "lora": {"method": "lroa"}}}, "arms.lora: method='lroa': not one of the valid names; did you mean"),
        ({"arms": {"lora": {"relora.warm_start": 20}}}, "arms.lora: relora.warm_start=20: not shorter than the run of 20"),
        ({"arms": {"lora": {"run.seed": 3}}}, "arms.lora='run.seed': is decided by the sweep; leave it out"),
        ({"arms": {"a": {"relora.rank": 4, "relora": {"rank": 8}}}}, "arms.a='relora.rank': is given twice, dotted and in its"),
        ({"overrides": {"run": {"dir": "x"}}}, "overrides='run.dir': is decided by the sweep"),
        ({"arms": {"lora": 5}}, "arms.lora=5: must be a section"),
        ({"arms": {"../x": {}}}, "arms='../x': is no name for a folder"),
        (
            {"arms": {True: {}}},
            "arms=True: is what YAML makes of a name such as yes, on or null: a bool, no text; write the name in",
        ),
        ({"arms": {None: {}}}, "arms=None: is what YAML makes of a name such as yes, on or null"),
        ({"arms": {"plots": {}}}, "arms='plots': is the name of another thing"),
        ({"arms": {8: {"relora.rank": 8}, "8": {"relora.rank": 4}}}, "arms='8': is the name of two arms; give each its own"),
        ({"arms": {"report.html": {}}}, "arms='report.html': is the name of another thing"),
        ({"arms": {}}, "arms={}: dictionary should have at least 1 item"),
        ({"arms": None}, "arms=None: must be a section with keys of its own"),
        ({"seeds": []}, "seeds=[]: list should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: names 1 twice"),
        ({"seeds": [-1]}, "seeds=-1: input should be greater than or equal to 0"),
        ({"nproc": 0}, "nproc=0: input should be greater than 0"),
        ({"sedes": [1]}, "sedes=[1]: unknown key; did you mean 'seeds'?"),
        ({"recipe": "nowhere.yaml"}, "recipe='nowhere.yaml': no such file"),
        ({"dir": ""}, "dir='': is empty"),
    ],
)
def test_a_fault_is_one_line_that_names_arm_and_key(read: Read, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        read(**changes)
    assert str(found.value).startswith(message), str(found.value)


def test_what_is_no_sweep(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="is no sweep"):
        read_sweep(path)
    for first, second in (("a", "a"), ("8", "0x8"), ("yes", "on"), ("0.5", ".5")):
        path.write_text(f"arms:\n  {first}: {{x: 1}}\n  {second}: {{x: 2}}\n")
        with pytest.raises(ConfigError, match=rf"arms\.{second}='line 3 of .*is given twice: line 2 has it, too"):
            read_sweep(path)
