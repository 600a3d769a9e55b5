"""Small models and engines that the distributed tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import relora_ds
from relora_ds.comm import counter
from relora_ds.engine.release import release
from relora_ds.zero import gradient_reduction

VOCAB = 61
GLOBAL_BATCH = 12
"""Divides over 1, 2, 3 and 4 ranks."""
WITH_VOCABULARY = ["all-linear", "output-head", "input-embedding"]


def long(*case: Any) -> Any:
    """A case of a parametrised test that `make test` leaves to `make test-cluster`."""
    return pytest.param(*case, marks=pytest.mark.long)


def tiny_llama(seed: int = 0, **changes: Any) -> nn.Module:
    """Odd sizes, so that matrices straddle shards at every world size."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def tiny_gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=20, n_layer=2, n_head=2, **no_dropout))


def tiny_neox(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))


def deepspeed_config(
    *, lr: float = 1e-2, stage: int = 2, dtype: str = "fp32", accumulation: int = 1, **zero: Any
) -> dict[str, Any]:
    """DeepSpeed's JSON for torch's AdamW, a global batch of 12 and clipping at 1."""
    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "torch_adam": True, "weight_decay": 0.0}},
        "zero_optimization": {"stage": stage, **zero},
        "zero_force_ds_cpu_optimizer": False,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    return config


def build(model: nn.Module, relora: dict[str, Any], **config: Any) -> Any:
    """An engine whose ``optimizer`` is the ReLoRAOptimizer."""
    engine, *_ = relora_ds.initialize(model=model, config=deepspeed_config(**config), relora={"rank": 3, **relora})
    return engine


def batch(index: int, length: int = 16) -> Tensor:
    """The global batch number ``index``: (12, length) int64, the same everywhere."""
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randint(0, VOCAB, (GLOBAL_BATCH, length), generator=generator)


def my_rows(ids: Tensor) -> Tensor:
    """This rank's contiguous share of a global batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = ids.shape[0] // world_size
    return ids[rank * share : (rank + 1) * share]


def mean_over_ranks(value: Tensor) -> float:
    total = value.detach().double().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def train_update(engine: Any, index: int) -> float:
    """One update on global batch ``index``; returns its mean loss."""
    micro_batches = my_rows(batch(index)).chunk(engine.gradient_accumulation_steps())
    losses = []
    for ids in micro_batches:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return mean_over_ranks(torch.stack(losses).mean())


@torch.no_grad()
def fixed_loss(engine: Any, index: int = 99) -> float:
    """The loss of a fixed batch, without training on it."""
    engine.module.eval()
    ids = my_rows(batch(index))
    loss = mean_over_ranks(engine.module(input_ids=ids, labels=ids).loss)
    engine.module.train()
    return loss


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def end(engine: Any) -> None:
    """Frees an engine, so that the next test of this process starts clean."""
    release(engine)


def reduce_each(group: dist.ProcessGroup, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any = None) -> None:
    """What NCCL's process group does with a reduce-scatter of parts of unequal length, which gloo's does not take: a reduce of each
    part to its rank, in the dtype of the wire. Not counted again as reduces.
    """
    reduce = getattr(dist.ProcessGroup.reduce, "__wrapped__", dist.ProcessGroup.reduce)
    for rank, part in enumerate(inputs[0]):
        if part.numel():
            to_rank = dist.ReduceOptions()
            to_rank.rootRank = rank
            reduce(group, [part], to_rank).wait()
    outputs[0].copy_(inputs[0][group.rank()])


@contextmanager
def as_on_gpus() -> Iterator[list[tuple[list[int], Any]]]:
    """Gradients of the engines that are made inside go as on GPUs, with :func:`reduce_each` for NCCL's part.

    Yields:
        A list of what was exchanged: how many entries each rank got, and on which stream.
    """
    exchanged: list[tuple[list[int], Any]] = []
    kept = gradient_reduction.GradientRoute, gradient_reduction.sum_scattered, dist.ProcessGroup.reduce_scatter

    def route(zero: Any, *, on_cpu: bool, defer: bool) -> gradient_reduction.GradientRoute:
        return kept[0](zero, on_cpu=False, defer=defer)

    def noted(packed: Tensor, sizes: list[int], group: dist.ProcessGroup | None, divisor: int) -> Tensor:
        exchanged.append((list(sizes), gradient_reduction.get_accelerator().current_stream()))
        return kept[1](packed, sizes, group, divisor)

    changed = counter._counted(reduce_each, *counter.OPERATIONS["reduce_scatter"])
    gradient_reduction.GradientRoute, gradient_reduction.sum_scattered, dist.ProcessGroup.reduce_scatter = route, noted, changed
    try:
        yield exchanged
    finally:
        gradient_reduction.GradientRoute, gradient_reduction.sum_scattered, dist.ProcessGroup.reduce_scatter = kept
