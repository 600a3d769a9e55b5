"""``relora-ds plan``: its options, and the tables that it prints."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relora_ds.cli.options import add_recipe, new_command
from relora_ds.config import load
from relora_ds.errors import EXIT_DONE, ConfigError, nearest, with_rest
from relora_ds.launch import libraries
from relora_ds.reports.tables import aligned
from relora_ds.units import human_bytes, human_seconds, parse_bytes

GPUS = {
    "h100": (989, 80), "h200": (989, 141), "a100": (312, 80), "l40s": (362, 48), "v100": (125, 32), "rtx4090": (165, 24),
}  # fmt: skip
"""Peak of dense bf16 products (V100: fp16) in teraflops, and memory in GB (of the largest version), by the vendors' data sheets."""
PHASES = {"full": "full-rank phase", "lora": "LoRA phase"}


def add_command(parent: Any) -> None:
    """Adds ``plan`` to the parser of ``relora-ds``."""
    plan = new_command(
        parent, "plan", run_plan, "Estimate memory, network traffic and time of a recipe on N GPUs.",
        about="""\
Nothing is started: no GPU, process group or token folder is needed. The last
lines say whether the recipe fits, and which settings would.""",
        examples=[
            "relora-ds plan recipes/llama_1b.yaml --gpus 64 --gpu a100 --vocab-size 32100",
            "relora-ds plan recipes/llama_130m.yaml --gpus 1 --gpu rtx4090 --vocab-size 32100 train.micro_batch=50",
        ],
    )  # fmt: skip
    add_recipe(plan)
    plan.add_argument("--gpus", metavar="N", type=int, required=True, help="GPUs of the whole job, 1 to 10,000.")
    plan.add_argument(
        "--gpus-per-node", metavar="N", type=int,
        help="GPUs of a node, which share its network link. Default: 8; with --device cpu, 1.",
    )  # fmt: skip
    plan.add_argument(
        "--link", metavar="SPEED", default="100Gbit",
        help="Speed of a node's network link in each direction, e.g. 1Gbit, 200Gbit or 25GB/s. Default: %(default)s.",
    )  # fmt: skip
    plan.add_argument(
        "--gpu", metavar="NAME", default="h100",
        help=f"Model of the GPUs, for their peak and memory: {', '.join(GPUS)}. Default: %(default)s.",
    )  # fmt: skip
    plan.add_argument("--gpu-memory", metavar="SIZE", help="Memory of one GPU, e.g. 80GB or 40GiB. Default: that of --gpu.")
    plan.add_argument("--tflops", metavar="X", type=float, help="Peak of one GPU in TFLOP/s. Default: that of --gpu in bf16.")
    plan.add_argument(
        "--mfu", metavar="SHARE", type=float, default=0.4,
        help="Share of the peak that training reaches (model FLOPs utilisation). Default: %(default)s.",
    )  # fmt: skip
    plan.add_argument(
        "--vocab-size", metavar="N", type=int,
        help="Vocabulary of the tokenizer, where data.path is not there yet and the model does not say it.",
    )  # fmt: skip
    plan.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="Where to train. Default: %(default)s.")
    plan.add_argument("--json", action="store_true", help="Print everything as JSON, in bytes and seconds.")


def run_plan(options: argparse.Namespace, rest: Sequence[str]) -> int:
    overrides = with_rest(options.overrides, rest, options.known())
    for key, value, most in (("--gpus", options.gpus, 10_000), ("--gpus-per-node", options.gpus_per_node, 10_000)):
        if value is not None and not 1 <= value <= most:
            raise ConfigError(key, value, f"must be 1 to {most:,}")
    for option, number, low, limit in (
        ("--mfu", options.mfu, 0.0, math.inf),
        ("--tflops", options.tflops, 0.0, 1e6),
        ("--vocab-size", options.vocab_size, 1.0, 1e8),
    ):
        if number is not None and not number > low:
            raise ConfigError(option, number, f"must be above {low:g}")
        if number is not None and number > limit:
            raise ConfigError(option, number, f"must be at most {limit:,.0f}")
    if options.mfu > 1:
        raise ConfigError("--mfu", options.mfu, "is a share of the peak", "use a number up to 1")
    if options.gpu not in GPUS:
        raise ConfigError("--gpu", options.gpu, "unknown GPU", f"{nearest(options.gpu, GPUS)}; or say --tflops and --gpu-memory")
    libraries.quiet_libraries()
    tflops, memory = GPUS[options.gpu]
    link = parse_bytes(options.link, "--link")
    gpu_memory = parse_bytes(options.gpu_memory, "--gpu-memory") if options.gpu_memory else memory * 1e9
    config = load(options.recipe, overrides)
    from relora_ds.planning.plan import Machine, Planner  # imports torch

    machine = Machine(
        gpus=options.gpus, gpus_per_node=options.gpus_per_node or (8 if options.device == "cuda" else 1), link=link,
        memory=gpu_memory, flops=(options.tflops or tflops) * 1e12 * options.mfu, on_cuda=options.device == "cuda",
    )  # fmt: skip
    answer = Planner(config, Path(options.recipe), machine, options.vocab_size).answer()
    print(json.dumps(answer, indent=2) if options.json else "\n".join(tables(answer)))
    return EXIT_DONE


