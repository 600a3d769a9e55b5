"""LoRA factors on linear layers and embeddings: W + s·B·A in the place of W, with W frozen, A (r × in), B (out × r), s = alpha / r.

Hu et al., arXiv 2106.09685; restarted as in Lialin et al., arXiv 2307.05695. Nothing here knows of ranks or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora_ds.config import Frozen, LinearForm
from relora_ds.errors import ConfigError, nearest
from relora_ds.method import exact
from relora_ds.method.frozen_weights import FLOATS, Change, FrozenWeight, own_rows, pieces
from relora_ds.method.linear import Form, Kept, Merged, Split, choose
from relora_ds.method.owners import multiplies_itself
from relora_ds.method.reinit import InitName, initial_A, initial_B

ALL_LINEAR = "all-linear"
ROLES = {"output-head": "get_output_embeddings", "input-embedding": "get_input_embeddings"}
"""Targets that mean a layer by what it is for, whatever the architecture calls it, and transformers' way to ask for it."""
HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
"""Where torch keeps what a user hung on a module's forward and backward pass."""
LORA_GROUP = "lora"
DENSE_GROUP = "dense"
NO_DECAY_GROUP = "no_decay"
Target: TypeAlias = nn.Linear | Conv1D | nn.Embedding
DTYPE_NAMES = {dtype: name for name, dtype in FLOATS.items()}


