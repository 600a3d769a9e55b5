"""Tests of fp16 engines: DeepSpeed makes none on a CPU without fp16 instructions, though torch computes in fp16 on any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
from deepspeed.accelerator import get_accelerator

needs_fp16 = pytest.mark.skipif(
    not get_accelerator().is_fp16_supported(),
    reason="no fp16 arithmetic on this CPU (torch.ops.mkldnn._is_mkldnn_fp16_supported): DeepSpeed makes no fp16 engine",
)
"""For tests of everything about fp16; what they guard is also held, more briefly, by those that are :func:`overruled`."""


@contextmanager
def overruled() -> Iterator[None]:
    """DeepSpeed makes fp16 engines here; the products are torch's own, slow where the CPU has no instructions for them."""
    with mock.patch.object(get_accelerator(), "is_fp16_supported", lambda: True):
        yield
