"""Whether the form that linear layers multiply in is the faster one on this machine: one measurement, for the log."""

from __future__ import annotations

import time

import torch
from torch import nn

from relora_ds.method.linear import Form, Kept
from relora_ds.method.lora import ReLoRALinear, relora_layers

FORMS: tuple[Form, Form] = ("split", "merged")
ROUNDS = 3
"""Passes of each form; the fastest counts."""


def form_line(model: nn.Module, tokens: int) -> str | None:
    """What a pass of the largest wrapped layer takes in either form, and which the layers take; None where there is no choice.

    The choice is the settings', by operations and bytes (:func:`relora_ds.method.linear.choose`), and the same on every machine: a
    run that is resumed elsewhere keeps its bits. This only says whether it was right here.

    Args:
        model: with its factors.
        tokens: of a micro batch.
    """
    layers = [layer for _, layer in relora_layers(model) if isinstance(layer, ReLoRALinear)]
    free = [x for x in layers if x.lora_A.dtype == torch.float32 and {x.form_for(tokens, form) for form in FORMS} == set(FORMS)]
    if not free:
        return None
    largest = max(free, key=lambda layer: layer.in_features * layer.out_features)
    num_merged = sum(layer.form_for(tokens) == "merged" for layer in layers)
    ratio = _seconds(largest, "merged", tokens) / _seconds(largest, "split", tokens)
    faster: Form = "merged" if ratio < 1 else "split"
    said = (
        f"{num_merged} of {len(layers)} linear layers multiply merged; the largest, {largest.out_features} x {largest.in_features}, "
        f"takes {ratio:.2f} of split's time so"
    )
    return said if largest.form_for(tokens) == faster else f"{said}: relora.linear={faster} may be faster here"


def kept_line(model: nn.Module, tokens: int, *, is_compiled: bool) -> str:
    """Why nothing is kept although ``relora.keep_merged: true`` asks for it; empty where something is."""
    layers = [layer for _, layer in relora_layers(model) if isinstance(layer, ReLoRALinear)]
    if not is_compiled and any(layer.form_for(tokens) == "merged" for layer in layers):
        return ""
    why = "compiled blocks keep nothing" if is_compiled else "no linear layer multiplies merged"
    return f"relora.keep_merged=true does nothing here: {why}"


def _seconds(layer: ReLoRALinear, form: Form, tokens: int) -> float:
    """Of a forward and a backward pass; no gradient of the layer is touched."""
    device, form_before, kept = layer.lora_A.device, layer.form, layer.kept
    x = torch.randn(
        tokens, layer.in_features, device=device, generator=torch.Generator(device).manual_seed(0), requires_grad=True
    )
    learned, taken = [x, layer.lora_A, layer.lora_B], []
    layer.form, layer.kept = form, Kept(kept.passes)  # what is kept for the measurement goes with it
    try:
        for _ in range(ROUNDS):
            started = _now(device)
            y = layer(x)
            torch.autograd.grad(y, learned, y.detach())
            taken.append(_now(device) - started)
    finally:
        layer.form, layer.kept = form_before, kept
    return min(taken)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
