"""What ``relora-ds plan`` estimates, against engines: the memory at most, by moment, and the bytes of an update."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig

import relora_ds
from relora_ds.bandwidth import formulas
from relora_ds.config import Optimizer, parse, parse_relora
from relora_ds.data.token_dataset import TokenIndex
from relora_ds.ds_config.fit import DTYPES
from relora_ds.engine.initialize import adamw
from relora_ds.method import lora
from relora_ds.models import build as models
from relora_ds.planning import footprint, rehearsal
from relora_ds.planning import phase_change as change_footprint
from relora_ds.planning.plan import WIDTHS, Phase
from relora_ds.training import phases
from relora_ds.training.preflight import Checked
from tests.distributed import common
from tests.distributed.pool import run
from tests.memory import PeakMemory
from tests.wire import Wire

SIZES = {"vocab_size": 1024, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
"""About 0.5M parameters: weights, states, gradients and activations of two samples of 48 tokens are all within a factor of five."""
LORA = {"rank": 12, "restart_every": 1000, "restart_warmup": 0}
INT8 = {**LORA, "frozen": {"dtype": "int8"}}
BUCKET = 300_000
MICRO_BATCH, LENGTH = 2, 48


def case(**changes: Any) -> dict[str, Any]:
    plain = {
        "world_size": 1, "stage": 2, "accumulation": 1, "dtype": "bf16", "relora": LORA, "checkpointing": False, "zero": {},
        "sizes": SIZES, "micro_batch": MICRO_BATCH, "length": LENGTH, "bucket": BUCKET, "as_on_gpus": False,
    }  # fmt: skip
    return {**plain, **changes}


def config_of(of: dict[str, Any]) -> dict[str, Any]:
    zero = {"reduce_bucket_size": of["bucket"], **of["zero"]}
    config = common.deepspeed_config(stage=of["stage"], dtype=of["dtype"], accumulation=of["accumulation"], **zero)
    del config["optimizer"]
    return {**config, "train_batch_size": of["micro_batch"] * of["accumulation"] * of["world_size"]}


def measured(of: dict[str, Any]) -> dict[str, int]:
    """The most bytes of live tensors on this rank, of building, two updates and a restart; the model counts from its making."""
    if of["as_on_gpus"]:
        with common.as_on_gpus():
            return measured({**of, "as_on_gpus": False})
    gc.collect()
    peaks: dict[str, int] = {}

    def over(moment: str, memory: PeakMemory) -> None:
        peaks[moment] = max(peaks.get(moment, 0), memory.peak)
        memory.peak = memory.live

    with PeakMemory() as memory:
        architecture = LlamaConfig(**of["sizes"], bos_token_id=None, eos_token_id=None)
        model = models.build(architecture, attention="sdpa", dtype=DTYPES[of["dtype"]], device=torch.device("cpu")).train()
        if of["checkpointing"]:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if of["relora"]:
            settings = parse_relora(of["relora"])
            shard = (dist.get_rank(), dist.get_world_size()) if settings.frozen.master == "sharded" else None
            lora.wrap(model, rank=settings.rank, alpha=settings.alpha, frozen=settings.frozen, shard=shard)
        gc.collect()
        memory.peak = memory.live
        engine, *_ = relora_ds.initialize(
            model=model, config=config_of(of), optimizer=adamw(Optimizer()), relora=of["relora"],
            model_parameters=None if of["relora"] else lora.param_groups(model),
        )  # fmt: skip
        over("start", memory)
        for _ in range(2):
            for micro in range(of["accumulation"]):
                ids = torch.randint(0, of["sizes"]["vocab_size"], (of["micro_batch"], of["length"]))
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                if micro == of["accumulation"] - 1:
                    over("backward pass and exchange", memory)
                engine.step()
            over("step", memory)
        if of["relora"]:
            engine.optimizer.restart()
            over("restart", memory)
    common.end(engine)
    return peaks


def estimated(of: dict[str, Any]) -> dict[str, int]:
    settings = parse_relora(of["relora"]) if of["relora"] else None
    if settings is not None and settings.frozen.dtype == "auto":
        settings = settings.model_copy(update={"frozen": settings.frozen.model_copy(update={"dtype": of["dtype"]})})
    rehearsed = rehearsal.build(
        LlamaConfig(**of["sizes"], bos_token_id=None, eos_token_id=None), dtype=DTYPES[of["dtype"]], settings=settings,
        gradient_checkpointing=of["checkpointing"], on_cuda=False,
    )  # fmt: skip
    width = WIDTHS[of["dtype"]]
    engine = footprint.Engine(
        world_size=of["world_size"], stage=of["stage"], accumulation=of["accumulation"], width=width, wire=width,
        bucket=of["bucket"], overlap=of["zero"].get("overlap_comm", False), on_cuda=of["as_on_gpus"],
    )  # fmt: skip
    peaks = Phase(settings, rehearsed, of["length"]).peaks(engine, of["micro_batch"])
    totals = {moment: peak.total for moment, peak in peaks.items()}
    totals["backward pass and exchange"] = max(totals.pop("backward pass"), totals.pop("exchange"))
    return totals


def highest(of: dict[str, Any], measure: Callable[[dict[str, Any]], dict[str, int]] = measured) -> dict[str, int]:
    """What the rank with the most measured, by moment."""
    by_rank = run(of["world_size"], measure, of)
    return {moment: max(peaks[moment] for peaks in by_rank) for moment in by_rank[0]}


def checked_for(of: dict[str, Any]) -> Checked:
    """A recipe of two phases, as far as their change asks for it."""
    architecture = LlamaConfig(**of["sizes"], bos_token_id=None, eos_token_id=None)
    config = parse({
        "run": {"dir": "none"}, "model": {"config": {"model_type": "llama"}}, "data": {"path": "none", "sequence_length": 8},
        "relora": {**of["relora"], "warm_start": 1}, "train": {"updates": 9, "global_batch": 1, "micro_batch": 1},
        "deepspeed": {},
    })  # fmt: skip
    return Checked(config, config_of(of), architecture, cast(TokenIndex, None))


def measured_change(of: dict[str, Any]) -> dict[str, int]:
    """The most bytes of live tensors on this rank while a run changes its phase, after two updates at full rank."""
    gc.collect()
    checked = checked_for(of)
    with PeakMemory() as memory:
        model = models.build(
            checked.architecture, attention="sdpa", dtype=DTYPES[of["dtype"]], device=torch.device("cpu")
        ).train()
        engine = phases.full_engine(model, checked)
        for _ in range(2):
            ids = torch.randint(0, of["sizes"]["vocab_size"], (of["micro_batch"], of["length"]))
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        gc.collect()
        memory.peak = memory.live
        before = phases.end_full_rank(engine, checked, torch.device("cpu"))
        del engine
        engine = phases.begin_lora(before, checked, torch.device("cpu"))
    common.end(engine)
    return {change_footprint.MOMENT: memory.peak}


def estimated_change(of: dict[str, Any]) -> dict[str, int]:
    settings = parse_relora(of["relora"])
    if settings.frozen.dtype == "auto":
        settings = settings.model_copy(update={"frozen": settings.frozen.model_copy(update={"dtype": of["dtype"]})})
    architecture, dtype = checked_for(of).architecture, DTYPES[of["dtype"]]
    full, factored = (rehearsal.build(architecture, dtype=dtype, settings=how, on_cuda=False) for how in (None, settings))
    width = WIDTHS[of["dtype"]]
    engine = footprint.Engine(
        world_size=of["world_size"], stage=of["stage"], accumulation=1, width=width, wire=width, bucket=of["bucket"],
        overlap=False, on_cuda=False,
    )  # fmt: skip
    peak = change_footprint.change_of_phase(full, factored, engine, settings.frozen, keep_moments=settings.keep_moments)
    return {change_footprint.MOMENT: peak.total}


@pytest.mark.parametrize(
    "of",
    [
        case(dtype="fp32"),
        case(relora=INT8, stage=1),
        case(world_size=2, relora={**LORA, "keep_moments": True}),
        case(world_size=2, relora={**LORA, "frozen": {"dtype": "int8", "master": "sharded"}}),
        case(world_size=2, stage=1, dtype="fp32", relora={**LORA, "frozen": {"dtype": "bf16", "master": "sharded"}}),
        case(world_size=2, relora={**LORA, "rank": 64}),
    ],
    ids=["fp32", "int8", "keep moments", "sharded int8", "sharded bf16", "large factors"],
)
def test_memory_of_the_change_of_phase(of: dict[str, Any]) -> None:
    """Within 5%, as the other moments."""
    told = estimated_change(of)
    for _ in range(3):  # see test_memory_at_most
        if told == pytest.approx(most := highest(of, measured_change), rel=0.05):
            break
    assert told == pytest.approx(most, rel=0.05)


@pytest.mark.parametrize(
    "of",
    [
        case(relora=None, dtype="fp32"),
        case(relora=INT8, accumulation=3),
        case(world_size=2, relora=INT8, checkpointing=True),
        common.long(case(world_size=2, stage=1, accumulation=3)),
        common.long(case(world_size=2, relora=None, zero={"overlap_comm": True})),
        case(world_size=2, dtype="fp32", accumulation=3, relora={**LORA, "frozen": {"dtype": "int8", "master": "sharded"}}),
        case(world_size=2, relora=None, as_on_gpus=True, length=8, bucket=1_000_000),  # the exchange rules
        common.long(
            case(
                world_size=2, dtype="fp32", relora={**LORA, "init": "residual", "frozen": {"dtype": "int8", "master": "sharded"}}
            )
        ),
    ],
    ids=[
        "full",
        "int8, accumulation",
        "int8, checkpointing",
        "stage 1, accumulation",
        "full, overlap",
        "sharded, accumulation",
        "full, exchanged as on GPUs",
        "sharded, from the residual",
    ],
)
def test_memory_at_most(of: dict[str, Any]) -> None:
    """Within 5% at every moment, so also at the highest: what is left are scalars, positions and hashes."""
    told, most = estimated(of), highest(of)
    assert set(told) == set(most)
    for _ in range(3):  # the least of them: on busy cores gloo's threads may let go of a tensor late
        if told == pytest.approx(most, rel=0.05):
            break
        again = highest(of)
        most = {moment: min(num_bytes, again[moment]) for moment, num_bytes in most.items()}
    assert told == pytest.approx(most, rel=0.05)


def sent(stage: int, accumulation: int, own_way: bool) -> tuple[int, float, float]:
    """(trainable parameters, bytes of an update on this rank, of them norms and flags)."""
    config = common.deepspeed_config(stage=stage, dtype="bf16", accumulation=accumulation, reduce_scatter=not own_way)
    model = common.tiny_llama(vocab_size=4096, hidden_size=128, intermediate_size=352)
    engine, *_ = relora_ds.initialize(model=model, config=config, relora={**LORA, "rank": 8})
    trainable = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    micro_batches = common.my_rows(common.batch(0)).chunk(accumulation)
    with Wire() as wire:
        for ids in micro_batches:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
    common.end(engine)
    return trainable, wire.sent_bytes, wire.scalar_bytes


@pytest.mark.parametrize(
    ("way", "stage", "accumulation"), [("owner", 2, 3), ("owner", 1, 1), ("all-reduce", 2, 3), ("all-reduce", 1, 3)]
)
def test_bytes_of_an_update(way: formulas.Way, stage: int, accumulation: int) -> None:
    results = run(2, sent, stage, accumulation, way == "all-reduce")
    told = formulas.update_bytes(
        results[0][0], world_size=2, gradient_width=2, parameter_width=2, stage=stage, accumulation=accumulation, way=way
    )
    mean = sum(num_bytes for _, num_bytes, _ in results) / 2  # a rank that owns a little more sends a little less
    assert mean == pytest.approx(told.gradient + told.parameters, rel=0.02)
    assert results[0][2] == pytest.approx(told.norm)
