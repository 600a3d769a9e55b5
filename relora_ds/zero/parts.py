"""The parts of an update that are inside ZeRO's optimizer, named for a profiler."""

from __future__ import annotations

from deepspeed.runtime.zero import stage_1_and_2

from relora_ds.supervision import parts


def name_parts() -> None:
    """Names the gradients' reduction and the parameters' all-gather, in all engines of this process; may be called again.

    A version of DeepSpeed that has them under another name counts them to the backward pass and the step around them.
    """
    for owner, method, name in (
        (stage_1_and_2.DeepSpeedZeroOptimizer, "reduce_ipg_grads", parts.REDUCTION),
        (stage_1_and_2, "all_gather_dp_groups", parts.ALL_GATHER),
    ):
        original = getattr(owner, method, None)
        if original is not None and not hasattr(original, "part"):
            named = parts.serving(name, original)
            named.part = name  # type: ignore[attr-defined]
            setattr(owner, method, named)
