"""Which layers get factors: what ``relora.targets`` names, and why a layer cannot have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from relora_ds.errors import ConfigError, nearest
from relora_ds.method.owners import multiplies_itself

ALL_LINEAR = "all-linear"
ROLES = {"output-head": "get_output_embeddings", "input-embedding": "get_input_embeddings"}
"""Targets that mean a layer by what it is for, whatever the architecture calls it, and transformers' way to ask for it."""
Target: TypeAlias = nn.Linear | Conv1D | nn.Embedding


def find_targets(model: nn.Module, targets: str | Sequence[str]) -> dict[str, Target]:
    """The layers that ``targets`` names, by their first name in ``model``.

    ``"all-linear"`` is every linear layer but the output head, ``"output-head"`` and ``"input-embedding"`` are what the model gives
    as such. Other targets name layers by dotted parts of their path: ``q_proj``, ``mlp``, ``layers.0.self_attn.k_proj``; an embedding
    by the end of its path, so that a part that holds one (``model``, ``transformer``) means its linear layers alone. A list is the
    union of what its entries name.

    Layers whose weight is frozen (``requires_grad=False``) stay so: ``"all-linear"`` and parts of paths pass over them.
    ``"all-linear"`` also passes over linear layers that factors cannot stand for (see :func:`obstacle`).

    Raises:
        ConfigError: a target matches no layer, or none but frozen ones, or is the full path of a frozen one; or a layer cannot be
            merged into because it shares its weight with another module, or factors cannot stand for it.
    """
    names = [targets] if isinstance(targets, str) else list(targets)
    if not names:
        raise ConfigError("relora.targets", targets, "names no layer", f"write {ALL_LINEAR}, or the layers' names")
    layers: dict[str, Target] = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D, nn.Embedding))}
    chosen: dict[str, Target] = {}
    for target in names:
        chosen.update(_served(target, _named_by(target, model, layers), model))
    _refuse_shared_weights(model, chosen)
    for name, module in chosen.items():
        if found := obstacle(module, _owner(name, model)):
            raise ConfigError("relora.targets", name, *found)
    return chosen


def _named_by(target: str, model: nn.Module, layers: dict[str, Target]) -> dict[str, Target]:
    """What one target names of the layers of ``model``; raises ConfigError where it is none."""
    linears = {name: module for name, module in layers.items() if not isinstance(module, nn.Embedding)}
    if target == ALL_LINEAR:
        head = in_role(model, "output-head")
        matched = {name: module for name, module in linears.items() if module is not head}
        problem, way_out = "the model has no linear layer besides its output head", ""
    elif target in ROLES:
        wanted = in_role(model, target)
        matched = {name: module for name, module in layers.items() if module is wanted}
        problem, way_out = "the model tells of none that is a linear layer or an embedding", "name the layer by its path"
    else:
        matched = {name: module for name, module in linears.items() if f".{target}." in f".{name}."}
        embeddings = {name: module for name, module in layers.items() if name not in linears}
        matched |= {name: module for name, module in embeddings.items() if f".{name}".endswith(f".{target}")}
        parts = {part for name in layers for part in name.split(".") if not part.isdigit()}
        problem, way_out = "matches no linear layer or embedding of the model", nearest(target, {*parts, ALL_LINEAR, *ROLES})
    if not matched:
        raise ConfigError("relora.targets", target, problem, way_out)
    return matched


def _served(target: str, matched: dict[str, Target], model: nn.Module) -> dict[str, Target]:
    """What is left of the layers that ``target`` names: not the frozen ones, and for ``"all-linear"`` only those that can be wrapped.

    Raises:
        ConfigError: nothing is left, or ``target`` is the full path of a frozen layer.
    """
    kept = {name: module for name, module in matched.items() if module.weight.requires_grad}
    if target == ALL_LINEAR:
        kept = {name: module for name, module in kept.items() if not obstacle(module, _owner(name, model))}
    if kept and (target in kept or target not in matched):
        return kept
    name = target if target in matched else next(iter(matched))
    if found := obstacle(matched[name], _owner(name, model)):
        raise ConfigError("relora.targets", name, *found)
    layer = f"layer {name!r} is" if len(matched) == 1 or name == target else f"all its layers ({name!r}, ...) are"
    problem = f"{layer} frozen (requires_grad=False), and what is frozen stays as it is"
    raise ConfigError("relora.targets", target, problem, "call requires_grad_(True) on what is to be trained, or leave it out")


