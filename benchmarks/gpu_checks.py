"""What tests on CPUs cannot tell of CUDA, asked of one GPU: the child of benchmarks/gpu.py, which prints a line of JSON for each.

python -m benchmarks.gpu_checks [NAME ...]

Without names it does all of them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "num_attention_heads": 4}
PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29578"}
ROOT = Path(__file__).resolve().parents[1]
RECIPE = {
    "method": "relora",
    "model": {"config": {"model_type": "llama", **SIZES, "max_position_embeddings": 128}},
    "relora": {"rank": 16, "warm_start": 10, "restart_every": 10, "restart_warmup": 3},
    "optimizer": {"lr": 2e-3, "warmup": 5, "schedule": "jagged"},
    "train": {"updates": 40, "global_batch": 16, "micro_batch": 8, "eval_every": 20, "checkpoint_every": 10},
    "wandb": {"mode": "disabled"},
    "deepspeed": {
        "train_micro_batch_size_per_gpu": 8,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False},
    },
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def engine(precision: str, accumulation: int = 1, **relora: Any) -> Any:
    """A small LLaMA under ZeRO-2, in the LoRA phase."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import relora_ds

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(device())
    config: dict[str, Any] = {"train_batch_size": 8, "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}}
    config["gradient_accumulation_steps"] = accumulation
    config["timers"] = {"throughput": {"enabled": False}}  # as a recipe has it
    if precision != "fp32":
        config[precision] = {"enabled": True}
    settings = {"rank": 16, "restart_every": 1000, **relora}
    return relora_ds.initialize(model=model, config=config, relora=settings)[0]


def batch(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(SIZES["vocab_size"], (8, 64), generator=generator).to(device())


def train(given: Any, first: int, updates: int) -> list[float]:
    """Losses of updates that all see the same few batches."""
    losses = []
    for number in range(first, first + updates):
        ids = batch(number % 4)
        loss = given(input_ids=ids, labels=ids).loss
        given.backward(loss)
        given.step()
        losses.append(float(loss))
    return losses


@torch.no_grad()
def loss_of(given: Any) -> float:
    return sum(float(given.module(input_ids=batch(n), labels=batch(n)).loss) for n in range(4)) / 4


def exact_products() -> dict[str, Any]:
    """Products of a merge have the CPU's bits, whatever TF32 is allowed and with any number of rows."""
    from relora_ds.method import exact

    torch.set_float32_matmul_precision("high")
    try:
        generator = torch.Generator().manual_seed(0)
        seen = 0
        for out, inner, rank in ((5461, 2048, 128), (37, 20, 3), (1024, 2736, 512), (300, 2048, 64)):
            left, right = torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator) * 1e-2
            host = exact.product(left, exact.columns(right))
            there = exact.columns(right.to(device()))
            for rows in (1, 33, 257, out):
                for start in range(0, min(out, 4 * rows), rows):
                    piece = exact.product(left[start : start + rows].to(device()), there).cpu()
                    assert torch.equal(piece, host[start : start + rows]), (out, inner, rank, rows, start)
                    seen += 1
        return {"pieces": seen}
    finally:
        torch.set_float32_matmul_precision("highest")


def int8_stores() -> dict[str, Any]:
    """An int8 store made and read on the GPU is the CPU's, bit for bit."""
    from relora_ds.method.frozen_weights import FrozenWeight

    weight = torch.randn(333, 1000, generator=torch.Generator().manual_seed(0)) * 0.02
    host, there = FrozenWeight(weight, "int8"), FrozenWeight(weight.to(device()), "int8")
    assert torch.equal(host.values, there.values.cpu()) and torch.equal(host.scales, there.scales.cpu())
    assert torch.equal(host.read(), there.read().cpu())
    return {"bytes": there.stored_bytes}


def selections() -> dict[str, Any]:
    """What survives a reset, and a checksum, are the CPU's, of tensors that the GPU works on together."""
    from relora_ds.method import pruning
    from relora_ds.method.frozen_weights import checksum

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(numel, generator=generator) for numel in (7, 300, 70_000, 1 << 20, 9 << 20)]
    values.append(torch.randint(5, (50_000,), generator=generator).to(torch.float32))  # of equal ones the first are kept
    numels, whole = [value.numel() for value in values], [(number, 0) for number in range(len(values))]
    for across in (False, True):
        masks = []
        for where in ("cpu", device()):
            keys = (pruning.KeyFragment(n, 0, pruning.magnitude_keys(value.to(where))) for n, value in enumerate(values))
            found = pruning.select_largest(
                keys, numels, 0.99, lambda counts: None, pieces=whole, across_tensors=across, device=where
            )
            masks.append([mask.cpu() for mask in found.values()])
        assert all(torch.equal(host, there) for host, there in zip(*masks, strict=True)), f"{across=}"
    for value in (*values, values[3].to(torch.bfloat16)):
        assert int(checksum(value)) == int(checksum(value.to(device()))), value.numel()
    return {"entries": sum(numels)}


