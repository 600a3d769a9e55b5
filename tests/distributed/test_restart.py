"""What a restart must not change, and what it must: over real processes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from relora_ds.errors import RestartError
from relora_ds.method.frozen_weights import stored_tensors
from relora_ds.method.lora import relora_layers
from relora_ds.method.pruning import num_kept
from relora_ds.zero.state import ZeroState
from tests.distributed import common
from tests.distributed.pool import RankError, run
from tests.products import ExactProducts

LEARNT = 0


def losses_around_a_restart(
    dtype: str, stage: int, write_masters: bool, frozen: dict[str, Any] | None = None, targets: Any = "all-linear"
) -> dict[str, Any]:
    """With lr = 0: the loss of a fixed batch before a restart, right after it, and one and two updates on."""
    relora = {"restart_every": 1000, "restart_warmup": 0, "frozen": frozen or {}, "targets": targets}
    engine = common.build(common.tiny_llama(), relora, dtype=dtype, stage=stage, lr=2e-2)
    for _ in range(12):
        common.train_update(engine, LEARNT)  # one batch again and again: the factors must matter for its loss
    common.set_lr(engine, 0.0)
    original = ZeroState.write_fragment
    if not write_masters:
        ZeroState.write_fragment = lambda self, name, key, value: None  # the bug of all who tried before
    try:
        losses = [common.fixed_loss(engine, LEARNT)]
        record = engine.optimizer.restart()
        losses.append(common.fixed_loss(engine, LEARNT))
        for index in (10, 11):
            common.train_update(engine, index)
            losses.append(common.fixed_loss(engine, LEARNT))
    finally:
        ZeroState.write_fragment = original
    common.end(engine)
    return {
        "losses": losses, "merged_change": record.merged_change, "merge_error": record.merge_error,
        "parts": record.parts, "seconds": record.seconds,
    }  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2])
def test_restart_changes_no_output_fp32(stage: int) -> None:
    (result, _) = run(2, losses_around_a_restart, "fp32", stage, True)
    assert result["merged_change"] > 0.1, "the factors must have learnt something for this to mean anything"
    assert result["merge_error"] == 0.0
    assert list(result["parts"]) == ["merge", "reset", "verify"] and min(result["parts"].values()) > 0
    assert sum(result["parts"].values()) == pytest.approx(result["seconds"])
    before, *after = result["losses"]
    assert after == pytest.approx([before] * 3, rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_restart_changes_no_output_bf16(stage: int) -> None:
    (result, _) = run(2, losses_around_a_restart, "bf16", stage, True)
    before, at_once, one, two = result["losses"]
    # The merged weight is rounded to bf16, whose relative rounding error is 0.0017 (uniform mantissas): on a loss near ln(61) = 4.1
    # of a two-layer model that moves a few units of the third decimal.
    assert at_once == pytest.approx(before, abs=0.01)
    assert result["merge_error"] < 0.05
    assert (one, two) == (at_once, at_once), "with lr = 0 nothing may change any more, to the bit"


@pytest.mark.parametrize("master", ["none", "sharded"])
@pytest.mark.parametrize(("stored", "rounding"), [("fp32", 1e-6), ("bf16", 0.002), ("int8", 0.02)])
def test_restart_changes_no_output_however_the_weights_are_stored(stored: str, rounding: float, master: str) -> None:
    """The engine computes in fp32; what the loss moves by at once is the rounding of the store. After that nothing moves at all."""
    frozen = {"dtype": stored, "master": master, "group_size": 16}
    (result, other) = run(2, losses_around_a_restart, "fp32", 2, True, frozen, common.WITH_VOCABULARY)
    assert result["losses"] == other["losses"]
    before, at_once, one, two = result["losses"]
    assert at_once == pytest.approx(before, rel=rounding)
    assert (one, two) == pytest.approx((at_once, at_once), rel=1e-7)
    assert result["merge_error"] < {"fp32": 1e-6, "bf16": 0.02, "int8": 0.1}[stored]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_that_test_fails_without_the_masters(dtype: str) -> None:
    """The stale master brings the old B back at the next step, on top of the merged one."""
    (result, _) = run(2, losses_around_a_restart, dtype, 2, False)
    before, at_once, one, _ = result["losses"]
    assert at_once == pytest.approx(before, abs=0.01), "the module alone looks right at first"
    assert abs(one - before) > 0.03


STATE_SEED = 7


def set_awkward_state(optimizer: Any) -> None:
    """Masters and moments from a seed by name: the same at any world size, with ties, zeros and denormals."""
    state = optimizer.masters
    for row, name in enumerate(state.params):
        generator = torch.Generator().manual_seed(STATE_SEED * 1000 + row)
        shape = state.params[name].shape
        state.write(name, torch.randn(shape, generator=generator) * 0.1)
        for key in state.moment_keys():
            values = torch.randn(shape, generator=generator)
            kind = torch.randint(0, 6, shape, generator=generator)
            values[kind == 0] = 0.0
            values[kind == 1] = 0.25
            values[kind == 2] *= 1e-42
            state.write_fragment(name, key, values.abs() if key == "exp_avg_sq" else values)


def restart_from_a_given_state(
    reset: dict[str, Any], dtype: str, frozen: dict[str, Any] | None = None, init: str = "kaiming"
) -> dict[str, torch.Tensor]:
    """All that a restart leaves behind, gathered: masters, moments, module copies and merged weights.

    No product of the restart may depend on who forms it, or how: that is seen here, as bits may agree by chance of the CPU."""
    relora = {"restart_every": 1000, "restart_warmup": 0, "reset": reset, "frozen": frozen or {}, "init": init}
    # Not the head as well: by symmetry the shards of two ranks would meet between two layers.
    relora["targets"] = ["all-linear", "input-embedding"] if frozen else "all-linear"
    engine = common.build(common.tiny_llama(), relora, dtype=dtype, lr=0.0)
    common.train_update(engine, 0)  # makes Adam's moments
    optimizer = engine.optimizer
    set_awkward_state(optimizer)
    with ExactProducts() as asked:
        optimizer.restart()
    assert asked.num > 0
    left: dict[str, torch.Tensor] = {}
    for name, param in optimizer.masters.params.items():
        left[f"{name} module"] = param.data.clone()
        left[f"{name} master"] = optimizer.masters.gather(name)
        for key in optimizer.masters.moment_keys():
            left[f"{name} {key}"] = optimizer.masters.gather(name, key)
    for name, layer in relora_layers(engine.module):
        left.update({what: stored.clone() for what, stored in stored_tensors(name, layer.weight)})
    owned = [optimizer.masters.own_slice(name).numel for name in optimizer.masters.params]
    left["owned"] = torch.tensor(owned)
    common.end(engine)
    return left


RESETS = {
    "magnitude, joint": {"kind": "magnitude", "ratio": 0.9, "mask": "joint"},
    "magnitude, independent": {"kind": "magnitude", "ratio": 0.99, "mask": "independent"},
    "magnitude, global": {"kind": "magnitude", "ratio": 0.9, "scope": "global", "mask": "independent"},
    "random": {"kind": "random", "ratio": 0.8, "mask": "joint"},
    "full": {"kind": "full"},
    "none": {"kind": "none"},
}


CASES: list[Any] = [
    *(
        pytest.param(kind, "fp32", {}, "kaiming", marks=[pytest.mark.long] * (kind in ("random", "full", "none")))
        for kind in RESETS
    ),
    ("magnitude, joint", "bf16", {}, "kaiming"),  # masters and moments are fp32 in either dtype: one kind in bf16 says it for all
    ("full", "fp32", {"dtype": "int8", "group_size": 16}, "orthonormal"),
    ("full", "fp32", {"dtype": "int8", "master": "sharded"}, "kaiming"),
    *(common.long("full", "fp32", {"dtype": stored, "master": "sharded"}, "kaiming") for stored in ("fp32", "bf16")),
    *(
        common.long("full", "fp32", {"dtype": stored, "master": "sharded", "group_size": 16}, "residual")
        for stored in ("bf16", "int8")
    ),
]


@pytest.mark.parametrize(("kind", "dtype", "frozen", "init"), CASES)
def test_same_bits_for_any_number_of_ranks(kind: str, dtype: str, frozen: dict[str, Any], init: str) -> None:
    reset = RESETS[kind]
    (alone,) = run(1, restart_from_a_given_state, reset, dtype, frozen, init)
    for world_size in (2, 3, 4):
        ranks = run(world_size, restart_from_a_given_state, reset, dtype, frozen, init)
        straddling = sum(
            1 for column in zip(*(rank["owned"].tolist() for rank in ranks), strict=True) if sum(map(bool, column)) > 1
        )
        assert straddling > 0, "no tensor straddles two shards"
        for left in ranks:
            for what, value in alone.items():
                if what != "owned":
                    assert torch.equal(value.view(torch.uint8), left[what].view(torch.uint8)), (
                        f"{what} differs at {world_size} ranks"
                    )


@pytest.mark.parametrize("mask", ["joint", "independent"])
def test_pruned_moments_equal_a_plain_sort(mask: str) -> None:
    """The survivors of a 3-rank restart are those that a sort of the whole tensor picks, unchanged; all else is exactly zero."""
    ratio = 0.9
    pruned = run(3, restart_from_a_given_state, {"kind": "magnitude", "ratio": ratio, "mask": mask}, "fp32")[1]
    original = run(3, restart_from_a_given_state, {"kind": "none"}, "fp32")[1]
    moments = [what for what in original if what.endswith(("exp_avg", "exp_avg_sq"))]
    assert moments
    for what in moments:
        values = original[what].flatten()
        chosen_by = values if mask == "independent" else original[what.replace("exp_avg_sq", "exp_avg")].flatten()
        order = torch.sort(chosen_by.abs().double(), descending=True, stable=True).indices
        keep = order[: num_kept(values.numel(), ratio)]
        expected = torch.zeros_like(values)
        expected[keep] = values[keep]
        assert keep.numel() == values.numel() - math.floor(ratio * values.numel())
        assert torch.equal(pruned[what].flatten(), expected), what


class OneLayer(torch.nn.Module):
    """Six factor entries in all: with four ranks and ZeRO's alignment, some rank owns none of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(3, 3, bias=False)
        self.head = torch.nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x)).square().mean()


