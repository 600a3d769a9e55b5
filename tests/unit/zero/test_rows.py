"""Rows in bytes: what is exact, what 8 bits lose, and that nothing is lost for good."""

from __future__ import annotations

import pytest
import torch

from relora_ds.zero.rows import BLOCK, decode, encode, quantise_, row_bytes


def numbers(rows: int, width: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width))


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16])
def test_floating_rows_come_back_as_they_were(wire: torch.dtype) -> None:
    values = numbers(5, 7).to(wire)
    coded = encode(values, wire)
    assert coded.shape == (5, row_bytes(7, wire))
    assert torch.equal(decode(coded, 7, wire), values.float())


@pytest.mark.parametrize("width", [1, 20, BLOCK, BLOCK + 1, 2 * BLOCK + 30])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e20])
def test_what_8_bits_say_and_what_they_lose_is_the_whole(width: int, scale: float) -> None:
    """Half a step of 1/127 of the block's largest entry at most, and a little where the scale's 8 bits were rounded down."""
    values = numbers(6, width, scale)
    lost = values.clone()
    coded = quantise_(lost)
    assert coded.shape == (6, row_bytes(width, torch.int8)) == (6, width + 2 * -(-width // BLOCK))
    said = decode(coded, width, torch.int8)
    torch.testing.assert_close(said + lost, values, rtol=0, atol=1e-6 * scale)
    for block, rest in zip(values.split(BLOCK, 1), lost.split(BLOCK, 1), strict=True):
        assert (rest.abs() <= block.abs().amax(1, keepdim=True) * (0.51 / 127 + 2**-8)).all()


def test_rows_of_zeros_and_of_almost_nothing_are_zeros() -> None:
    values = torch.zeros(3, 10)
    values[1] = 1e-39
    lost = values.clone()
    assert not decode(quantise_(lost), 10, torch.int8).any()
    assert torch.equal(lost, values), "and what was not sent is kept"


@pytest.mark.parametrize("with_feedback", [True, False])
def test_what_is_sent_adds_up_to_the_truth_only_with_feedback(with_feedback: bool) -> None:
    """A small gradient beside a large one is rounded away every time, unless what was lost comes along the next time."""
    truth = torch.tensor([[1.0, 0.003, -0.0021, 0.0]])
    sent, rest, updates = torch.zeros(1, 4), torch.zeros(1, 4), 400
    for _ in range(updates):
        rest = truth + rest if with_feedback else truth.clone()
        sent += decode(quantise_(rest), 4, torch.int8)
    errors = (sent - updates * truth).abs().flatten().tolist()
    if with_feedback:
        assert max(errors) <= 1 / 127, "one rounding in all, however many updates"
    else:
        assert errors[1] == pytest.approx(updates * 0.003, rel=1e-5), "nothing of it ever arrived"
