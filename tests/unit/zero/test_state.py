"""The proxy around DeepSpeed's optimizer, and the refusal of an inside that is not the known one."""

from __future__ import annotations

import pytest

from relora_ds.errors import ConfigError
from relora_ds.zero.state import ZeroProxy, check_internals


class Inner:
    """Stands for DeepSpeed's optimizer where only attribute access matters."""

    def __init__(self) -> None:
        self.value = 1

    def double(self) -> int:
        return 2 * self.value

    def step(self) -> str:
        return "inner"


class Outer(ZeroProxy):
    OWN = ZeroProxy.OWN | {"mine"}

    def step(self) -> str:
        return f"outer {self.zero.step()}"


def test_reads_and_writes_reach_the_wrapped_one() -> None:
    inner = Inner()
    outer = Outer(inner)  # type: ignore[arg-type]
    outer.value = 5
    assert inner.value == 5 and outer.double() == 10
    assert outer.step() == "outer inner"
    outer.mine = 7
    assert outer.mine == 7 and not hasattr(inner, "mine")
    with pytest.raises(AttributeError):
        _ = outer.missing


def test_isinstance_answers_as_the_wrapped_one() -> None:
    outer = Outer(Inner())  # type: ignore[arg-type]
    assert isinstance(outer, Inner) and isinstance(outer, Outer) and isinstance(outer, ZeroProxy)


def test_another_optimizer_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"the engine's optimizer is Inner, .*; install deepspeed==") as error:
        check_internals(Inner())
    assert "\n" not in str(error.value)
