"""The line of the log that says whether the form of the linear layers is the faster one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from relora_ds.method import lora
from relora_ds.method.linear import Kept
from relora_ds.training import linear_form


def model(**how: object) -> nn.Module:
    made = nn.ModuleDict({"small": nn.Linear(8, 8), "large": nn.Linear(16, 40), "out": nn.Linear(8, 8)})
    lora.wrap(made, rank=2, alpha=4.0, targets=["small", "large"], **how)  # type: ignore[arg-type]
    return made


def test_it_names_the_largest_layer_and_the_faster_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_form, "_seconds", lambda layer, form, tokens: 3.0 if form == "split" else 1.5)
    said = linear_form.form_line(model(linear="merged"), 64)
    assert said == "2 of 2 linear layers multiply merged; the largest, 40 x 16, takes 0.50 of split's time so"
    said = linear_form.form_line(model(linear="split"), 64)
    assert said is not None and said.startswith("0 of 2 ") and said.endswith("relora.linear=merged may be faster here")


@pytest.mark.parametrize("how", [{"dropout": 0.1}, {"trainable_scaling": True}])
def test_nothing_is_said_where_there_is_no_choice(how: dict[str, object]) -> None:
    made = model(**how).train()
    assert linear_form.form_line(made, 64) is None
    assert linear_form.form_line(model().to(torch.bfloat16), 64) is None


def test_a_measurement_leaves_the_layer_as_it_was() -> None:
    made = model(linear="split")
    made["large"].kept = Kept(2)  # type: ignore[index, union-attr]
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert linear_form.form_line(made, 64) is not None
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    assert all(param.grad is None for param in made.parameters())
    assert {made[name].form for name in ("small", "large")} == {"split"}  # type: ignore[union-attr]
    assert made["large"].kept._whole is None, "no copy of the layer stays behind"  # type: ignore[index, union-attr]


def test_a_setting_that_does_nothing_is_told() -> None:
    assert linear_form.kept_line(model(linear="merged"), 64, is_compiled=False) == ""
    assert "no linear layer multiplies merged" in linear_form.kept_line(model(linear="split"), 64, is_compiled=False)
    assert "compiled blocks keep nothing" in linear_form.kept_line(model(linear="merged"), 64, is_compiled=True)
