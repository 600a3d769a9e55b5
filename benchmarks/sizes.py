"""Bytes of an update for the paper's models, by the formulas that benchmarks/nodes.md checks: ReLoRA against full-rank training.

    python -m benchmarks.sizes

bf16, ZeRO-2, 32,100 tokens of vocabulary; the ratios are the same for every number of ranks. Restarts are left out.
"""

from __future__ import annotations

from relora_ds.bandwidth import formulas
from relora_ds.method import lora
from relora_ds.method.targets import find_targets
from relora_ds.models.build import PRESETS, build_meta, preset_config

VOCABULARY = 32_100
WIDTH = 2
RANKS = 8
"""The share (N-1)/N is in every figure, and goes out of the ratios; norms and losses are 100 bytes."""


def sent(numel: int, way: formulas.Way, accumulation: int) -> float:
    return formulas.update_bytes(
        numel, world_size=RANKS, gradient_width=WIDTH, parameter_width=WIDTH, stage=2, accumulation=accumulation, way=way,
    ).total  # fmt: skip


def row(name: str, rank: int) -> list[str]:
    """One model at one rank: trainable parameters, and bytes over those of full-rank training."""
    config = preset_config(name, VOCABULARY)
    model = build_meta(config)
    full = sum(p.numel() for p in model.parameters())
    trainable = lora.num_trainable(model, find_targets(model, lora.ALL_LINEAR), rank)
    words = 2 * VOCABULARY * config.hidden_size
    low_rank_words = trainable - words + 2 * rank * (VOCABULARY + config.hidden_size)
    own = {accumulation: sent(trainable, "owner", accumulation) for accumulation in (1, 8)}
    default = {accumulation: sent(full, "all-reduce", accumulation) for accumulation in (1, 8)}
    ratios = [
        own[1] / sent(full, "owner", 1), own[1] / default[1], own[8] / default[8], sent(low_rank_words, "owner", 8) / default[8]
    ]  # fmt: skip
    return [name, str(rank), f"{full / 1e6:,.1f}", f"{trainable / 1e6:,.1f}", *(f"{ratio:.2%}" for ratio in ratios)]


def main() -> None:
    columns = ["model", "rank", "parameters, M", "trainable, M", "same collectives", "defaults, 1", "defaults, 8"]
    columns += ["low-rank vocabulary"]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for name, (hidden, *_) in PRESETS.items():
        for rank in sorted({128, hidden // 16}):
            print(f"| {' | '.join(row(name, rank))} |")


if __name__ == "__main__":
    main()
