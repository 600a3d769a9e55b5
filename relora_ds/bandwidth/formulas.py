"""What training costs, by arithmetic alone: bytes of an update and of a restart on the wire, floating-point operations. PURE.

Bytes are those that one rank sends, as ring algorithms over N ranks move them: of n bytes a reduce-scatter and an all-gather send
(N-1)/N·n each, an all-reduce twice that. A rank receives as much as it sends. Headers are not counted (about 0.2%).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Way = Literal["owner", "all-reduce", "ddp"]
"""How gradients travel: to their owners alone, as here; by DeepSpeed's defaults; as in PyTorch's DistributedDataParallel."""
NORM_BYTES = 13
"""All-reduced in each update: the fp32 norm of each of at most three parameter groups, and the byte that says overflow."""
LOSS_BYTES = 32
"""All-reduced in each update: the mean loss and three flags in fp64."""
TIME_BYTES, TIMES_EVERY = 8, 20
"""Of each rank's own seconds, which go with the loss in every 20th update."""
COUNTS_BYTES = 8 * 16 * 4
"""All-reduced for each tensor in one choice of what survives a restart: eight digits of 16 values, counted in int32."""
MASTER_BYTES = 4
"""Of an entry of the factors' fp32 masters, which every rank needs to merge them."""
RESTART_SCALARS, CHOICE_SCALARS = 24, 56
"""Bytes of checksums and figures, all-reduced in every restart, and for every choice."""


@dataclass(frozen=True)
class Bytes:
    """What one rank sends in one update, in bytes by purpose; a mean over updates where these differ.

    Attributes:
        gradient: of the gradients' reduction.
        parameters: of the all-gather of the parameters that each rank has stepped.
        norm: of the gradient's norm and the overflow flag.
        loss: of the mean loss and what goes with it.
    """

    gradient: float
    parameters: float
    norm: float
    loss: float

    @property
    def total(self) -> float:
        return self.gradient + self.parameters + self.norm + self.loss


def share(world_size: int) -> float:
    """(N-1)/N: of what an all-gather or a reduce-scatter handles, the part that one rank sends."""
    return (world_size - 1) / world_size


def update_bytes(
    numel: int,
    *,
    world_size: int,
    gradient_width: float,
    parameter_width: float,
    stage: int,
    accumulation: int,
    way: Way,
) -> Bytes:
    """What one rank sends in one update.

    Args:
        numel: trainable parameters.
        world_size: number of ranks N.
        gradient_width: bytes of a gradient's entry on the wire (``communication_data_type``).
        parameter_width: bytes of an entry of the module's parameters.
        stage: of ZeRO, 1 or 2; nothing to ``owner`` and ``ddp``.
        accumulation: micro batches of an update; matters to ``all-reduce`` under stage 2 alone, which reduces after each.
        way: of the gradients.
    """
    once = share(world_size)
    reductions = accumulation if way == "all-reduce" and stage == 2 else 1
    gradient = (once if way == "owner" else 2 * once * reductions) * numel * gradient_width
    is_sharded = way != "ddp"
    return Bytes(
        gradient=gradient,
        parameters=once * numel * parameter_width if is_sharded else 0.0,
        norm=2 * once * NORM_BYTES if is_sharded else 0.0,
        loss=2 * once * (LOSS_BYTES + TIME_BYTES * world_size / TIMES_EVERY),
    )


def restart_bytes(
    lora_numel: int, *, num_tensors: int, choices: int, world_size: int, gathered_bytes: float = 0.0, residual_bytes: float = 0.0
) -> float:
    """What one rank sends in one restart, on the mean over the ranks.

    Args:
        lora_numel: entries of all factors.
        num_tensors: the factors.
        choices: how often what survives is chosen by counting: 1 for joint masks, 2 for independent ones, 0 where nothing is ranked.
        world_size: number of ranks N.
        gathered_bytes: of the stored frozen weights with their scales, where a sharded master is rounded into them.
        residual_bytes: of this rank's rows of the residual, of A, and of B twice, where factors begin with the residual: rows go to
            the rank that finds A, which is broadcast, and B is all-reduced.
    """
    reduced = RESTART_SCALARS + choices * (CHOICE_SCALARS + COUNTS_BYTES * num_tensors)
    return share(world_size) * (2 * reduced + MASTER_BYTES * lora_numel + gathered_bytes + residual_bytes)


def update_flops(
    tokens: int, *, trained: int, frozen: int = 0, attention: int = 0, recomputed: int = 0, recomputed_attention: int = 0
) -> float:
    """Floating-point operations of one update, over all ranks.

    A product with a matrix of n entries takes 2n for each token, forward and for the gradient of its input; another 2n for
    the gradient of the matrix where it is trained (Kaplan et al., arXiv 2001.08361, 2.1). Scores and their product with the values
    take 4·T·d for each token, layer and width d, and twice that backward; the half that a causal mask spares is counted, as usual.

    Args:
        tokens: of the update.
        trained: entries of the trained matrices that tokens are multiplied with: factors and head, not an embedding.
        frozen: entries of the frozen ones.
        attention: the sum of T·d over the layers: sequence length times heads times width of a head.
        recomputed: entries of the matrices whose products gradient checkpointing forms once more.
        recomputed_attention: the same of ``attention``.
    """
    return float(tokens) * (6 * trained + 4 * frozen + 12 * attention + 2 * recomputed + 4 * recomputed_attention)


def merged_flops(tokens: int, formed: int, *, factors: int, entries: int, recomputes: bool) -> float:
    """What layers in their merged form do more than :func:`update_flops` says, or less where it is negative.

    W + s·B·A is formed forward and backward of each pass, and once more where gradient checkpointing repeats the forward one, or
    once per update and rank where it is kept; tokens are then multiplied with the factors for these' gradients alone (see
    :mod:`relora_ds.method.linear`).

    Args:
        tokens: of the update, over all ranks.
        formed: how often W + s·B·A is formed in it, over all ranks.
        factors: entries of A and B.
        entries: the sum of rank times in times out over the layers.
        recomputes: whether the forward pass is made twice.
    """
    return 2.0 * formed * entries - float(tokens) * (2 + 2 * recomputes) * factors
