"""One command on one GPU: what needs CUDA is checked, parts of training are timed side by side, and the record is written.

    python -m benchmarks.gpu --out OUT [--minutes 8] [--tiny]
    python -m benchmarks.gpu --out OUT --part attention switches restart
    python -m benchmarks.gpu --out OUT --set forms                    # other ways of training: --part steps

It needs this folder, Python, CUDA and the packages that relora_ds imports. The parts:

- checks: what tests on CPUs cannot tell (benchmarks/gpu_checks.py);
- attention: PyTorch's backends of attention (benchmarks/attention.py);
- switches: those of an update, and the parts of an update, of llama_1b and llama_350m (benchmarks/step.py);
- restart: a restart in updates, for each way to store frozen weights and each kind of reset (benchmarks/restart.py);
- steps: ways of training, each measured alone (benchmarks/gpu_steps.py), by sets.

Without --part and --set it does checks and steps: whether all is right here, and what ReLoRA gains here. The other parts say why, and
fill eight minutes of their own. The checks come first, since figures of what is broken are worth nothing.

All checks share a process; each other measurement has one of its own, so that a failure costs only itself. A part gets its share of
the minutes that are left, and leaves what it does not use to those behind it; what time did not suffice for is listed as not run.
OUT/gpu.json gets every figure, OUT/gpu.md the tables. ``--tiny`` tries the command itself, on any machine: small sizes, some of the
checks and ways, and all parts unless some are named.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gpu_checks
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
PARTS = {"checks": 4.25, "attention": 1.0, "switches": 2.5, "restart": 1.25, "steps": 8.0}
"""What the parts get of the time, one beside the other."""
DEFAULT = ["checks", "steps"]
LEAST_S = 20
"""Nothing is begun with less time than that."""
UPDATE = ["benchmarks.step", "--compile", "on", "off", "--accumulation", "2", "1", "--vocabulary", "32128", "--length", "512"]
COMMANDS: dict[str, list[list[str]]] = {
    "attention": [["benchmarks.attention", "--rounds", "10"]],
    "switches": [
        [*UPDATE, "--model", "llama_1b", "--hidden", "2048", "--rank", "128", "--tokens", "16384"],  # the MLP gets 5504
        [*UPDATE, "--model", "llama_350m", "--rank", "128", "--tokens", "32768"],
    ],
    "restart": [
        [
            "benchmarks.restart", "--dtype", "bf16", "--hidden", "1024", "--layers", "8", "--rank", "128", "--tokens", "8192",
            "--rounds", "3",
        ],
    ],
}  # fmt: skip
TINY = {
    "model": "llama_60m", "hidden": 64, "layers": 1, "vocabulary": 256, "length": 16, "micro_batch": 1, "accumulation": 2, "rank": 8,
    "updates": 1,
}  # fmt: skip
TINY_SIZES = ["--hidden", "64", "--layers", "1", "--rank", "8"]
TINY_COMMANDS = {
    "attention": [["benchmarks.attention", "--lengths", "16", "32", "--tokens", "64", "--rounds", "2", "--repeats", "1"]],
    "switches": [
        [
            "benchmarks.step", *TINY_SIZES, "--compile", "off", "--vocabulary", "256", "--length", "16", "--tokens", "64",
            "--rounds", "2",
        ],
    ],
    "restart": [["benchmarks.restart", *TINY_SIZES, "--tokens", "512", "--dtype", "bf16", "--rounds", "1"]],
}  # fmt: skip
TINY_CHECKS = ["products of a merge", "int8 stores", "what survives a reset", "a gradient that is not finite", "restart, fp32"]
TINY_WAYS = 3


def share(part: str, others: Sequence[str], seconds: float) -> float:
    """What a part may take of the seconds that are left to it and the parts behind it."""
    return seconds * PARTS[part] / (PARTS[part] + sum(PARTS[other] for other in others))


def child(words: Sequence[str], seconds: float, log: Path) -> tuple[str, str | None]:
    """Runs ``python -m WORDS``; what it prints, and why it did not end well, if so. All else that it says goes to ``log``."""
    output, problem = log.with_suffix(".out"), None
    with log.open("a") as errors, output.open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=ROOT, stdout=printed, stderr=errors, start_new_session=True
        )
        try:
            if process.wait(timeout=max(1.0, seconds)):
                problem = f"exit code {process.returncode}: {log.read_text()[-1200:]}"
        except subprocess.TimeoutExpired:
            problem = f"not done after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return output.read_text(), problem


def said(output: str, prefix: str) -> list[dict[str, Any]]:
    """What stands behind ``prefix`` in lines of JSON."""
    return [json.loads(line[len(prefix) :]) for line in output.splitlines() if line.startswith(prefix)]


def short(case: dict[str, Any]) -> str:
    """A case in a few words."""
    return " ".join(f"{key}={value}" for key, value in case.items() if key not in ("profile", "updates"))


@dataclass
class Session:
    """What was found so far, by part, and where it is kept."""

    out: Path
    record: dict[str, Any]
    tiny: bool = False

    @property
    def log(self) -> Path:
        return self.out / "log.txt"

    def keep(self, part: str, found: dict[str, Any]) -> None:
        """Adds what was found, and writes all files anew."""
        self.record[part].append(found)
        (self.out / "gpu.json").write_text(json.dumps(self.record, indent=1))
        (self.out / "gpu.md").write_text(markdown(self.record))

    def checks(self, end: float) -> None:
        asked = TINY_CHECKS if self.tiny else gpu_checks.names()
        output, problem = child(["benchmarks.gpu_checks", *asked], end - time.monotonic(), self.log)
        found = said(output, "CHECK ")
        done = [one["check"] for one in found]
        left = [{"check": name, "error": "not run: the process had ended"} for name in asked if name not in done]
        if left:
            left[0]["error"] = problem or "said nothing"
        for one in (*found, *left):
            print(json.dumps(one)[:1500], flush=True)
            self.keep("checks", one)

    def commands(self, part: str, end: float) -> None:
        """Commands that write a record of their own, the most telling first: each may take all the time that is left to the part."""
        for number, words in enumerate((TINY_COMMANDS if self.tiny else COMMANDS)[part]):
            files = {kind: self.out / f"{part}_{number}.{kind}" for kind in ("json", "markdown")}
            for file in files.values():
                file.unlink(missing_ok=True)
            given = [*words, *(word for kind, file in files.items() for word in (f"--{kind}", str(file.resolve())))]
            left = end - time.monotonic()
            problem = "not run: no time left" if left < LEAST_S else child(given, left, self.log)[1]
            found: dict[str, Any] = {"words": " ".join(words)}
            if problem or not all(file.exists() for file in files.values()):
                found["error"] = problem or "wrote nothing"
            else:
                found |= {"found": json.loads(files["json"].read_text()), "text": files["markdown"].read_text()}
            print(found["words"], found.get("error", "done"), flush=True)
            self.keep(part, found)

    def steps(self, cases: Sequence[dict[str, Any]], end: float) -> None:
        for case in cases[: TINY_WAYS if self.tiny else None]:
            left = end - time.monotonic()
            found: dict[str, Any] = {"error": "not run: no time left"}
            if left >= LEAST_S:
                output, problem = child(["benchmarks.gpu_steps", json.dumps(case | TINY if self.tiny else case)], left, self.log)
                found = next(iter(said(output, "RESULT ")), {"error": problem or "said nothing"})
            shown = ("tokens_per_s", "mfu_done", "peak_gib", "warm_s", "restart_s", "last_loss", "error")
            print(short(case), json.dumps({key: found.get(key) for key in shown}), flush=True)
            self.keep("steps", {"case": case, **found})


def markdown(record: dict[str, Any]) -> str:
    """The record as tables; behind them what was not measured, and why."""
    text = [told(record["machine"]), "", f"    {record['command']}"]
    tables = {"checks": checks_table, "steps": steps_tables}
    for part in PARTS:
        if record[part]:
            text += ["", f"## {part}", "", *tables.get(part, texts)(record[part])]
    missing = [(part, found) for part in PARTS for found in record[part] if found.get("error", "").startswith("not ")]
    if missing:
        text += ["", "## Not run, or not to the end", ""]
        text += [f"- {part}: {name_of(found)}: {found['error']}" for part, found in missing]
    return "\n".join(text) + "\n"


def name_of(found: dict[str, Any]) -> str:
    return found.get("check") or found.get("words") or short(found["case"])


def texts(found: Sequence[dict[str, Any]]) -> list[str]:
    """The records of commands, as they wrote them."""
    return "\n\n".join(one["text"].rstrip() if "text" in one else f"`{one['words']}`: {one['error']}" for one in found).split(
        "\n"
    )


def checks_table(checks: Sequence[dict[str, Any]]) -> list[str]:
    text = ["| check | | s | found |", "|---|---|---|---|"]
    for found in checks:
        shown = {k: v for k, v in found.items() if k not in ("check", "seconds", "passed", "where")}
        passed = {True: "passed", False: "FAILED", None: "no answer"}[found.get("passed")]
        text.append(f"| {found['check']} | {passed} | {found.get('seconds', '')} | {shown} |")
    return text


def steps_tables(steps: Sequence[dict[str, Any]]) -> list[str]:
    """The ways of training, and the kernels of those that were profiled."""
    text = ["| way | tokens/s | MFU done | MFU of full rank | GiB at most | trained | update s (min, median, max) |"]
    text += ["|---|---|---|---|---|---|---|"]
    for found in steps:
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
    for found in steps:
        if found.get("profile"):
            total = sum(ms for _, ms, _ in found["profile"])
            text += ["", f"CUDA time of one update, {short(found['case'])}: {total:.0f} ms in the 40 kernels that take most", ""]
            text += ["| kernel | ms | calls |", "|---|---|---|"]
            text += [f"| `{name}` | {ms:.1f} | {calls} |" for name, ms, calls in found["profile"]]
    return text


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it together (default: 8)")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="done in this order, whichever they are named in")
    parser.add_argument("--set", nargs="+", choices=SETS, help="which ways of training the steps are (default: first)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the command")
    options = parser.parse_args(words)
    options.part = options.part or (["steps"] if options.set else list(PARTS) if options.tiny else DEFAULT)
    if options.set and "steps" not in options.part:
        parser.error("--set: says which ways of training the steps are, and --part leaves the steps out")
    options.set = options.set or ["first"]
    return options


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    command = f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}"
    session = Session(options.out, {"machine": machine(), "command": command, **{part: [] for part in PARTS}}, options.tiny)
    asked = [part for part in PARTS if part in options.part]
    for number, part in enumerate(asked):
        now = time.monotonic()
        until = now + share(part, asked[number + 1 :], end - now)
        if part == "checks":
            session.checks(until)
        elif part == "steps":
            session.steps([case for name in options.set for case in SETS[name]], until)
        else:
            session.commands(part, until)
    print(markdown(session.record))


if __name__ == "__main__":
    main()
