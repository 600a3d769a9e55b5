"""Rows are whole samples, none of which packs several sequences: transformers need not look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils, modeling_flash_attention_utils

LOOKS = ((masking_utils, "find_packed_sequence_indices"), (modeling_flash_attention_utils, "_is_packed_sequence"))
"""Where transformers looks, by the positions. The first does so once for each kind of mask, the second in each layer of
flash-attention 2 at a micro batch of one."""


@contextmanager
def none_packed() -> Iterator[None]:
    """While it lasts, transformers takes it that no row packs several sequences.

    Positions that a model makes itself count up from 0, so looking finds nothing. But to look, the host waits until the GPU has done
    all that it was given; and where there is nothing to look at, as in a rehearsal, masks are built in case.
    """
    before = [(module, name, getattr(module, name)) for module, name in LOOKS if hasattr(module, name)]
    for module, name, _ in before:
        setattr(module, name, _nothing)
    try:
        yield
    finally:
        for module, name, look in before:
            setattr(module, name, look)


def _nothing(*_: Any, **__: Any) -> None:
    """The same function every time: what torch.compile made for it stays valid."""
