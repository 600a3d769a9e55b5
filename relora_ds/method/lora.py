"""LoRA factors on linear layers and embeddings: W + s·B·A in the place of W, with W frozen, A (r × in), B (out × r), s = alpha / r.

Hu et al., arXiv 2106.09685; restarted as in Lialin et al., arXiv 2307.05695. Nothing here knows of ranks or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from relora_ds.config import Frozen, LinearForm
from relora_ds.method import exact
from relora_ds.method.frozen_weights import FLOATS, Change, FrozenWeight, own_rows, piece_on, pieces
from relora_ds.method.linear import Form, Kept, Merged, Split, choose
from relora_ds.method.reinit import InitName, initial_A, initial_B
from relora_ds.method.targets import ALL_LINEAR, Target, check_rank, find_targets

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
"""Where torch keeps what a user hung on a module's forward and backward pass."""
LORA_GROUP = "lora"
DENSE_GROUP = "dense"
NO_DECAY_GROUP = "no_decay"
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
        for rows in pieces(slice(0, self.out_features), self.in_features, piece_on(merged.device)):
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
