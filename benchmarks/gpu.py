"""One command on one GPU: what needs CUDA is checked, then ways of training are timed side by side, and the record is written.

    python -m benchmarks.gpu --out OUT [--minutes 8] [--part checks steps] [--set first] [--tiny]

It needs this folder, Python, CUDA and the packages that relora_ds imports. Each check and each way of training has a process of its
own, so that a failure costs only itself; what time did not suffice for is listed as not run. OUT/gpu.json gets every figure,
OUT/gpu.md the tables. ``--tiny`` tries the command itself, on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rounds import ROOT, machine, told

ONE, SMALL = {"model": "llama_1b"}, {"model": "llama_350m", "micro_batch": 32}
EVEN = {**ONE, "mlp": 5504}
LONG = {"length": 2048, "micro_batch": 4}
SETS: dict[str, list[dict[str, Any]]] = {
    "first": [
        {**ONE, "arm": "full"},
        {**ONE, "arm": "relora", "profile": True},
        {**ONE, "arm": "peft"},
        {**ONE, "arm": "relora", "frozen": "int8"},
        {**ONE, "arm": "relora", "dropout": 0.1},
        {**ONE, "arm": "zero2"},
        {**ONE, "arm": "relora", "checkpointing": True},
        {**ONE, "arm": "full", "mlp": 5504},
        {**ONE, "arm": "relora", "mlp": 5504, "profile": True},
        {**SMALL, "arm": "full"},
        {**SMALL, "arm": "relora"},
        {**SMALL, "arm": "peft"},
        {**ONE, **LONG, "arm": "full"},
        {**ONE, **LONG, "arm": "relora"},
    ],
    "forms": [
        {**EVEN, "arm": "relora"},
        {**EVEN, "arm": "full", "compile": True},
        {**EVEN, "arm": "relora", "compile": True, "profile": True},
        {**EVEN, "arm": "peft", "compile": True},
        {**EVEN, "arm": "relora", "linear": "merged", "compile": True},
        {**EVEN, "arm": "relora", "linear": "merged"},
        {**EVEN, "arm": "relora", "frozen": "int8", "compile": True},
        {**EVEN, "arm": "relora", "frozen": "int8"},
        {**EVEN, "arm": "relora", "dropout": 0.1, "compile": True},
        {**EVEN, "arm": "relora", "timers": False, "compile": True},
        {**EVEN, "arm": "peft"},
        {**EVEN, **LONG, "arm": "full", "compile": True},
        {**EVEN, **LONG, "arm": "relora", "compile": True},
    ],
    "rest": [
        {**EVEN, "vocabulary": 32_128, "arm": "relora", "compile": True, "timers": False},
        {**EVEN, "vocabulary": 32_128, "arm": "full", "compile": True, "timers": False},
        {**SMALL, "arm": "full", "compile": True},
        {**SMALL, "arm": "relora", "compile": True},
        {**SMALL, "arm": "relora", "compile": True, "timers": False},
        {**SMALL, "arm": "peft", "compile": True},
        {**ONE, "arm": "relora", "compile": True},
        {**ONE, "arm": "full", "compile": True},
        {**EVEN, **LONG, "arm": "peft", "compile": True},
        {**EVEN, "arm": "relora", "micro_batch": 32, "accumulation": 2, "compile": True, "timers": False},
        {**EVEN, "arm": "relora", "compile": True, "checkpointing": True},
    ],
}
TINY = {"model": "llama_60m", "length": 16, "micro_batch": 1, "accumulation": 2, "rank": 8, "updates": 1}


def said_by(words: list[str], prefix: str, seconds: float, log: Path) -> Iterator[dict[str, Any]]:
    """What a child prints behind ``prefix``; all else that it says goes to ``log``."""
    output, problem = log.with_suffix(".out"), None
    with log.open("a") as errors, output.open("w") as printed:
        child = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, stdout=printed, stderr=errors, start_new_session=True)
        try:
            if child.wait(timeout=max(1.0, seconds)):
                problem = f"exit code {child.returncode}: {tail(log)}"
        except subprocess.TimeoutExpired:
            problem = f"not done after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    for line in output.read_text().splitlines():
        if line.startswith(prefix):
            yield json.loads(line[len(prefix) :])
    if problem is not None:
        yield {"error": problem}


def tail(log: Path) -> str:
    return log.read_text()[-1200:]


def short(case: dict[str, Any]) -> str:
    """A case in a few words."""
    return " ".join(f"{key}={value}" for key, value in case.items() if key not in ("profile", "updates"))


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    text = [told(record["machine"]), "", f"    {record['command']}", "", "| check | | s | found |", "|---|---|---|---|"]
    for found in record["checks"]:
        shown = {k: v for k, v in found.items() if k not in ("check", "seconds", "passed", "where")}
        text.append(
            f"| {found.get('check')} | {'passed' if found.get('passed') else 'FAILED'} | {found.get('seconds')} | {shown} |"
        )
    text += ["", "| way | tokens/s | MFU done | MFU of full rank | GiB at most | trained | update s (min, median, max) |"]
    text += ["|---|---|---|---|---|---|---|"]
    for found in record["steps"]:
        if "error" in found:
            text.append(f"| {short(found['case'])} | {found['error'][:200]} | | | | | |")
            continue
        times = sorted(found["update_s"])
        rates = [found[key] for key in ("mfu_done", "mfu_full", "peak_gib")]
        done, full, peak = ("" if rate is None else f"{rate:.3f}" for rate in rates)
        text.append(
            f"| {short(found['case'])} | {found['tokens_per_s']:,.0f} | {done} | {full} | {peak} | {found['trained']:,} "
            f"| {times[0]:.3f}, {times[len(times) // 2]:.3f}, {times[-1]:.3f} |"
        )
    for found in record["steps"]:
        if found.get("profile"):
            total = sum(ms for _, ms, _ in found["profile"])
            text += ["", f"CUDA time of one update, {short(found['case'])}: {total:.0f} ms in the 40 kernels that take most", ""]
            text += ["| kernel | ms | calls |", "|---|---|---|"]
            text += [f"| `{name}` | {ms:.1f} | {calls} |" for name, ms, calls in found["profile"]]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it together (default: 8)")
    parser.add_argument("--part", nargs="+", choices=("checks", "steps"), default=["checks", "steps"])
    parser.add_argument("--set", nargs="+", choices=SETS, default=["first"], help="which ways of training are timed")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the command")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    log = options.out / "log.txt"
    record: dict[str, Any] = {"machine": machine(), "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}"}
    record |= {"checks": [], "steps": []}

    def keep() -> None:
        (options.out / "gpu.json").write_text(json.dumps(record, indent=1))
        (options.out / "gpu.md").write_text(markdown(record))

    if "checks" in options.part:
        for found in said_by(["benchmarks.gpu_checks"], "CHECK ", end - time.monotonic(), log):
            record["checks"].append(found)
            print(json.dumps(found)[:1500], flush=True)
            keep()
    cases = [case for name in options.set for case in SETS[name]] if "steps" in options.part else []
    for case in cases:
        left = end - time.monotonic()
        if left < 20:
            found = {"error": "not run: no time left"}
        else:
            child = ["benchmarks.gpu_steps", json.dumps({**case, **(TINY if options.tiny else {})})]
            found = next(said_by(child, "RESULT ", left, log), {"error": "said nothing"})
        record["steps"].append({"case": case, **found})
        said = {
            key: found.get(key) for key in ("tokens_per_s", "mfu_done", "peak_gib", "warm_s", "restart_s", "last_loss", "error")
        }
        print(short(case), json.dumps(said), flush=True)
        keep()
    print(markdown(record))


if __name__ == "__main__":
    main()
