"""What rounding to 16 bits took from an fp32 master, as a 16-bit integer beside the rounded copy. Pure: knows of no ranks.

Read as integers, floats of one sign that are neighbours have neighbouring bit patterns (IEEE 754), across exponents, too: rounding to
bf16 moves a pattern by at most 2**15, so copy and difference together are the master, exactly. Where the difference does not fit
(a tie, which lies 2**15 from its copy, an fp16 copy of less than about 2**-17, a NaN) it is :data:`MARK`, and the entry has to travel
whole. So nothing depends on how the copy was rounded, or on whether it is a rounding at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

MARK = -(1 << 15)


def bits(values: Tensor) -> Tensor:
    """The bit patterns of ``values``, of any floating dtype, widened to float32: int32, of the same shape."""
    return values.to(torch.float32).view(torch.int32)


def differences(master: Tensor, copy: Tensor) -> Tensor:
    """Bit pattern of the master minus that of its copy.

    Args:
        master: (n,) float32.
        copy: (n,) of any floating dtype.

    Returns:
        (n,) int16: ``bits(copy) + difference == bits(master)`` but for those that are :data:`MARK`.
    """
    exact = bits(master) - bits(copy)  # modulo 2**32, as the sum that undoes it
    return exact.masked_fill_((exact <= MARK) | (exact >= -MARK), MARK).to(torch.int16)


def num_far(master: Tensor, copy: Tensor) -> int:
    """Entries that the copy does not bring within 16 bits of the master, or, if it is fp32, does not equal. Both (n,)."""
    if copy.dtype == torch.float32:
        return int((bits(master) != bits(copy)).sum())
    return int((differences(master, copy) == MARK).sum())
