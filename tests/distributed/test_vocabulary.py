"""The ``traffic`` section: what it saves, and that it computes what it says, over real processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import relora_ds
from relora_ds.errors import EXIT_DONE
from relora_ds.method import lora
from relora_ds.zero import rows
from relora_ds.zero.vocabulary_route import VocabularyRoute
from tests.distributed import common
from tests.distributed.pool import run
from tests.distributed.test_training import at, read_log, train_here
from tests.fp16 import needs_fp16, overruled
from tests.wire import Wire

WIDE = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 1}
RELORA = {"rank": 3, "restart_every": 4, "restart_warmup": 1}


def train_update(engine: Any, ids: Tensor) -> float:
    """One update on a global batch; returns its mean loss."""
    losses = []
    for micro in common.my_rows(ids).chunk(engine.gradient_accumulation_steps()):
        loss = engine(input_ids=micro, labels=micro).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return common.mean_over_ranks(torch.stack(losses).mean())


def digest(engine: Any) -> str:
    """Of the bits of all parameters."""
    whole = b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in engine.module.parameters())
    return hashlib.sha256(whole).hexdigest()


def build(traffic: dict[str, Any] | None, relora: dict[str, Any] | None = None, clip: float = 1.0, **config: Any) -> Any:
    content = common.deepspeed_config(**config) | {"gradient_clipping": clip}
    return relora_ds.initialize(model=common.tiny_llama(), config=content, relora=relora, traffic=traffic)[0]


# Bytes


def bytes_of(traffic: dict[str, Any], stage: int, accumulation: int) -> dict[str, Any]:
    """What an update sends on this rank for the vocabulary, and what it should by the formulas: means over as many as make a turn."""
    every, world_size = traffic.get("vocabulary_every", 1), dist.get_world_size()
    config = common.deepspeed_config(stage=stage, dtype="bf16", accumulation=accumulation)
    model = common.tiny_llama(**WIDE)
    engine, *_ = relora_ds.initialize(model=model, config=config, relora={"rank": 8}, traffic=traffic)
    embedding = engine.module.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    sent_rows = 0
    held = []
    with Wire() as wire:
        for _ in range(every):
            ids = torch.randint(0, WIDE["vocab_size"], (common.GLOBAL_BATCH, 64), generator=generator)
            train_update(engine, ids)
            held.append(sum(value.nbytes for value in engine.optimizer.vocabulary.pending.values()))
    mine = common.my_rows(ids).unique()
    route: VocabularyRoute = engine.optimizer.vocabulary
    for rank, piece in enumerate(route.slices[embedding]):
        tokens = range(piece.start // 128, (piece.start + piece.numel) // 128)
        sent_rows += int(((mine >= tokens.start) & (mine < tokens.stop)).sum()) if rank != dist.get_rank() else 0
    share, entries = (world_size - 1) / world_size, embedding.numel()
    rest = sum(p.numel() for p in engine.module.parameters() if p.requires_grad) - 2 * entries
    row = {"int8": 1 + 2 / 128, "auto": 2}[traffic.get("vocabulary_dtype", "auto")]
    of_embedding = sent_rows * (4 + row * 128) if traffic.get("vocabulary_rows") == "seen" else share * entries * row
    common.end(engine)
    return {
        "vocabulary": wire.sent_bytes / every - 2 * share * 2 * rest,
        "formula": (of_embedding + share * entries * row + share * 2 * entries * 2) / every,
        "usual": share * 2 * entries * 4,
        "held": [num_bytes / (2 * entries) for num_bytes in held],
    }


@pytest.mark.parametrize(
    ("world_size", "stage", "accumulation", "traffic"),
    [
        (2, 2, 1, {"vocabulary_every": 2}),
        (4, 1, 3, {"vocabulary_every": 4}),
        (2, 1, 1, {"vocabulary_rows": "seen"}),
        (4, 2, 3, {"vocabulary_rows": "seen"}),
        (4, 1, 1, {"vocabulary_dtype": "int8"}),
        (2, 2, 3, {"vocabulary_dtype": "int8"}),
        (2, 1, 3, {"vocabulary_dtype": "int8", "vocabulary_rows": "seen"}),
        (4, 2, 1, {"vocabulary_dtype": "int8", "vocabulary_every": 3}),
    ],
)
def test_the_vocabulary_sends_what_the_formula_says(
    world_size: int, stage: int, accumulation: int, traffic: dict[str, Any]
) -> None:
    results = run(world_size, bytes_of, traffic, stage, accumulation)
    sent, formula, usual = (sum(r[key] for r in results) / world_size for key in ("vocabulary", "formula", "usual"))
    assert sent == pytest.approx(formula, rel=0.02)
    assert sent < 0.8 * usual
    always, between = 4 * ("vocabulary_dtype" in traffic), [4] * (traffic.get("vocabulary_every", 1) - 1)
    assert results[0]["held"] == [*between, always], "bytes for each entry, between turns and after one"


# Losses


def reference(every: int, updates: int) -> list[float]:
    """The same in one process, with the vocabulary's gradients summed by autograd and its group stepped in every ``every``-th."""
    model = lora.wrap(common.tiny_llama(), rank=3, alpha=32.0)
    words = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is word for word in words)]
    optimizers = [torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0) for params in (others, words)]
    losses = []
    for update in range(1, updates + 1):
        ids = common.batch(update % 3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        is_due = update % every == 0
        reduced = others + (words if is_due else [])
        if is_due:
            for word in words:
                word.grad.div_(every)
        torch.nn.utils.clip_grad_norm_(reduced, 1.0)
        for optimizer in optimizers[: 2 if is_due else 1]:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def losses_of(traffic: dict[str, Any] | None, updates: int, config: dict[str, Any], relora: dict[str, Any] | None) -> Any:
    engine = build(traffic, relora, **config)
    losses = [train_update(engine, common.batch(update % 3)) for update in range(1, updates + 1)]
    result = losses, digest(engine)
    common.end(engine)
    return result


@pytest.mark.parametrize(
    ("world_size", "every", "config"),
    [
        (2, 3, {"stage": 2, "accumulation": 3}),
        (4, 2, {"stage": 1, "accumulation": 1}),
        (2, 3, {"stage": 1, "accumulation": 1, "contiguous_gradients": False}),
        (2, 2, {"stage": 2, "accumulation": 2, "overlap_comm": True, "reduce_scatter": False}),
    ],
)
def test_every_kth_update_is_that_of_one_process_which_steps_as_rarely(
    world_size: int, every: int, config: dict[str, Any]
) -> None:
    expected = run(1, reference, every, 10)[0]
    for losses, _ in run(world_size, losses_of, {"vocabulary_every": every}, 10, config, {"rank": 3}):
        assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("traffic", "dtype", "clip"),
    [(None, "fp32", 0.0), ({"vocabulary_every": 2}, "fp32", 1.0), ({"vocabulary_every": 2}, "bf16", 1.0)],
    ids=["the usual way", "every 2", "every 2, bf16"],
)
def test_rows_that_were_not_seen_change_no_bit(traffic: dict[str, Any] | None, dtype: str, clip: float) -> None:
    """Without clipping in the first, since a norm's last bits depend on how the groups are cut."""
    config = {"dtype": dtype, "clip": clip, "accumulation": 2}
    usual = run(2, losses_of, traffic, 9, config, RELORA)
    seen = run(2, losses_of, {**(traffic or {}), "vocabulary_rows": "seen"}, 9, config, RELORA)
    assert seen == usual


