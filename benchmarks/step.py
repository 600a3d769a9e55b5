"""One update of relora_ds: its switches compared in turns, and where the time of each goes.

    python -m benchmarks.step [--device cuda] [--model llama_60m] [--hidden 512 --layers 4] [--tokens 2048] [--rank 64] [--rounds 5]
                              [--linear split merged] [--compile off on] [--loss torch chunked] [--accumulation 1 4]
                              [--per_parameter once each]
                              [--json FILE] [--markdown FILE]

The first value of every switch makes the first way; each further value makes one more, which differs from the first by it alone. All
train on the same random tokens: one process, ZeRO-2, torch's fused AdamW. Losses agree but for the rounding of ``--dtype``, which is
bf16 on CUDA and fp32 on a CPU unless it is named.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import rounds
from benchmarks.gpu_steps import DTYPES, Case, build, engine_of, random_ids, update, wait
from relora_ds.callbacks.costs import Costs
from relora_ds.launch import process_group
from relora_ds.models.build import PRESETS
from relora_ds.models.compiling import compile_blocks, obstacle
from relora_ds.supervision import parts

SWITCHES: dict[str, list[Any]] = {
    "linear": ["split", "merged"], "compile": ["off", "on"], "loss": ["torch", "chunked"], "accumulation": [1, 4],
    "per_parameter": ["once", "each"],
}  # fmt: skip


def cases(options: argparse.Namespace) -> dict[str, Case]:
    """The ways, by name."""
    chosen = {name: getattr(options, name) for name in SWITCHES}
    values = [{name: given[0] for name, given in chosen.items()}]
    values += [{**values[0], name: value} for name, given in chosen.items() for value in given[1:]]
    base = Case(
        model=options.model, arm="relora", length=options.length, dtype=options.dtype, rank=options.rank, frozen="auto",
        hidden=options.hidden, layers=options.layers, vocabulary=options.vocabulary, timers=False,
    )  # fmt: skip
    found = {}
    for number, switches in enumerate(values):
        changed = {name: value for name, value in switches.items() if number == 0 or value != values[0][name]}
        sequences = options.tokens // options.length // switches["accumulation"]
        own = {**switches, "compile": switches["compile"] == "on", "micro_batch": sequences}
        found[", ".join(f"{name} {value}" for name, value in changed.items())] = replace(base, **own)
    return found


def way(case: Case, device: torch.device) -> Callable[[int], float]:
    """Trains an engine of its own on the tokens of an update's number, which are all ways'; returns the loss."""
    engine = engine_of(case, build(case, device))
    if case.compile:
        compile_blocks(engine.module)

    def train(number: int) -> float:
        generator = torch.Generator(device).manual_seed(number)
        ids = random_ids(case, (case.micro_batch * case.accumulation, case.length), generator)
        return float(update(engine, ids.chunk(case.accumulation)))

    return train


def costs_of(train: Callable[[], Any], device: torch.device) -> Costs:
    """One update under the profiler, as ``relora-ds train --profile`` takes it apart."""
    found = Costs()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]) as seen:
        started = time.perf_counter()
        with record_function(parts.PREFIX + parts.REST):
            train()
            wait(device)
    found.add(1, "lora", time.perf_counter() - started, seen.events(), {})
    return found


def by_part(costs: Mapping[str, Costs]) -> list[list[str]]:
    """Seconds of each part of one update, a column for each way."""
    seconds = {name: found.device_s or found.host_s for name, found in costs.items()}
    rows = [["part (s, with the profiler)", *seconds]]
    for part in parts.PARTS:
        if any(part in own for own in seconds.values()):
            rows.append([part, *(f"{own.get(part, 0.0):.4f}" for own in seconds.values())])
    return rows


def for_its_sizes() -> AbstractContextManager[Any]:
    """Every way is compiled for its own sizes, as where it trains alone; else those that differ would become variables for all."""
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False)


def measure(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    process_group.require()
    chosen = cases(options)
    ways = {name: way(case, device) for name, case in chosen.items()}
    with for_its_sizes() if any(case.compile for case in chosen.values()) else nullcontext():
        times = rounds.in_turns(ways, options.rounds, warm_up=options.warm_up, settle=partial(wait, device))
    after = options.warm_up + options.rounds
    costs = {name: costs_of(partial(train, after), device) for name, train in ways.items()}
    facts = {}
    for name, train in ways.items():
        facts[name] = {"tokens/s": f"{options.tokens / rounds.Spread.of(times.seconds[name]).median:,.0f}"}
        if device.type == "cuda" or not chosen[name].compile:  # compiled blocks hide their tensors from the count on a CPU
            most = rounds.most_bytes(partial(train, after + 1), on_cuda=device.type == "cuda")
            facts[name]["MB in an update"] = f"{most / 1e6:,.1f}"
        facts[name]["last loss"] = f"{times.returned[name][-1]:.5f}"
    notes = [*options.notes, "DeepSpeed's buffer for gradients counts whole: 5e8 entries, as by default, however few are filled"]
    rounds.Record(times, list(ways)[:1], facts, [by_part(costs)], notes).write(options)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=PRESETS, default="llama_60m", help="default: llama_60m")
    for name in ("hidden", "layers"):
        parser.add_argument(f"--{name}", type=rounds.positive, metavar="N", help="another than the model's")
    parser.add_argument("--dtype", choices=DTYPES)
    for name, values in SWITCHES.items():
        kind = {"type": rounds.positive} if name == "accumulation" else {"choices": values}
        parser.add_argument(f"--{name}", nargs="+", default=values, **kind)
    rounds.add_options(parser, tokens=2048, length=256, vocabulary=32_100, rank=64)
    options = parser.parse_args(words)
    if (options.device == "cuda") != torch.cuda.is_available():
        way_out = "CUDA_VISIBLE_DEVICES= hides GPUs, which DeepSpeed takes where it sees one"
        parser.error(f"--device {options.device}: not what DeepSpeed takes here; {way_out}")
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    for number in options.accumulation:
        if options.tokens % (options.length * number):
            parser.error(
                f"--tokens {options.tokens}: must be a multiple of {options.length} x {number}: --length x --accumulation"
            )
    problem, options.notes = obstacle(torch.device(options.device)), []
    if problem and "on" in options.compile:
        options.compile = [value for value in options.compile if value != "on"] or ["off"]
        options.notes.append(f"nothing is compiled: {problem}")
    return options


if __name__ == "__main__":
    measure(parse())
    process_group.leave()