def overflow() -> dict[str, Any]:
    """One gradient that is not finite skips the update, and the next one trains."""
    given = engine("bf16")
    train(given, 0, 1)
    for factor in (float("inf"), float("nan")):
        before = [param.detach().clone() for param in given.module.parameters()]
        ids = batch(1)
        given.backward(given(input_ids=ids, labels=ids).loss * factor)
        given.step()
        assert given.optimizer.overflow, factor
        assert all(torch.equal(old, new) for old, new in zip(before, given.module.parameters(), strict=True)), factor
    (loss,) = train(given, 1, 1)
    assert not given.optimizer.overflow and math.isfinite(loss)
    return {"loss": round(loss, 4)}


def restart(precision: str, frozen: str, master: str) -> dict[str, Any]:
    """A restart leaves the loss where it was, to the store's rounding, and training goes on below it."""
    given = engine(precision, frozen={"dtype": frozen, "master": master})
    losses = train(given, 0, 40)
    before = loss_of(given)
    given.optimizer.restart()
    after = loss_of(given)
    later = train(given, 40, 40)
    bound = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3, "int8": 5e-2}[precision if frozen == "auto" else frozen]
    assert losses[-1] < 0.9 * losses[0], losses
    assert abs(after - before) < bound * before, (before, after)
    assert later[-1] < losses[-1], (losses[-1], later[-1])
    return {"first": losses[0], "before": before, "after": after, "last": later[-1], "bound": bound}


class Batches:
    """Stands for a token folder."""

    def batch(self, samples: Sequence[int]) -> Tensor:
        return torch.randint(SIZES["vocab_size"], (8, 64), generator=torch.Generator().manual_seed(samples[0]))


def waiting() -> dict[str, Any]:
    """Four micro batches an update: the host waits for the GPU in none but the last, nor does a batch on its way there."""
    from relora_ds.data.prefetch import Prefetch
    from relora_ds.models.packing import none_packed

    given, num_watched = engine("bf16", accumulation=4), 0
    order = [[number] for number in range(12)]
    with closing(Prefetch(Batches(), order, device())) as ahead, none_packed():  # type: ignore[arg-type]
        for number, samples in enumerate(order):
            watched = torch.cuda.is_available() and number >= 4 and not given.is_gradient_accumulation_boundary()
            if watched:
                torch.cuda.set_sync_debug_mode("error")
            try:
                ids = ahead.batch(samples)
                given.backward(given(input_ids=ids, labels=ids).loss)
                given.step()
                num_watched += watched
            finally:
                if watched:
                    torch.cuda.set_sync_debug_mode("default")
    return {"micro_batches": num_watched}