# Sums


def sums(cuts: list[tuple[int, int]], wire: torch.dtype) -> dict[str, Any]:
    """This rank's rows, summed with all rows sent and with those alone that are there, in rounds of few rows and in one."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    values = torch.randn(23, 6, generator=generator)
    values[torch.rand(23, generator=generator) < 0.7] = 0.0
    values[3] = -0.0
    owned, seen = [range(*cut) for cut in cuts], values.ne(0).any(1)
    if wire == torch.int8:
        coded = rows.quantise_(values.clone())
    else:
        coded = rows.encode(values, wire)
    ways = [(None, 2**20), (seen, 2**20), (seen, 40), (None, 40)]
    found = [rows.sum_of_own(coded, 6, wire, owned, None, seen=s, entries_per_round=n) for s, n in ways]
    truth = rows.decode(coded, 6, wire).double()
    dist.all_reduce(truth)
    mine = owned[dist.get_rank()]
    return {
        "bits": [f.view(torch.int32).tolist() for f in found],
        "values": found[0].flatten().tolist(),
        "truth": truth[mine.start : mine.stop].flatten().tolist(),
    }


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    "cuts", [[(0, 8), (7, 16), (16, 23)], [(0, 0), (5, 6), (5, 23)]], ids=["a shared row", "one owns nothing"]
)
def test_the_sum_is_the_same_bits_however_it_is_sent(cuts: list[tuple[int, int]], wire: torch.dtype) -> None:
    for result in run(3, sums, cuts, wire):
        assert all(bits == result["bits"][0] for bits in result["bits"])
        assert result["values"] == pytest.approx(result["truth"], abs=1e-5)


# 8 bits


def delivered(traffic: dict[str, Any], with_feedback: bool, updates: int) -> Tensor:
    """The sum of what arrived on this rank, times the updates it was the mean of; the model stands still, on the same batch."""
    engine = build(traffic, {"rank": 3}, lr=0.0)
    zero = engine.optimizer.zero
    route, norm = zero.vocabulary, zero.scaled_global_norm
    arrived = torch.zeros(int(zero.partition_size[route.first]))

    def spy() -> Tensor:
        value = norm()
        if route.is_due:
            arrived.add_(zero.averaged_gradients[route.first].flat_partition, alpha=traffic.get("vocabulary_every", 1))
            if not with_feedback:
                route.pending.clear()
        return value

    zero.scaled_global_norm = spy
    for _ in range(updates):
        train_update(engine, common.batch(0))
    common.end(engine)
    return arrived


@pytest.mark.parametrize("traffic", [{"vocabulary_every": 2}, {"vocabulary_rows": "seen"}], ids=["every 2", "seen"])
def test_what_8_bits_lose_arrives_later(traffic: dict[str, Any]) -> None:
    """One rounding after any number of updates; without feedback the same error with each."""
    num = 24
    in_8_bits = {**traffic, "vocabulary_dtype": "int8"}
    true, kept, dropped = (
        torch.cat(run(2, delivered, how, with_feedback, num))
        for how, with_feedback in ((traffic, True), (in_8_bits, True), (in_8_bits, False))
    )
    step = float(true.abs().max()) / num * traffic.get("vocabulary_every", 1) / 127
    assert float((kept - true).abs().max()) <= 1.02 * step
    assert float((dropped - true).norm()) > 4 * float((kept - true).norm())


# Skipped updates


@contextmanager
def poisoned(param: torch.nn.Parameter, is_on: bool) -> Iterator[None]:
    hook = param.register_hook(lambda grad: grad * float("nan")) if is_on else None
    yield
    if hook is not None:
        hook.remove()


def skips(traffic: dict[str, Any], dtype: str) -> list[tuple[bool, int, bool]]:
    """Eight updates, of which rank 1 has NaNs in the head's gradient in the third and the sixth."""
    engine = build(traffic, RELORA, dtype=dtype, accumulation=2)
    if dtype == "fp16":
        engine.optimizer.loss_scaler.cur_scale = 256.0
    zero, seen = engine.optimizer.zero, []
    for update in range(1, 9):
        with poisoned(engine.module.get_output_embeddings().weight, update in (3, 6) and dist.get_rank() == 1):
            train_update(engine, common.batch(update % 3))
        route = zero.vocabulary
        kept_finite = all(bool(p.isfinite().all()) for p in [*route.pending.values(), *engine.module.parameters()])
        seen.append((zero.overflow, route.gathered, kept_finite))
    common.end(engine)
    return seen