def _owner(name: str, model: nn.Module) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def in_role(model: nn.Module, role: str) -> nn.Module | None:
    """The module that ``model`` gives for one of :data:`ROLES`; None where it knows of none."""
    with suppress(NotImplementedError):  # what transformers raises for a model that it cannot tell for
        return getattr(model, ROLES[role])() if hasattr(model, ROLES[role]) else None
    return None


def _refuse_shared_weights(model: nn.Module, chosen: Mapping[str, Target]) -> None:
    """Two modules with one weight cannot both be corrected and merged: a merge of one would change the other."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owner = owners.setdefault(id(weight), name)
            if owner != name and (owner in chosen or name in chosen):
                target, other = (owner, name) if owner in chosen else (name, owner)
                raise ConfigError(
                    "relora.targets", target, f"shares its weight with {other!r} and cannot be merged into", "leave it out"
                )


def obstacle(module: Target, owner: nn.Module | None = None) -> tuple[str, str] | None:
    """Why factors cannot stand for this layer, and what to do about it; None where they can.

    W x or W[ids] is all that they can: not a scaled or shifted row, nor a forward pass that reads more than weight and bias, nor
    an ``owner`` that reads the weight itself.
    """
    kind, leave_out = type(module).__name__, "leave it out"
    if "forward" in vars(module):
        return f"is a {kind} whose forward pass was put in the place of its own", "take that back, or leave it out"
    if "weight" not in module._parameters:
        return f"is a {kind} whose weight is computed from others", "leave it out, or make it a parameter of its own"
    if not module.weight.is_floating_point() or module.weight.itemsize < 2:
        return f"its weight is kept in {module.weight.dtype}", "load the model without quantisation, or leave it out"
    if owner is not None and multiplies_itself(owner, module):
        return f"the {type(owner).__name__} that holds it multiplies by its weight itself", leave_out
    if not isinstance(module, nn.Embedding):
        return None if _is_plain(module) else (f"is a {kind}, which does more than multiply by its weight", leave_out)
    if type(module).forward is not nn.Embedding.forward:
        return f"is a {kind}, which does more than look rows up", leave_out
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if value := getattr(module, option):
            return f"is an embedding with {option}={value}, which its factors cannot keep to", "leave it out, or build it without"
    return None


def _is_plain(module: nn.Linear | Conv1D) -> bool:
    """Whether the forward pass is x Wᵀ + b. One that a subclass wrote is tried on a small weight in the place of its own."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if isinstance(module, Conv1D):
        return False
    small = nn.utils.skip_init(nn.Linear, 3, 2, bias=module.bias is not None, device="cpu")  # draws no random numbers
    for param in small.parameters():
        param.data = torch.arange(1.0, param.numel() + 1, device="cpu").view(param.shape)
    x = torch.ones(1, 3, device="cpu")
    expected = small(x)
    small.__dict__ = {**module.__dict__, **small.__dict__}
    small.__class__ = type(module)
    try:
        return torch.allclose(type(module).forward(small, x), expected)  # small integers: exact
    except Exception:  # it reads what only the layer itself has, or returns something else
        return False


def check_rank(layers: Mapping[str, Target], rank: int) -> None:
    """Raises ConfigError when ``rank`` exceeds the smaller side of a layer: the factors would be larger than the layer needs."""
    name, module = min(layers.items(), key=lambda item: min(item[1].weight.shape))
    limit = min(module.weight.shape)
    if rank > limit:
        problem = f"larger than layer {name!r} of {tuple(module.weight.shape)}"
        raise ConfigError("relora.rank", rank, problem, f"use at most {limit}, or name only wider layers in relora.targets")