class ReLoRALayer(nn.Module):
    """A layer whose weight is frozen and corrected by trainable low-rank factors: all but the forward pass, which is a subclass's.

    The weight is kept (out, in), in a :class:`~relora_ds.method.frozen_weights.FrozenWeight`. An embedding's is (vocabulary,
    hidden), so its rows are "out" and what it gives is "in": merges, shards and stores by rows mean the same for both. Until
    :meth:`reset` is called the factors are undefined.

    Args:
        base: the layer to wrap; its weight goes into the store, its bias is taken over and stays trainable.
        rank, alpha: of the factors; they are scaled by alpha / rank.
        frozen: how the weight is stored; None for its own dtype. With ``dtype: none`` the factors stand alone.
        shard: (rank, world size) when a sharded master is to start from the weight as it is here, before it is rounded.
        trainable_scaling: scale by tanh of a trainable number, from 1, and not by alpha / rank.

    Attributes:
        weight: the stored weight, or None. bias: of the layer, or None.
        lora_A: (rank, in). lora_B: (out, rank), both in the dtype of the wrapped weight. scaling: alpha / rank.
        lora_scaling: (1,), or None.
        is_conv1d: whether ``base`` had its weight (in, out).
        replaces: ``id`` of the parameter that the factors stand for.
    """

    def __init__(
        self,
        base: Target,
        rank: int,
        alpha: float,
        frozen: Frozen | None = None,
        shard: tuple[int, int] | None = None,
        trainable_scaling: bool = False,
    ) -> None:
        super().__init__()
        frozen = frozen or Frozen()
        self.is_conv1d = isinstance(base, Conv1D)
        weight = base.weight.detach().t() if self.is_conv1d else base.weight.detach()
        self.out_features, self.in_features = weight.shape
        self.replaces = id(base.weight)
        base.weight.requires_grad_(False)  # where it stands in an optimizer's groups, it is no longer to be trained
        stored = DTYPE_NAMES[weight.dtype] if frozen.dtype == "auto" else frozen.dtype
        exact_rows = own_rows(weight.shape[0], *shard) if shard else None
        self.weight = None if stored == "none" else FrozenWeight(weight, stored, frozen.group_size, exact_rows)
        self.bias = getattr(base, "bias", None)
        self.rank = rank
        self.scaling = alpha / rank
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **like))
        self.lora_scaling = nn.Parameter(torch.ones(1, **like)) if trainable_scaling else None
        if self.weight is not None:
            self.weight.beside = (self.lora_A,)

    def scale(self, lora_scaling: Tensor | None) -> Tensor | float:
        """s: alpha / rank, or tanh of the trainable number."""
        return self.scaling if lora_scaling is None else lora_scaling.tanh()

    def factors(self) -> dict[str, nn.Parameter]:
        """What is trained in the place of the weight, by attribute name."""
        named = {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_scaling": self.lora_scaling}
        return {name: factor for name, factor in named.items() if factor is not None}

    def change(self, lora_A: Tensor, lora_B: Tensor, lora_scaling: Tensor | None = None) -> Change:
        """Gives rows of s·B·A in fp32, from factors (rank, in) and (out, rank): the same bits in whichever pieces."""
        scale = self.scale(None if lora_scaling is None else lora_scaling.to(torch.float32))
        right = exact.columns(lora_A)
        return lambda rows: exact.product(lora_B[rows], right).mul_(scale).to(torch.float32)

    def delta(self, lora_A: Tensor, lora_B: Tensor, lora_scaling: Tensor | None = None) -> Tensor:
        """All of :meth:`change`: (out, in) fp32."""
        return self.change(lora_A, lora_B, lora_scaling)(slice(None))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + s·B·A, (out, in) fp32."""
        change = self.change(self.lora_A, self.lora_B, self.lora_scaling)
        merged = torch.empty(self.out_features, self.in_features, device=self.lora_A.device)
        for rows in pieces(slice(0, self.out_features), self.in_features):
            merged[rows] = change(rows) if self.weight is None else self.weight.read(rows) + change(rows)
        return merged

    def plain(self) -> nn.Module:
        """An ordinary layer of the kind that was wrapped, with :meth:`merged` in the factors' dtype, and this one's bias."""
        merged = self.merged().to(self.lora_A.dtype)
        with torch.device("meta"):
            layer = self._empty()
        layer.weight = nn.Parameter(merged.t().contiguous() if self.is_conv1d else merged)
        if self.bias is not None:
            layer.bias = self.bias
        return layer

    def _empty(self) -> nn.Module:
        raise NotImplementedError

    @torch.no_grad()
    def reset(self, name: str, seed: int, restart: int, init: InitName = "kaiming") -> None:
        """Fresh factors for the start of a LoRA phase (``restart`` 0): A from :func:`initial_A`; B = 0, where there is a weight."""
        self.lora_A.copy_(initial_A(self.rank, self.in_features, name=name, seed=seed, restart=restart, kind=init))
        if self.weight is None:
            self.lora_B.copy_(initial_B(self.out_features, self.rank, name=name, seed=seed))
        else:
            self.lora_B.zero_()
        if self.lora_scaling is not None:
            self.lora_scaling.fill_(1.0)

    def extra_repr(self) -> str:
        scaling = f"{self.scaling:g}" if self.lora_scaling is None else "tanh"
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, scaling={scaling}"


class ReLoRALinear(ReLoRALayer):
    """y = x Wᵀ + b + s·(x Aᵀ) Bᵀ, for ``nn.Linear`` (weight (out, in)) and transformers' ``Conv1D`` ((in, out), as GPT-2 has it).

    Args:
        base: the layer to wrap.
        rank, alpha: as :class:`ReLoRALayer` takes them.
        dropout: on the input of A.
        form: of the product, see :mod:`relora_ds.method.linear`; ``auto``: the faster one that loses nothing, for the tokens of
        each pass.
        how: what else :class:`ReLoRALayer` takes.

    Attributes:
        kept: W + s·B·A in the form ``merged``, where it is kept from pass to pass.
    """

    def __init__(
        self,
        base: nn.Linear | Conv1D,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        form: LinearForm = "auto",
        **how: Any,
    ) -> None:
        super().__init__(base, rank, alpha, **how)
        self.dropout = nn.Dropout(dropout)
        self.form = form
        self.kept = Kept()

    def _empty(self) -> nn.Module:
        if self.is_conv1d:
            return Conv1D(self.out_features, self.in_features)
        return nn.Linear(self.in_features, self.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        flat = x.reshape(-1, self.in_features)
        stored = (None, None, 0) if self.weight is None else (self.weight.values, self.weight.scales, self.weight.group_size)
        if self.form_for(flat.shape[0]) == "merged":
            factors = (*stored, self.lora_A, self.lora_B, self.scaling)
            y = Merged.apply(flat, self.kept.get(*factors), *factors, self.bias)
        else:
            lowered = self.dropout(flat) if self.training and self.dropout.p > 0 else None
            scale = self.scale(self.lora_scaling)
            y = Split.apply(flat, lowered, *stored, self.lora_A, self.lora_B, scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def form_for(self, tokens: int, form: LinearForm | None = None) -> Form:
        """The form of the product in a pass over so many tokens; ``form``: instead of the layer's own setting."""
        form = form or self.form
        drops = self.training and self.dropout.p > 0
        if drops or self.weight is None or self.lora_scaling is not None:
            return "split"  # A's input is another one, there is no W, or the scale has a gradient
        if form != "auto":
            return form
        inputs, outputs = self.in_features, self.out_features
        return choose(self.lora_A.dtype, tokens=tokens, inputs=inputs, outputs=outputs, formed=self.kept.formed)

    def _apply(self, fn: Any, recurse: bool = True) -> ReLoRALinear:
        """On another device or in another dtype W + s·B·A is formed anew."""
        self.kept = Kept(self.kept.passes)
        super()._apply(fn, recurse)
        return self


class ReLoRAEmbedding(ReLoRALayer):
    """y = W[ids] + s·B[ids] A, for ``nn.Embedding``: W (vocabulary, hidden), B (vocabulary, rank), A (rank, hidden).

    There is no dropout, because A's input is a row of B. The row of ``padding_idx`` gets no gradient: its B stays as it begins, at 0
    but for what ``init: residual`` puts there.

    Args:
        base: the layer to wrap.
        rank, alpha: as :class:`ReLoRALayer` takes them.
        how: what else :class:`ReLoRALayer` takes.
    """

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, **how: Any) -> None:
        super().__init__(base, rank, alpha, **how)
        self.padding_idx = base.padding_idx

    def _empty(self) -> nn.Module:
        return nn.Embedding(self.out_features, self.in_features, padding_idx=self.padding_idx)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) integers below the vocabulary -> (..., hidden)."""
        low_rank = F.embedding(ids, self.lora_B, self.padding_idx) @ self.lora_A * self.scale(self.lora_scaling)
        return low_rank if self.weight is None else self.weight.look_up(ids, self.lora_A.dtype) + low_rank

    @torch.no_grad()
    def reset(self, name: str, seed: int, restart: int, init: InitName = "kaiming") -> None:
        """As that of :class:`ReLoRALayer`; without a weight the row of ``padding_idx`` is 0, as in ``nn.Embedding``."""
        super().reset(name, seed, restart, init)
        if self.padding_idx is not None:
            self.lora_B[self.padding_idx].zero_()


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


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) of a model, wrapped or not: a tied weight once, a frozen one by its entries, however it is stored."""
    params = list(model.parameters())
    frozen = sum(layer.weight.values.numel() for _, layer in relora_layers(model) if layer.weight is not None)  # in buffers
    return sum(p.numel() for p in params if p.requires_grad), sum(p.numel() for p in params) + frozen


