"""Masters from their rounded copies and 16 bits: every low half at the places where rounding is awkward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relora_ds.zero.rounding import MARK, bits, differences, num_far

HIGH_HALVES = {
    "zero and the smallest subnormals": 0x0000,
    "an odd subnormal": 0x0001,
    "up into the normal numbers": 0x007F,
    "an even one": 0x3F80,
    "an odd one": 0x3F81,
    "up to the next exponent": 0x3FFF,
    "up to infinity": 0x7F7F,
    "infinity and NaN": 0x7F80,
    "NaN": 0x7FFF,
}


def all_low_halves(high: int, sign: int) -> Tensor:
    """The 65,536 floats whose pattern begins with these 16 bits."""
    pattern = torch.arange(1 << 16) + (high << 16)
    return (pattern - sign * (1 << 31)).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("high", HIGH_HALVES.values(), ids=HIGH_HALVES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_copy_and_difference_are_the_master(dtype: torch.dtype, high: int, sign: int) -> None:
    master = all_low_halves(high, sign)
    copy = master.to(dtype)
    lacking = differences(master, copy)
    fits = lacking != MARK
    restored = bits(copy) + lacking
    assert torch.equal(restored[fits], bits(master)[fits])
    assert num_far(master, copy) == int((~fits).sum())
    if dtype == torch.bfloat16 and high < 0x7F80:
        assert (~fits).nonzero().flatten().tolist() == [0x8000], "the tie alone"


def test_fp16_is_near_down_to_its_coarsest() -> None:
    values = torch.cat([torch.linspace(start, 2 * start, 1001) for start in (2.0**-17, 2.0**-15, 2.0**-14, 0.01, 1.0)])
    assert num_far(values, values.to(torch.float16)) == 0
    assert num_far(-values, -values.to(torch.float16)) == 0
    tiny = torch.full((10,), 1e-8)
    assert num_far(tiny, tiny.to(torch.float16)) == 10


def test_a_copy_that_is_none_is_far() -> None:
    master = torch.linspace(-1, 1, 101)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        copy = master.to(dtype, copy=True)
        copy[:7] += 1
        assert num_far(master, copy) - num_far(master, master.to(dtype)) == 7