@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp16", marks=needs_fp16)])
def test_a_gradient_that_is_not_finite_is_dropped_with_its_update_everywhere(dtype: str) -> None:
    """With turns of 2: the third update gathers, the sixth delivers; what the fifth gathered waits for the eighth."""
    for traffic in ({"vocabulary_every": 2}, {"vocabulary_every": 2, "vocabulary_dtype": "int8"}):
        for seen in run(2, skips, traffic, dtype):
            assert [overflow for overflow, _, _ in seen] == [update in (3, 6) for update in range(1, 9)]
            assert [gathered for _, gathered, _ in seen] == [1, 0, 0, 0, 1, 1, 2, 0]
            assert all(is_finite for _, _, is_finite in seen)


def first_gathered(dtype: str) -> list[torch.Tensor]:
    """What a rank keeps of the first update's gradients, with a loss scale where there is one."""
    with overruled() if dtype == "fp16" else nullcontext():
        engine = build({"vocabulary_every": 2}, RELORA, dtype=dtype, accumulation=2)
    if dtype == "fp16":
        engine.optimizer.loss_scaler.cur_scale = 256.0
    train_update(engine, common.batch(0))
    kept = [pending.clone() for pending in engine.optimizer.zero.vocabulary.pending.values()]
    common.end(engine)
    return kept