def tables(answer: Mapping[str, Any]) -> list[str]:
    """The answer of :meth:`relora_ds.planning.plan.Planner.answer` for people."""
    lines = [
        f"{answer['model']}; {answer['method']}",
        f"{answer['gpus']:,} GPU(s), ZeRO stage {answer['stage']}, {answer['dtype']}, micro batch {answer['micro_batch']}, "
        f"{answer['accumulation']} of them an update",
        "",
        *memory_table(answer["memory"]),
    ]
    peak = answer["peak"]
    lines.append(
        f"The peak is {human_bytes(peak['bytes'])} of {human_bytes(answer['gpu_bytes'])}, "
        f"in the {PHASES[peak['phase']]} ({peak['moment']})."
    )
    lines += ["", *update_table(answer["update"], answer["full_rank_by_defaults"])]
    if answer["restart"]:
        restart = answer["restart"]
        lines.append(
            f"A restart, every {restart['every']:,} updates, sends {human_bytes(restart['bytes'])}: "
            f"{human_seconds(restart['link_s'])} on a node's link."
        )
        lines.append(
            f"With {restart['count']} restart(s) the weights' change can reach rank {restart['rank']:,}; "
            f"the narrowest layer's is {restart['of']:,}."
        )
    return [*lines, "", *advice_table(answer["advice"]), "", answer["note"]]


def memory_table(memory: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """What lies on one GPU when it holds the most, by part, and the most by moment."""
    most = {name: max(moments.values(), key=lambda parts: sum(parts.values())) for name, moments in memory.items()}
    part_names = list(dict.fromkeys(part for parts in most.values() for part in parts if any(p.get(part) for p in most.values())))
    moment_names = list(dict.fromkeys(moment for moments in memory.values() for moment in moments))
    rows = [["memory of one GPU at its fullest", *(PHASES[name] for name in memory)]]
    rows += [[part, *(_bytes(parts.get(part)) for parts in most.values())] for part in part_names]
    rows += [["together", *(_bytes(sum(parts.values())) for parts in most.values())], []]
    rows.append(["the most at one time", *(PHASES[name] for name in memory)])
    rows += [
        [moment, *(_bytes(sum(moments[moment].values()) if moment in moments else None) for moments in memory.values())]
        for moment in moment_names
    ]
    return aligned(rows)


def update_table(update: Mapping[str, Mapping[str, float]], baseline: Mapping[str, float]) -> list[str]:
    columns = {PHASES[name]: cost for name, cost in update.items()} | {"full-rank, DeepSpeed's defaults": baseline}
    figures: list[tuple[str, str, Callable[[float], str]]] = [
        ("trainable parameters", "trainable", "{:,}".format),
        ("a rank sends: gradients", "gradient_bytes", human_bytes),
        ("parameters", "parameter_bytes", human_bytes),
        ("norm, loss, flags", "scalar_bytes", human_bytes),
        ("computing", "compute_s", human_seconds),
        ("on a node's link", "link_s", human_seconds),
        ("an update at most (not overlapped)", "at_most_s", human_seconds),
        ("if all is overlapped", "overlapped_s", human_seconds),
    ]
    rows = [["an update", *columns]]
    rows += [[label, *(told(cost[key]) for cost in columns.values())] for label, key, told in figures]
    for label, key in (("speed-up, not overlapped", "at_most_s"), ("speed-up, overlapped", "overlapped_s")):
        rows.append([label, *(f"{baseline[key] / cost[key]:.2f}" for cost in columns.values())])
    limited = [name for name, cost in columns.items() if cost["link_s"] > cost["compute_s"]]
    verdict = (
        f"The link, not the GPU, is the limit in: {', '.join(limited)}." if limited else "The GPU, not the link, is the limit."
    )
    return [*aligned(rows), verdict]


def advice_table(advice: Mapping[str, Any]) -> list[str]:
    """The largest micro batches that fit, and what to change."""
    rows = [["fits with a tenth left free", "largest micro batch", "peak"]]
    for choice in advice["choices"]:
        label = f"stage {choice['stage']}" + (f", frozen {choice['frozen']}" if choice["frozen"] else "")
        label += ", gradient checkpointing" if choice["gradient_checkpointing"] else ""
        rows.append([label, str(choice["micro_batch"] or "none"), _bytes(choice["bytes"])])
    verdict = (
        "fits, as far as is estimated: evaluation, checkpoints and host memory are not" if advice["fits"] else "does not fit"
    )
    return [f"This recipe {verdict}.", *aligned(rows), *advice["hints"]]


def _bytes(count: float | None) -> str:
    return "-" if count is None else human_bytes(count)
