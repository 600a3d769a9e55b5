"""Memory over a warm start, the change of phase and the LoRA phase, beside the same run resumed in its LoRA phase.

    python -c "from benchmarks.phase_memory import main; main()"

Two ranks over gloo; bytes of live tensors on rank 0, without those that were there before: the most at one time, counted at the
dispatcher, and what is held after a collection. ``main()`` runs on older versions of the project, too, for a comparison.
"""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from relora_ds.config import parse
from relora_ds.data.prepare import prepare
from relora_ds.launch import places
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.distributed import pool
from tests.distributed.pool import close_all, run
from tests.memory import PeakMemory, live_bytes

DEMO = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1024}
LLAMA_60M = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32100}
WARM_START, UPDATES = 2, 4


def recipe(folder: Path, model: dict[str, Any], frozen: dict[str, Any], *, bf16: bool) -> dict[str, Any]:
    """Two updates at full rank, two with factors, one sample on each rank: of 128 tokens, of 16 for llama_60m."""
    rank = 16 if model is DEMO else 128
    return {
        "run": {"dir": str(folder / "run"), "seed": 1},
        "model": {"config": {"model_type": "llama", **model}},
        "data": {"path": str(folder / "tokens"), "sequence_length": 128 if model is DEMO else 16},
        "relora": {"rank": rank, "warm_start": WARM_START, "restart_every": 1000, "restart_warmup": 0, "frozen": frozen},
        "train": {"updates": 10, "global_batch": 2, "micro_batch": 1},
        "wandb": {"mode": "disabled"},
        "deepspeed": {
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 5_000_000},
            **({"bf16": {"enabled": True}} if bf16 else {}),
        },
    }  # fmt: skip


def measure(content: dict[str, Any]) -> dict[str, int]:
    """Bytes on this rank, by moment; leaves a checkpoint, from which the next call goes on."""
    place = places.discover()
    assert place is not None
    found: dict[str, int] = {}
    before = live_bytes()
    with PeakMemory() as memory:

        def note(name: str) -> None:
            found[f"{name}, most"], found[f"{name}, held"] = memory.peak, live_bytes() - before
            memory.peak = memory.live

        trainer = Trainer(check(parse(content), Path("recipe.yaml"), place.world_size), place, torch.device("cpu"))
        first = trainer.done.update + 1
        for update in range(first, first + UPDATES):
            if update == WARM_START + 1:
                note("full-rank phase")
                trainer.enter_phase(update)
                note("change of phase")
            trainer.update(update, False)
        note("LoRA phase")
    trainer.save(wait=True)
    trainer.close(exit_code=1)
    trainer.engine.destroy()
    del trainer
    gc.collect()
    return found


def main() -> None:
    pool.TIMEOUT_S = 1800.0  # llama_60m takes minutes on two cores
    columns = ["full-rank phase, most", "change of phase, most", "LoRA phase, most", "LoRA phase, held"]
    print(f"| MB on rank 0 of 2 | {' | '.join(columns)} | LoRA phase resumed, held |")
    print("|---|" + "---|" * (len(columns) + 1))
    for name, model in (("demo", DEMO), ("llama_60m", LLAMA_60M)):
        for label, frozen in (("bf16", {}), ("int8", {"dtype": "int8"})):
            with tempfile.TemporaryDirectory() as folder:
                texts = [{"text": f"The number {i} comes after {i - 1} and before {i + 1}."} for i in range(1000)]
                source = Path(folder) / "text.jsonl"
                source.write_text("".join(json.dumps(text) + "\n" for text in texts))
                prepare(str(source), Path(folder) / "tokens", vocab_size=300, holdout=0.1, progress=False)
                content = recipe(Path(folder), model, frozen, bf16=True)
                over = run(2, measure, content)[0]
                close_all()
                resumed = run(2, measure, content)[0]
                close_all()
            values = [over[column] for column in columns] + [resumed["LoRA phase, held"]]
            print(f"| {name}, {label} | " + " | ".join(f"{value / 1e6:.2f}" for value in values) + " |", flush=True)
