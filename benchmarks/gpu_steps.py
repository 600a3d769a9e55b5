"""One way of training one model on one GPU, timed: the child of benchmarks/gpu.py, which prints a line of JSON.

python -m benchmarks.gpu_steps '{"model": "llama_1b", "length": 512, "micro_batch": 16, "arm": "relora"}'
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import rounds
from relora_ds.supervision import parts

PEAKS = {"H100": 989.4e12, "H200": 989.4e12}
"""Dense bf16 FLOP/s by the vendor's data sheet (SXM)."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One way of training.

    Attributes:
        model: a preset of :data:`relora_ds.models.build.PRESETS`.
        length, micro_batch, accumulation: tokens of a sequence, sequences of a pass, passes of an update.
        arm: ``full`` (every parameter, this project's engine), ``zero2`` (every parameter, DeepSpeed's ZeRO-2 as it comes), ``peft``
            (PEFT's LoRA under the same DeepSpeed engine, with embeddings, norms and head trained as well) or ``relora``.
        dtype: of weights and products.
        rank, dropout, frozen, linear: as in a recipe's ``relora``.
        loss: as in a recipe's ``model``.
        compile: each block by torch.compile.
        checkpointing: gradient checkpointing.
        hidden, layers, mlp: others than the preset's; the MLP's width and the heads follow ``hidden``.
        vocabulary: rows of embedding and head.
        timers: DeepSpeed's own, which wait for the device in every pass.
        per_parameter: ``once``, or for ``each`` parameter, as DeepSpeed does it: :mod:`relora_ds.zero.per_parameter`.
        updates: timed ones, after two to warm up.
        profile: a table of the CUDA time of one more update, by kernel.
    """

    model: str
    arm: str
    length: int = 512
    micro_batch: int = 16
    accumulation: int = 4
    dtype: str = "bf16"
    rank: int = 128
    dropout: float = 0.0
    frozen: str = "bf16"
    linear: str = "auto"
    loss: str = "torch"
    compile: bool = False
    checkpointing: bool = False
    hidden: int | None = None
    layers: int | None = None
    mlp: int | None = None
    vocabulary: int = 32_100
    timers: bool = True
    per_parameter: str = "once"
    updates: int = 4
    profile: bool = False


def architecture(case: Case) -> Any:
    """The Hugging Face configuration of the model."""
    from relora_ds.models.build import preset_config

    config = preset_config(case.model, case.vocabulary)
    config.use_cache = False
    if case.hidden:
        heads = max(1, case.hidden // 64)
        config.hidden_size, config.intermediate_size, config.head_dim = case.hidden, case.hidden * 43 // 16, case.hidden // heads
        config.num_attention_heads = config.num_key_value_heads = heads
    config.num_hidden_layers = case.layers or config.num_hidden_layers
    config.intermediate_size = case.mlp or config.intermediate_size
    return config


def build(case: Case, device: torch.device) -> nn.Module:
    """The model with random weights, made on the device."""
    from transformers import AutoModelForCausalLM

    from relora_ds.models.loss import attach

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(architecture(case), attn_implementation="sdpa", dtype=DTYPES[case.dtype])
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    attach(model, case.loss, case.micro_batch * case.length)
    return model.train()


def engine_of(case: Case, model: nn.Module) -> Any:
    """The DeepSpeed engine of the arm."""
    import deepspeed

    import relora_ds
    from relora_ds.config import Optimizer
    from relora_ds.engine import initialize

    optimizer = initialize.adamw(Optimizer(lr=1e-4))
    config: dict[str, Any] = {
        "train_batch_size": case.micro_batch * case.accumulation,
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": case.dtype == "bf16"},
        "zero_optimization": {"stage": 2},
    }
    if not case.timers:
        config["timers"] = {"throughput": {"enabled": False}}
    if case.arm == "relora":
        relora = {
            "rank": case.rank,
            "alpha": 32,
            "dropout": case.dropout,
            "restart_every": 1000,
            "frozen": {"dtype": case.frozen},
            "linear": case.linear,
        }
        as_deepspeed = mock.patch.object(initialize, "do_once", lambda zero: None)
        with as_deepspeed if case.per_parameter == "each" else nullcontext():
            return relora_ds.initialize(model=model, optimizer=optimizer, config=config, relora=relora)[0]
    if case.arm == "full":
        return relora_ds.initialize(model=model, optimizer=optimizer, config=config)[0]
    if case.arm == "peft":
        model = with_peft(case, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)[0]


def update(engine: Any, batches: Sequence[Tensor]) -> Tensor:
    """Trains on micro batches, each (sequences, length); returns the mean of their losses, (). Its parts are named for a profiler."""
    losses = []
    for ids in batches:
        with parts.part(parts.FORWARD):
            loss = engine(input_ids=ids, labels=ids).loss
        with parts.part(parts.BACKWARD):
            engine.backward(loss)
        with parts.part(parts.STEP):
            engine.step()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def with_peft(case: Case, model: nn.Module) -> nn.Module:
    """PEFT's LoRA on the same layers; the same other parameters trained."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = LoraConfig(r=case.rank, lora_alpha=32, lora_dropout=case.dropout, target_modules=names, bias="none")
    wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if any(part in name for part in ("embed_tokens", "norm", "lm_head")):
            parameter.requires_grad_(True)
    return wrapped


def flops(model: nn.Module, case: Case) -> tuple[float, float]:
    """Matrix products of a token, forward and backward, without recomputation: full-rank's, and those that the arm really needs.

    Per linear layer 6·in·out where the weight is trained; 4·in·out + 6·r·(in + out) where it is frozen. Attention
    12·width·tokens / 2, because half of it is masked.
    """
    config = architecture(case)
    hidden, mlp = config.hidden_size, config.intermediate_size
    layers, rank = config.num_hidden_layers, case.rank
    linears = [(hidden, hidden)] * 4 + [(hidden, mlp)] * 3
    attention = 6 * layers * hidden * case.length
    head = 6 * hidden * config.vocab_size
    full = layers * sum(6 * i * o for i, o in linears) + attention + head
    if case.arm in ("full", "zero2"):
        return full, full
    return full, layers * sum(4 * i * o + 6 * rank * (i + o) for i, o in linears) + attention + head


def run(case: Case) -> dict[str, Any]:
    """Trains and times; everything that is reported."""
    from relora_ds.models.compiling import compile_blocks

    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    started = time.perf_counter()
    model = build(case, device)
    engine = engine_of(case, model)
    model = engine.module
    if case.compile:
        compile_blocks(model)
    generator = torch.Generator(device).manual_seed(1)

    def step(_number: int = 0) -> Tensor:
        shape = (case.micro_batch, case.length)
        return update(engine, [random_ids(case, shape, generator) for _ in range(case.accumulation)])

    first = time.perf_counter()
    for _ in range(2):
        step()
    wait(device)
    ready = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed = rounds.in_turns({case.arm: step}, case.updates, warm_up=0, settle=partial(wait, device))
    times = timed.seconds[case.arm]
    tokens = case.micro_batch * case.accumulation * case.length
    seconds = statistics.median(times)
    full, needed = flops(model, case)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((value for key, value in PEAKS.items() if key in name), None)
    result = {
        **asdict(case),
        "device": name,
        "tokens_per_s": tokens / seconds,
        "update_s": times,
        "mfu_full": None if peak is None else full * tokens / seconds / peak,
        "mfu_done": None if peak is None else needed * tokens / seconds / peak,
        "flops_ratio": full / needed,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "last_loss": float(timed.returned[case.arm][-1]),
        "build_s": first - started,
        "warm_s": ready - first,
    }
    if case.arm == "relora":
        result["restart_s"] = [seconds_of(engine.optimizer.restart, device) for _ in range(2)]
        result["restart_parts"] = engine.optimizer.last_restart.parts
    if case.profile:
        result["profile"] = profile(step, device)
    return result


def random_ids(case: Case, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(case.vocabulary, shape, device=generator.device, generator=generator)


def profile(step: Callable[[], object], device: torch.device) -> list[tuple[str, float, int]]:
    """Kernels of one update by time: (name, ms, calls), the 40 that take most."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profiler(activities=kinds) as seen:
        step()
        wait(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    kernels = [row for row in seen.key_averages() if not row.key.startswith(parts.PREFIX)]
    rows = sorted(kernels, key=lambda row: -getattr(row, key))
    return [(row.key[:90], getattr(row, key) / 1e3, row.count) for row in rows[:40]]


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29_577}.items():
        os.environ[name] = str(value)
    try:
        result = run(case)
    except torch.OutOfMemoryError:
        result = {**asdict(case), "error": "out of memory"}
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