def num_trainable(model: nn.Module, layers: Mapping[str, Target], rank: int) -> int:
    """Parameters that are trained once these layers of ``model`` are wrapped."""
    frozen = {id(module.weight) for module in layers.values()}
    kept = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in frozen)
    return kept + sum(rank * sum(module.weight.shape) for module in layers.values())


def wrap(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str] = ALL_LINEAR,
    **how: Any,
) -> nn.Module:
    """Replaces the target layers of ``model`` in place by :class:`ReLoRALayer`, freezes their weights and initialises the factors.

    Everything that is not a target stays trainable as it is. One layer at a time is held in fp32. The arguments are those of
    :func:`find_targets` and :func:`wrap_layers`.
    """
    chosen = find_targets(model, targets)
    check_rank(chosen, rank)
    wrap_layers(model, chosen, rank=rank, alpha=alpha, **how)
    return model


def wrap_layers(
    model: nn.Module,
    layers: Mapping[str, Target],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    seed: int = 0,
    frozen: Frozen | None = None,
    shard: tuple[int, int] | None = None,
    trainable_scaling: bool = False,
    init: InitName = "kaiming",
    linear: LinearForm = "auto",
) -> None:
    """Wraps these layers of ``model``, by name; one that is registered in several places is wrapped once.

    Args:
        model: holds the layers.
        layers: what :func:`find_targets` gave, or some of it.
        rank, alpha, frozen, shard, trainable_scaling: as :class:`ReLoRALayer` takes them.
        dropout: of linear layers.
        seed, init: of the factors' first values.
        linear: the form of linear layers' products.
    """
    how: dict[str, Any] = {"frozen": frozen, "shard": shard, "trainable_scaling": trainable_scaling}
    wrapped: dict[int, nn.Module] = {}
    for name, module in layers.items():
        layer: ReLoRALayer
        if isinstance(module, nn.Embedding):
            layer = ReLoRAEmbedding(module, rank, alpha, **how)
        else:
            layer = ReLoRALinear(module, rank, alpha, dropout, linear, **how)
        layer.reset(name, seed, restart=0, init=init)
        _hand_over_hooks(module, layer)
        wrapped[id(module)] = layer.train(model.training)
    _replace(model, wrapped)