def memory() -> dict[str, Any]:
    """Between a full-rank engine and the next one nothing of it stays on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import relora_ds
    from relora_ds.engine.release import collect

    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(device())
    config = {"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    from relora_ds.config import Optimizer
    from relora_ds.engine.initialize import adamw

    given = relora_ds.initialize(model=model, config=config, optimizer=adamw(Optimizer(lr=1e-3)))[0]
    train(given, 0, 3)
    held = allocated()
    relora_ds.release(given, keep_on="cpu")
    del given
    collect()
    left = allocated()
    assert device().type == "cpu" or left < 2**20 + 0.02 * held, (held, left)
    return {"held_mib": held / 2**20, "left_mib": left / 2**20}


def allocated() -> int:
    """Bytes on the device, but for cuBLAS's workspaces, which torch keeps for the next product."""
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def trained(work: Path, tokens: Path) -> dict[str, Any]:
    """`relora-ds train` with a warm start and restarts: to its end, and stopped in the middle and resumed; and an evaluation."""
    import yaml

    runs = {}
    for name in ("whole", "resumed"):
        recipe = {**RECIPE, "run": {"dir": str(work / name), "seed": 1}, "data": {"path": str(tokens), "sequence_length": 64}}
        path = work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        if name == "resumed":
            stopped = start_and_stop(path, work / name, after=17)
            assert 17 <= stopped < 40, stopped
        command("train", str(path), "--nproc", "1")
        runs[name] = losses_of(work / name)
    assert list(runs["whole"]) == list(range(1, 41)) == list(runs["resumed"])
    apart = max(abs(runs["whole"][u] - runs["resumed"][u]) / runs["whole"][u] for u in runs["whole"])
    said = command("eval", str(work / "whole"))
    assert runs["whole"][40] < 0.9 * runs["whole"][1]
    assert apart < 2e-2, apart
    return {
        "first": runs["whole"][1],
        "last": runs["whole"][40],
        "largest_difference_of_resumed": apart,
        "eval": said.strip()[-200:],
    }


def losses_of(run: Path) -> dict[int, float]:
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return {record["update"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}


def start_and_stop(recipe: Path, run: Path, after: int) -> int:
    """Trains until a given update is in the log, and stops with TERM; the update of the checkpoint."""
    words = [sys.executable, "-m", "relora_ds", "train", str(recipe), "--nproc", "1"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and max(losses_of(run), default=0) < after:
            time.sleep(0.02)
        process.terminate()
        assert process.wait(timeout=200) == 75, process.returncode
    return max(losses_of(run))


def command(*words: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "relora_ds", *words], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, f"{words}: {result.returncode}\n{result.stdout[-1500:]}\n{result.stderr[-2500:]}"
    return result.stdout


def text_tokens(work: Path) -> Path:
    """A token folder of counted English, by the project's own prepare."""
    text = work / "text.jsonl"
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    lines = (" ".join(names[int(digit)] for digit in str(number * 7919)) + "." for number in range(20_000))
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    command("prepare", str(text), str(work / "tokens"), "--vocab-size", str(SIZES["vocab_size"]))
    return work / "tokens"


def trained_on_text() -> dict[str, Any]:
    """:func:`trained`, on tokens of its own, as the command line would start it."""
    for variable in PLACE:
        os.environ.pop(variable, None)
    with tempfile.TemporaryDirectory() as work:
        return trained(Path(work), text_tokens(Path(work)))


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "products of a merge": exact_products,
    "int8 stores": int8_stores,
    "what survives a reset": selections,
    "memory between engines": memory,
    "no waiting in a micro batch": waiting,
    "a gradient that is not finite": overflow,
    "restart, fp32": lambda: restart("fp32", "auto", "none"),
    "restart, bf16": lambda: restart("bf16", "auto", "none"),
    "restart, bf16, sharded master": lambda: restart("bf16", "auto", "sharded"),
    "restart, bf16 over int8": lambda: restart("bf16", "int8", "sharded"),
    "restart, fp16": lambda: restart("fp16", "auto", "sharded"),
    "train, resume, eval": trained_on_text,
}
"""By name, in the order in which they are done: the last one leaves the environment that the others need."""


def names() -> list[str]:
    """Of the checks that this machine can do: fp16 needs CUDA."""
    return [name for name in CHECKS if name != "restart, fp16" or torch.cuda.is_available()]


def main() -> None:
    os.environ |= PLACE
    asked = sys.argv[1:] or names()
    for name, check in CHECKS.items():
        if name in asked:
            tell(name, check)


def tell(name: str, check: Callable[[], dict[str, Any]]) -> None:
    started = time.perf_counter()
    try:
        found = {"passed": True, **check()}
    except Exception as error:
        found = {"passed": False, "error": f"{type(error).__name__}: {error}"[-3000:], "where": traceback.format_exc()[-1500:]}
    print("CHECK " + json.dumps({"check": name, "seconds": round(time.perf_counter() - started, 1), **found}), flush=True)


if __name__ == "__main__":
    main()
