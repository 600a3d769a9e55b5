"""When restarts pay, as a rule: what was found on a small model (benchmarks/small_model.md, "Where restarts pay"), in words."""

from __future__ import annotations

from fractions import Fraction

SHORTEST = Fraction(1, 5)
"""The shortest interval, as a share of the run, that paid at every rank and length; a tenth gained nothing."""
MOST = 3
"""More restarts gained no more."""
LARGE_RANK = Fraction(1, 6)
"""The rank, as a share of a layer's narrower side, from which restarts gained one percent of the perplexity, or nothing."""
RECORD = "docs/questions.md, Do restarts pay?"


def interval(updates: int, lora_updates: int) -> int | None:
    """The ``relora.restart_every`` that splits the LoRA phase into two to four equal parts, none below a fifth of the run.

    Args:
        updates: of the whole run.
        lora_updates: of them in the LoRA phase.

    Returns:
        Updates; None where the phase is too short to be split.
    """
    parts = min(MOST + 1, int(lora_updates / (SHORTEST * updates)))
    return -(-lora_updates // parts) if parts > 1 else None


def hints(every: int, rank: int, side: int, *, updates: int, lora_updates: int) -> list[str]:
    """What to change about restarts.

    Args:
        every: updates between restarts.
        rank: of the factors.
        side: the narrower side of the narrowest layer that has them.
        updates: of the whole run.
        lora_updates: of them in the LoRA phase.
    """
    said = []
    if every < SHORTEST * updates and every < lora_updates:
        advised = interval(updates, lora_updates)
        way_out = f"relora.restart_every={advised} is one"
        if advised is None:
            way_out = "the LoRA phase is too short for one, without a shorter relora.warm_start; try method=lora beside it"
        said.append(
            f"relora.restart_every={every} is {every / updates:.0%} of the run, and on a small model intervals of a fifth or more "
            f"paid best: {way_out} ({RECORD})"
        )
    if rank >= LARGE_RANK * side:
        said.append(
            f"relora.rank={rank} is {rank / side:.0%} of the narrowest layer's {side:,}: on a small model restarts gained 1% of the "
            f"perplexity at most from a sixth on, so try method=lora beside it ({RECORD})"
        )
    return said
