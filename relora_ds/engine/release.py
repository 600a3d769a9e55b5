"""The end of a DeepSpeed engine: nothing that it held stays, and its module can go on in another engine.

``engine.destroy()`` alone leaves three things behind. Two hooks on the module refer to the engine, so everything in it (masters,
moments, flat weights, buckets) lives as long as the module does. ``__del__`` destroys a second time, whenever Python comes to it:
by then the module's parameters may belong to another engine, which would lose its masters' addresses. And methods that are bound to
each parameter make a cycle of it, so that a weight which another form has replaced stays in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch

HOOKS = ("module_forward_pre_hook", "module_forward_post_hook", "first_dataloader_check")
"""Attributes of an engine that hold its hooks on the module, in the versions that have them."""


def release(engine: Any, keep_on: torch.device | str | None = None) -> None:
    """Ends an engine and gives all its memory back; the engine must not be used again.

    Its module stays as it is, with its parameters in memory of their own and without gradients. Masters and moments are dropped
    first, so beside the weights themselves nothing is needed on the device when they move to the host. What only cycles hold, the
    empty shell among them, goes with the next :func:`collect`.

    Args:
        engine: DeepSpeed's, with any optimizer.
        keep_on: where the parameters wait for what becomes of them; None: on the device where they are.
    """
    module = engine.module
    for name in HOOKS:
        hook = vars(engine).get(name)
        if hook is not None:
            hook.remove()
    engine.destroy()
    for part in list(_optimizers(engine)):
        _empty(part)
    vars(engine).clear()
    engine.destroy = lambda: None  # what __del__ calls
    with torch.no_grad():
        for param in module.parameters():
            param.grad = None
            _untie(param)
            param.data = param.data.to(param.device if keep_on is None else keep_on, copy=True)


def collect() -> None:
    """Gives back what only cycles still hold, on the host and on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _untie(param: torch.nn.Parameter) -> None:
    """Drops the methods that DeepSpeed bound to a parameter: a cycle, in which it would outlive its module until a collection."""
    for name, value in list(vars(param).items()):
        if getattr(value, "__self__", None) is param:
            delattr(param, name)


def _optimizers(engine: Any) -> Iterator[Any]:
    """The engine's optimizer, and what it wraps, and so on."""
    optimizer = engine.optimizer
    while optimizer is not None:
        yield optimizer
        optimizer = vars(optimizer).get("zero", vars(optimizer).get("optimizer"))


def _empty(optimizer: Any) -> None:
    """Drops all that an optimizer refers to."""
    if isinstance(optimizer, torch.optim.Optimizer):  # it may be the user's, who still refers to it: no state, no parameters
        optimizer.state.clear()
        optimizer.param_groups.clear()
    else:
        vars(optimizer).clear()