def restart_where_a_rank_owns_nothing() -> dict[str, Any]:
    relora = {"rank": 1, "targets": ["inner"], "restart_every": 2, "restart_warmup": 0, "reset": {"ratio": 0.5}}
    engine = common.build(OneLayer(), relora)
    losses = []
    for step in range(4):
        x = common.my_rows(torch.randn(12, 3, generator=torch.Generator().manual_seed(step)))
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(common.mean_over_ranks(loss))
    optimizer = engine.optimizer
    result = {
        "owned": sum(optimizer.masters.own_slice(name).numel for name in optimizer.masters.params),
        "weight": engine.module.inner.weight.values.clone(),
        "restarts": optimizer.restarts,
        "losses": losses,
    }
    common.end(engine)
    return result


def test_a_rank_that_owns_nothing() -> None:
    (alone,) = run(1, restart_where_a_rank_owns_nothing)
    ranks = run(4, restart_where_a_rank_owns_nothing)
    assert min(rank["owned"] for rank in ranks) == 0
    assert sum(rank["owned"] for rank in ranks) == alone["owned"] == 6
    for rank in ranks:
        assert rank["restarts"] == 2
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert torch.allclose(rank["weight"], alone["weight"], rtol=1e-5, atol=1e-6)


def restart_with_a_flipped_bit() -> str:
    engine = common.build(common.tiny_llama(), {"restart_every": 1000, "restart_warmup": 0})
    common.train_update(engine, 0)
    if dist.get_rank() == 1:
        weight = engine.module.model.layers[1].mlp.up_proj.weight
        weight.values.view(torch.int32)[3, 4] ^= 1 << 21  # high enough that the merge does not round it away
    try:
        engine.optimizer.restart()
    except RestartError as error:
        return str(error)
    finally:
        common.end(engine)
    return ""


