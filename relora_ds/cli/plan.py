"""``relora-ds plan``: its options, and the tables that it prints."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relora_ds.config import load
from relora_ds.errors import EXIT_DONE, ConfigError, nearest, with_rest
from relora_ds.launch import libraries
from relora_ds.paths import text_argument
from relora_ds.reports.tables import aligned
from relora_ds.units import parse_bytes

GPUS = {
    "h100": (989, 80), "h200": (989, 141), "a100": (312, 80), "l40s": (362, 48), "v100": (125, 32), "rtx4090": (165, 24),
}  # fmt: skip
"""Peak of dense bf16 products (V100: fp16) in teraflops, and memory in GB (of the largest version), by the vendors' data sheets."""
PHASES = {"full": "full-rank phase", "lora": "LoRA phase"}


def add_command(parent: Any) -> None:
    """Adds ``plan`` to the parser of ``relora-ds``."""
    plan = parent.add_parser("plan", help="estimate memory, traffic and time of a recipe on N GPUs; starts nothing")
    plan.add_argument("recipe", metavar="RECIPE", type=text_argument, help="a YAML file")
    plan.add_argument("overrides", metavar="key.sub=value", nargs="*", help="replace single settings of the recipe")
    plan.add_argument("--gpus", type=int, required=True, help="of the whole job, up to 10,000")
    plan.add_argument("--gpus-per-node", type=int, help="that share a network link (default: 8; 1 with --device cpu)")
    plan.add_argument("--link", default="100Gbit", help="of a node: 1Gbit, 200Gbit, 25GB/s (default: %(default)s)")
    plan.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)} (default: %(default)s)")
    plan.add_argument("--gpu-memory", help="of one GPU: 80GB, 40GiB (default: the GPU's)")
    plan.add_argument("--tflops", type=float, help="peak of one GPU (default: the GPU's, in bf16)")
    plan.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches (default: %(default)s)")
    plan.add_argument("--vocab-size", type=int, help="of the tokenizer, where data.path is not there yet")
    plan.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    plan.add_argument("--json", action="store_true", help="print everything as JSON")
    plan.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace, rest: Sequence[str]) -> int:
    overrides = with_rest(
        options.overrides, rest, ["--gpus", "--gpus-per-node", "--link", "--gpu", "--gpu-memory", "--tflops", "--mfu", "--json"]
    )
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
        f"The peak is {peak['bytes'] / 1e9:.2f} of {answer['gpu_bytes'] / 1e9:.0f} GB, "
        f"in the {PHASES[peak['phase']]} ({peak['moment']})."
    )
    lines += ["", *update_table(answer["update"], answer["full_rank_by_defaults"])]
    if answer["restart"]:
        restart = answer["restart"]
        lines.append(
            f"A restart, every {restart['every']:,} updates, sends {restart['bytes'] / 1e6:,.1f} MB: "
            f"{restart['link_s']:.3f} s on a node's link."
        )
    return [*lines, "", *advice_table(answer["advice"]), "", answer["note"]]


def memory_table(memory: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """What lies on one GPU when it holds the most, by part, and the most by moment."""
    most = {name: max(moments.values(), key=lambda parts: sum(parts.values())) for name, moments in memory.items()}
    part_names = list(dict.fromkeys(part for parts in most.values() for part in parts if any(p.get(part) for p in most.values())))
    moment_names = list(dict.fromkeys(moment for moments in memory.values() for moment in moments))
    rows = [["memory of one GPU at its fullest, GB", *(PHASES[name] for name in memory)]]
    rows += [[part, *(_gb(parts.get(part)) for parts in most.values())] for part in part_names]
    rows += [["together", *(_gb(sum(parts.values())) for parts in most.values())], []]
    rows.append(["the most at one time, GB", *(PHASES[name] for name in memory)])
    rows += [
        [moment, *(_gb(sum(moments[moment].values()) if moment in moments else None) for moments in memory.values())]
        for moment in moment_names
    ]
    return aligned(rows)


def update_table(update: Mapping[str, Mapping[str, float]], baseline: Mapping[str, float]) -> list[str]:
    columns = {PHASES[name]: cost for name, cost in update.items()} | {"full-rank, DeepSpeed's defaults": baseline}
    figures = [
        ("trainable parameters, millions", "trainable", 1e6, ",.2f"),
        ("a rank sends: gradients, MB", "gradient_bytes", 1e6, ",.2f"),
        ("parameters, MB", "parameter_bytes", 1e6, ",.2f"),
        ("norm, loss, flags, kB", "scalar_bytes", 1e3, ",.2f"),
        ("computing, s", "compute_s", 1, ".4f"),
        ("on a node's link, s", "link_s", 1, ".4f"),
        ("an update at most (not overlapped), s", "at_most_s", 1, ".4f"),
        ("if all is overlapped, s", "overlapped_s", 1, ".4f"),
    ]
    rows = [["an update", *columns]]
    rows += [[label, *(format(cost[key] / unit, form) for cost in columns.values())] for label, key, unit, form in figures]
    for label, key in (("speed-up, not overlapped", "at_most_s"), ("speed-up, overlapped", "overlapped_s")):
        rows.append([label, *(f"{baseline[key] / cost[key]:.2f}" for cost in columns.values())])
    limited = [name for name, cost in columns.items() if cost["link_s"] > cost["compute_s"]]
    verdict = (
        f"The link, not the GPU, is the limit in: {', '.join(limited)}." if limited else "The GPU, not the link, is the limit."
    )
    return [*aligned(rows), verdict]


def advice_table(advice: Mapping[str, Any]) -> list[str]:
    """The largest micro batches that fit, and what to change."""
    rows = [["fits with a tenth left free", "largest micro batch", "peak, GB"]]
    for choice in advice["choices"]:
        label = f"stage {choice['stage']}" + (f", frozen {choice['frozen']}" if choice["frozen"] else "")
        label += ", gradient checkpointing" if choice["gradient_checkpointing"] else ""
        rows.append([label, str(choice["micro_batch"] or "none"), _gb(choice["bytes"])])
    verdict = (
        "fits, as far as is estimated: evaluation, checkpoints and host memory are not" if advice["fits"] else "does not fit"
    )
    return [f"This recipe {verdict}.", *aligned(rows), *advice["hints"]]


def _gb(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e9:,.3f}"