def test_what_is_gathered_in_fp16_is_without_the_loss_scale() -> None:
    """Two sums of 16-bit gradients through two layers: a few of fp16's steps of 2^-11, of the largest entry."""
    for half, full in zip(run(2, first_gathered, "fp16"), run(2, first_gathered, "fp32"), strict=True):
        assert len(half) == len(full) == 2
        for mine, exact in zip(half, full, strict=True):
            assert float((mine - exact).abs().max()) < 2**-6 * float(exact.abs().max())


# Checkpoints


def interrupted(traffic: dict[str, Any], relora: dict[str, Any] | None, folder: str) -> tuple[list[float], list[float]]:
    """Losses of updates 6 to 10, gone on with and taken up from a checkpoint after the fifth."""
    engine = build(traffic, relora, dtype="bf16")
    for update in range(5):
        train_update(engine, common.batch(update))
    engine.save_checkpoint(folder, tag="five")
    straight = [train_update(engine, common.batch(update)) for update in range(5, 10)]
    common.end(engine)
    engine = build(traffic, relora, dtype="bf16")
    engine.load_checkpoint(folder, tag="five")
    resumed = [train_update(engine, common.batch(update)) for update in range(5, 10)]
    common.end(engine)
    return straight, resumed


@pytest.mark.parametrize(
    ("traffic", "relora"),
    [
        ({"vocabulary_every": 3}, None),
        ({"vocabulary_every": 8}, RELORA),
        ({"vocabulary_dtype": "int8"}, RELORA),
        ({"vocabulary_every": 3, "vocabulary_dtype": "int8", "vocabulary_rows": "seen"}, RELORA),
    ],
    ids=str,
)
def test_a_checkpoint_between_two_turns_is_gone_on_with_bit_for_bit(
    traffic: dict[str, Any], relora: dict[str, Any] | None, tmp_path: Path
) -> None:
    for straight, resumed in run(2, interrupted, traffic, relora, str(tmp_path)):
        assert resumed == straight


def losses_in(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("phase", ["full", "lora"])
def test_a_run_goes_on_between_two_turns_on_another_number_of_ranks(settings: dict[str, Any], tmp_path: Path, phase: str) -> None:
    """Warm start of 8 updates, turns of 4, a checkpoint in the middle of one; in fp32 only the order of sums differs."""
    kill_after = {"full": 6, "lora": 14}[phase]
    settings["relora"] |= {"warm_start": 8, "restart_every": 5, "restart_warmup": 1}
    settings["train"] |= {"updates": 18, "checkpoint_every": kill_after - 1}
    settings["traffic"] = {"vocabulary_every": 4, "vocabulary_rows": "seen"}
    settings["wandb"] = {"mode": "disabled"}
    run(2, train_here, at(settings, tmp_path / "whole"))
    run(2, train_here, at(settings, tmp_path / "moved"), kill_after)
    assert run(1, train_here, at(settings, tmp_path / "moved")) == [EXIT_DONE]
    whole, moved = losses_in(tmp_path / "whole"), losses_in(tmp_path / "moved")
    assert len(whole) == 18
    assert moved == pytest.approx(whole, rel=1e-5)