def verify_with_a_flipped_bit(frozen: dict[str, Any], part: str) -> dict[str, Any]:
    """A bit flips on the last rank; the comparison after the next update finds it."""
    relora = {"restart_every": 1000, "restart_warmup": 0, "frozen": {"verify_every": 2, **frozen}}
    engine = common.build(common.tiny_llama(), relora, lr=0.0)
    common.train_update(engine, 0)
    layer = engine.module.model.layers[1].mlp.up_proj
    before = layer.weight.values.clone(), layer.lora_A.data.clone()
    tensor = layer.weight.values if part == "weight" else layer.lora_A.data
    result: dict[str, Any] = {"message": ""}
    # A factor is flipped after ZeRO has written its copy, as a fault at any moment would be.
    step = engine.optimizer.zero.step

    def step_and_flip() -> None:
        step()
        if dist.get_rank() == dist.get_world_size() - 1:
            tensor.view(torch.uint8)[0, 1] ^= 4

    engine.optimizer.zero.step = step_and_flip
    try:
        common.train_update(engine, 1)
        result["repairs"] = list(engine.optimizer.replicas.repairs)
        result["restored"] = torch.equal(layer.weight.values, before[0]) and torch.equal(layer.lora_A.data, before[1])
    except RestartError as error:
        result["message"] = str(error)
    common.end(engine)
    return result


