"""Whether a model's weights are numbers: a weight that is NaN or infinite never recovers, and no checkpoint may call it whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from relora_ds.method.frozen_weights import stored_tensors
from relora_ds.method.lora import relora_layers


def not_finite(model: nn.Module) -> str | None:
    """The first weight of ``model`` with an entry that is NaN or infinite, trained or frozen; None where all are finite.

    Other buffers are left out: a mask may hold infinities. Extrema pass NaN on and need no copy, and the device is waited for once.
    """
    names, extrema = [], []
    for name, tensor in _weights(model):
        if tensor.is_floating_point() and tensor.numel():
            names.append(name)
            extrema.append(torch.stack(torch.aminmax(tensor.detach())).to(torch.float32))
    are_finite = torch.stack(extrema).isfinite().all(dim=1).tolist() if extrema else []
    return next((name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite), None)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, layer in relora_layers(model):
        yield from stored_tensors(name, layer.weight)
