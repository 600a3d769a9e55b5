"""Updates of full rank, LoRA by PEFT, the layer of ReLoRA's authors, and both forms of this project's, in turns on CPUs.

    python -m benchmarks.peers [--nproc 2] [--tokens 2048] [--micro-batches 4] [--hidden 1024] [--layers 2] [--rank 64] [--rounds 5]
                               [--authors CHECKOUT] [--json FILE] [--markdown FILE]

fp32, random tokens, torch's fused AdamW, gradients clipped to a norm of 1. Embeddings, norms and head are trained in every way; all
start from the same weights and factors, and train on the same tokens. So their losses have to agree: the largest difference is told,
and the exit code is 1 where rounding does not explain it. Bytes are those of rank 0.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import authors, rounds
from relora_ds.errors import ConfigError
from relora_ds.launch import launcher, process_group

MAIN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINED = ("lora_", "embed_tokens", "norm", "lm_head")
LENGTH, VOCABULARY, ALPHA, LR, CLIP = 256, 1024, 32, 1e-4, 1.0
TOLERANCE, COMPARED = 1e-4, 10
"""How far losses may be apart in the first updates. Later ones drift apart by rounding, as Adam divides by what may be tiny."""
FULL, PEFT = "full rank, DeepSpeed ZeRO-2", "LoRA by PEFT, DeepSpeed ZeRO-2"
"""The ways that all are compared with."""


@dataclass(frozen=True)
class Peer:
    """One way of training.

    Attributes:
        trains: ``weights`` or ``factors``; ways that train the same have the same losses.
        model: as it is trained.
        update: trains on the micro batches of this rank, each (sequences, length) int64; returns the mean of their losses.
    """

    trains: str
    model: nn.Module
    update: Callable[[Sequence[Tensor]], float]


def model(options: argparse.Namespace) -> nn.Module:
    """The same for the same sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=options.hidden, intermediate_size=options.hidden * 43 // 16, use_cache=False,
        num_hidden_layers=options.layers, num_attention_heads=max(1, options.hidden // 64), max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def with_peft(given: nn.Module, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(given, LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(MAIN), bias="none"))


@torch.no_grad()
def alike(wrapped: nn.Module, factors: Mapping[str, Tensor]) -> nn.Module:
    """Has a model of others train what this project's trains, from the same values of A, by layer, and B = 0."""
    left = dict(factors)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
        if "lora_A" in name:
            layer = name.partition(".lora_A")[0]
            parameter.copy_(left.pop(next(own for own in left if layer.endswith(own))))
        elif "lora_B" in name:
            parameter.zero_()
    assert not left, f"layers without factors: {', '.join(left)}"
    return wrapped


def peers(options: argparse.Namespace) -> dict[str, Peer]:
    """All ways, by name."""
    import deepspeed

    import relora_ds
    from relora_ds.config import Optimizer
    from relora_ds.engine.initialize import adamw
    from relora_ds.method.lora import ALL_LINEAR, find_targets, num_trainable, relora_layers

    optimizer = adamw(Optimizer(lr=LR))

    def config(trained: int) -> dict[str, Any]:
        # All gradients in one bucket, as by default where there are fewer than 5e8; but the buffer is no larger than they are.
        return {
            "train_batch_size": options.tokens // LENGTH, "gradient_accumulation_steps": options.micro_batches,
            "gradient_clipping": CLIP, "timers": {"throughput": {"enabled": False}},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": min(trained, 500_000_000)},
        }  # fmt: skip

    def plain(given: nn.Module, trains: str) -> Peer:
        trained = [p for p in given.parameters() if p.requires_grad]
        own = config(sum(parameter.numel() for parameter in trained))
        engine, *_ = deepspeed.initialize(model=given, model_parameters=trained, optimizer=optimizer, config=own)
        return Peer(trains, given, partial(update, engine))

    def ours(linear: str) -> Peer:
        relora = {"rank": options.rank, "alpha": ALPHA, "restart_every": 10**6, "linear": linear}
        given = model(options)
        own = config(num_trainable(given, find_targets(given, ALL_LINEAR), options.rank))
        engine, *_ = relora_ds.initialize(model=given, optimizer=optimizer, config=own, relora=relora)
        return Peer("factors", engine.module, partial(update, engine))

    split = ours("split")
    factors = {name: layer.lora_A.detach().clone() for name, layer in relora_layers(split.model)}
    ways = {FULL: plain(model(options), "weights"), "full rank, DDP": distributed(model(options), optimizer)}
    ways[PEFT] = plain(alike(with_peft(model(options), options.rank), factors), "factors")
    if options.authors:
        theirs = authors.wrap(model(options), options.authors, targets=MAIN, rank=options.rank, alpha=ALPHA)
        ways["the authors' layer, DeepSpeed ZeRO-2"] = plain(alike(theirs, factors), "factors")
    return {**ways, "relora_ds, split": split, "relora_ds, merged": ours("merged")}


def update(engine: Any, batches: Sequence[Tensor]) -> float:
    """One update of a DeepSpeed engine."""
    losses = []
    for ids in batches:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def distributed(given: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> Peer:
    """torch's DistributedDataParallel, with its defaults."""
    wrapped, stepper = nn.parallel.DistributedDataParallel(given), optimizer(list(given.parameters()))

    def update(batches: Sequence[Tensor]) -> float:
        losses = []
        for number, ids in enumerate(batches, 1):
            with nullcontext() if number == len(batches) else wrapped.no_sync():
                loss = wrapped(input_ids=ids, labels=ids).loss
                (loss / len(batches)).backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(given.parameters(), CLIP)
        stepper.step()
        stepper.zero_grad()
        return float(torch.stack(losses).mean())

    return Peer("weights", given, update)


def batches(options: argparse.Namespace, number: int) -> list[Tensor]:
    """This rank's micro batches of an update."""
    ids = torch.randint(VOCABULARY, (options.tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(number))
    return list(ids.chunk(dist.get_world_size())[dist.get_rank()].chunk(options.micro_batches))


def largest_difference(losses: Mapping[str, Sequence[float]], trains: Mapping[str, str]) -> float:
    """Between the losses of two ways: of any in the first update, of ways that train the same in the first COMPARED ones.

    Infinite where a loss is not a number.
    """
    if not all(math.isfinite(loss) for own in losses.values() for loss in own):
        return math.inf
    groups = [[own[:1] for own in losses.values()]]
    groups += [[own[:COMPARED] for way, own in losses.items() if trains[way] == kind] for kind in set(trains.values())]
    return max(max(column) - min(column) for group in groups for column in zip(*group, strict=True))


def measure(options: argparse.Namespace) -> int:
    """As one rank; rank 0 writes the record. Returns the exit code."""
    process_group.require()
    ways = peers(options)
    timed = {name: lambda number, way=way: way.update(batches(options, number)) for name, way in ways.items()}
    times = rounds.in_turns(timed, options.rounds, warm_up=options.warm_up, settle=dist.barrier)
    last = batches(options, options.warm_up + options.rounds)
    bytes_of = {name: rounds.most_bytes(partial(way.update, last)) for name, way in ways.items()}
    found = torch.tensor(largest_difference(times.returned, {name: way.trains for name, way in ways.items()}))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    difference = float(found)
    if dist.get_rank() == 0:
        facts = {
            name: {
                "tokens/s": f"{options.tokens / rounds.Spread.of(times.seconds[name]).median:,.0f}",
                "MB in an update": f"{bytes_of[name] / 1e6:,.1f}",
                "trained": f"{sum(p.numel() for p in way.model.parameters() if p.requires_grad):,}",
                "last loss": f"{times.returned[name][-1]:.5f}",
            }
            for name, way in ways.items()
        }
        notes = [f"losses differ by {difference:.1e} at most, of {TOLERANCE:.0e} that rounding may explain"]
        notes += [] if options.authors else ["the authors' layer is left out: no --authors"]
        rounds.Record(times, [FULL, PEFT], facts, notes=notes).write(options)
    return 0 if difference <= TOLERANCE else 1


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"nproc": 1, "tokens": 2048, "micro_batches": 1, "hidden": 1024, "layers": 2, "rank": 64}
    rounds.add_options(parser, **sizes)
    parser.add_argument("--authors", type=Path, metavar="CHECKOUT", help="of Guitaricet/relora, whose layer is to take part")
    options = parser.parse_args(words)
    if options.tokens % (share := LENGTH * options.nproc * options.micro_batches):
        parser.error(f"--tokens {options.tokens}: must be a multiple of {share}: sequences of {LENGTH} in each micro batch")
    if options.authors:
        try:
            authors.load(options.authors)
        except ConfigError as error:
            parser.error(str(error))
    return options


def main() -> int:
    options = parse()
    if options.nproc > 1 and "RANK" not in os.environ:
        return launcher.spawn(sys.argv[1:], options.nproc, module="benchmarks.peers")
    code = measure(options)
    process_group.leave()
    return code


if __name__ == "__main__":
    sys.exit(main())