@pytest.mark.parametrize(
    ("world_size", "frozen", "part"),
    [
        (3, {}, "weight"),
        (3, {"dtype": "int8", "group_size": 16}, "weight"),
        (2, {"dtype": "int8", "group_size": 16, "master": "sharded"}, "weight"),
        (2, {}, "lora_A"),
    ],
    ids=["by the majority", "int8 by the majority", "by the master", "a factor by its ZeRO master"],
)
def test_a_flipped_bit_is_repaired(world_size: int, frozen: dict[str, Any], part: str) -> None:
    for result in run(world_size, verify_with_a_flipped_bit, {**frozen, "on_mismatch": "repair"}, part):
        (repair,) = result["repairs"]
        assert (
            f"after update 2: model.layers.1.mlp.up_proj.{part} differs on rank(s) {world_size - 1} from rank 0; repaired"
            == repair
        )
        assert result["restored"]


@pytest.mark.parametrize("on_mismatch", ["stop", "repair"])
def test_a_flipped_bit_stops_the_run_where_nobody_can_tell_which_is_right(on_mismatch: str) -> None:
    for result in run(2, verify_with_a_flipped_bit, {"on_mismatch": on_mismatch}, "weight"):
        assert (
            "after update 2 the ranks hold different weights: model.layers.1.mlp.up_proj.weight differs on rank(s) 1"
            in result["message"]
        )


def test_a_rank_that_differs_is_named() -> None:
    for message in run(2, restart_with_a_flipped_bit):
        assert "model.layers.1.mlp.up_proj.weight differs on rank(s) 1 from rank 0" in message


def int8_in_a_bf16_engine() -> dict[str, Any]:
    """The buffers through DeepSpeed's casts, its checkpoint and a load into a fresh engine."""
    relora = {"restart_every": 2, "restart_warmup": 0, "frozen": {"dtype": "int8", "group_size": 16, "master": "sharded"}}
    engine = common.build(common.tiny_llama(), relora, dtype="bf16")
    weight = engine.module.model.layers[0].mlp.up_proj.weight
    losses = [common.train_update(engine, 0) for _ in range(5)]
    result = {"dtypes": (weight.values.dtype, weight.scales.dtype), "losses": losses, "restarts": engine.optimizer.restarts}
    common.end(engine)
    return result


def test_int8_buffers_survive_a_bf16_engine() -> None:
    for result in run(2, int8_in_a_bf16_engine):
        assert result["dtypes"] == (torch.int8, torch.float32)
        assert result["restarts"] == 2 and result["losses"][-1] < result["losses"][0]


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("as asked")


def test_the_pool_tells_of_a_failing_rank() -> None:
    with pytest.raises(RankError, match="as asked"):
        run(2, fail_on_rank_one)
