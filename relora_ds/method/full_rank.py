"""PURE: which weights of a model can get no factors, whatever the targets, and so are trained at full rank, and their share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from relora_ds.method.targets import ROLES, in_role, obstacle

WORTH_SAYING = 0.1
"""Share of all parameters above which a run says it."""
MOST_NAMES = 3


@dataclass
class Kind:
    """Weights that can get no factors for one reason.

    Attributes:
        share: of all parameters of the model.
        names: of the weights, with ``*`` in the place of numbers.
    """

    share: float
    names: list[str]


def full_rank_share(model: nn.Module) -> dict[str, Kind]:
    """What can get no factors of what is trained, by kind, largest first.

    Vectors, embeddings and the output head do not count: they stay full-rank by choice.

    Args:
        model: not wrapped yet; with or without weights.
    """
    total = sum(param.numel() for param in model.parameters())
    served = {id(param) for module in model.modules() if _is_served(module, model) for param in module._parameters.values()}
    kinds: dict[str, Kind] = {}
    for name, param, module in _trained_matrices(model):
        if id(param) in served:
            continue
        kind = kinds.setdefault(_kind(param, module), Kind(0.0, []))
        kind.share += param.numel() / total
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
        if pattern not in kind.names:
            kind.names.append(pattern)
    return dict(sorted(kinds.items(), key=lambda item: -item[1].share))


def full_rank_line(model: nn.Module) -> str | None:
    """:func:`full_rank_share` in one line; None where it is too little to say."""
    kinds = full_rank_share(model)
    share = sum(kind.share for kind in kinds.values())
    if share <= WORTH_SAYING:
        return None
    parts = [f"{name} ({_listed(kind.names)})" for name, kind in kinds.items() if kind.share >= 0.01]
    return f"{share:.0%} of the parameters can get no factors and stay full-rank: {'; '.join(parts)}"


def _is_served(module: nn.Module, model: nn.Module) -> bool:
    """Whether the module can be wrapped, or is an embedding or the head."""
    if isinstance(module, nn.Embedding) or any(module is in_role(model, role) for role in ROLES):
        return True
    return isinstance(module, (nn.Linear, Conv1D)) and not obstacle(module)


def _trained_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Trained parameters of two dimensions or more, each once, by their first name, and the modules that hold them."""
    modules = dict(model.named_modules())
    for name, param in model.named_parameters():
        if param.requires_grad and param.dim() > 1:
            yield name, param, modules[name.rpartition(".")[0]]


def _kind(param: nn.Parameter, module: nn.Module) -> str:
    if isinstance(module, _ConvNd):
        return "convolutions"
    if isinstance(module, (nn.Linear, Conv1D)):
        return f"weights of {type(module).__name__}, which is no plain linear layer"
    return "matrices outside linear layers" if param.dim() == 2 else f"{param.dim()}-D parameters"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