def _hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """The same dictionaries, so that the handles that their owners hold can still remove them."""
    for kind in HOOKS:
        setattr(new, kind, getattr(old, kind))


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Puts other modules in the place of those with these ids, wherever they are registered."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if id(child) in replacements:
                parent._modules[attribute] = replacements[id(child)]


def relora_layers(model: nn.Module) -> Iterator[tuple[str, ReLoRALayer]]:
    """The wrapped layers with their names, in model order (the same on all ranks), each once."""
    for name, module in model.named_modules():
        if isinstance(module, ReLoRALayer):
            yield name, module


def param_groups(
    model: nn.Module, *, weight_decay: float | None = None, lr: float | None = None, lora_lr: float | None = None
) -> list[dict[str, Any]]:
    """Optimizer groups: matrices; vectors (norms, biases), which are not decayed; the LoRA factors, apart.

    The factors have a group of their own because ZeRO keeps one flat shard and one Adam step count per group: so a restart can
    restart their bias correction alone. Every parameter appears once, however often it is tied.

    Args:
        model: wrapped or not.
        weight_decay: of the first and the third group.
        lr, lora_lr: learning rates; ``lora_lr`` None: as ``lr``. What is None is left to the optimizer's default.
    """
    factors = {id(p) for _, layer in relora_layers(model) for p in layer.factors().values()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"name": DENSE_GROUP, "params": [p for p in trainable if id(p) not in factors and p.dim() > 1]},
        {"name": NO_DECAY_GROUP, "params": [p for p in trainable if id(p) not in factors and p.dim() <= 1]},
        {"name": LORA_GROUP, "params": [p for p in trainable if id(p) in factors]},
    ]
    for group in groups:
        decay = 0.0 if group["name"] == NO_DECAY_GROUP else weight_decay
        if decay is not None:
            group["weight_decay"] = decay
        rate = lora_lr if group["name"] == LORA_GROUP and lora_lr is not None else lr
        if rate is not None:
            group["lr"] = rate
    return [group for group in groups if group["params"]]
