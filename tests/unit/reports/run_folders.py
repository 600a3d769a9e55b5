"""Folders of runs made by hand, small enough that every figure of a report can be worked out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from relora_ds.reports import contents, figures, html_page, markdown_page
from relora_ds.reports.run_records import Record, read_run

WARM_START = 60


def update(number: int, loss: float | None, **more: object) -> Record:
    return {"update": number, "phase": "full", "loss": loss, "lr": 1e-3, "tokens": 10 * number, "tokens_per_s": 100.0} | more


def restart(number: int, at: int, **more: object) -> Record:
    record = {"update": at, "restart": number, "pruned_fraction": 0.99, "merge_error": 1e-6, "seconds": 0.5, "bytes": 2048}
    return record | {"merged_change": 0.7 / number} | more


def falling(last: int) -> list[Record]:
    """Updates whose loss is ``1000 - update``: the mean over a window is the loss in its middle."""
    return [update(number, 1000.0 - number) for number in range(1, last + 1)]


def relora_records() -> list[Record]:
    """200 updates, LoRA from update 61 on, an evaluation every 20 updates and one skipped update."""
    records = []
    for number in range(1, 201):
        phase: Record = {"phase": "lora", "lora_lr": 2e-3} if number > WARM_START else {"phase": "full"}
        records.append(update(number, None if number == 30 else 4 - number / 100, grad_norm=1.0, **phase))
        if number == 30:
            records[-1]["skipped"] = True
        if number % 20 == 0:
            records.append({"update": number, "eval_loss": 3.0, "eval_perplexity": 400.0 - number, "phase": phase["phase"]})
    return records


def lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_run(
    folder: Path, records: Sequence[Record], restarts: Sequence[Record] = (), method: str = "relora", settings: str = ""
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(settings or f"method: {method}\nrun: {{}}\n")
    (folder / "metrics.jsonl").write_text(lines(records))
    (folder / "restarts.jsonl").write_text(lines(restarts))
    return folder


def start(**more: object) -> Record:
    """An entry of traffic.json: 1,100 updates of two ranks on two nodes."""
    nodes = [
        {"host": "a", "ranks": [0], "counted_bytes": 6e6, "sent_bytes": 6_100_000, "received_bytes": 1},
        {"host": "b", "ranks": [1], "counted_bytes": 6e6, "sent_bytes": 6_000_000, "received_bytes": 1},
    ]
    wire = {"gradient": 2e6, "parameters": 2e6, "norm": 40, "restart": 1e6, "verify": 500_000, "evaluation": 32, "checkpoint": 68}
    entry = {"first_update": 1, "last_update": 1100, "world_size": 2, "wire_bytes_per_update": 4321.0, "wire_bytes": wire}
    return {**entry, "nodes": nodes} | more


def write_traffic(folder: Path, *starts: Record) -> None:
    (folder / "traffic.json").write_text(json.dumps({"starts": list(starts)}))


def begun(**more: object) -> Record:
    """A line of starts.jsonl."""
    seconds = {"start_up": 10.0, "updates": 80.0, "phase_change": 5.0, "evaluations": 3.0, "checkpoints": 2.0}
    entry = {"update": 200, "first_update": 1, "time": "2026-03-04T05:06:07+00:00", "command": "relora-ds train a.yaml"}
    entry |= {"launcher": "torchrun", "world_size": 2, "hosts": ["a"], "seconds": seconds, "versions": {"torch": "2.13.0"}}
    entry |= {"hardware": {"cpu": "A processor", "cores": 4, "memory_bytes": 8e9}}
    return {**entry, "resident_peak_bytes": {"full": 5e8, "lora": 6e8}} | more


def write_starts(folder: Path, *starts: Record) -> None:
    (folder / "starts.jsonl").write_text(lines(starts))


def pages(folder: Path) -> tuple[str, str]:
    """``report.md`` and ``report.html`` of one run, without the pictures of the first and without writing: they take seconds."""
    runs = [read_run(folder)]
    title, sections = contents.title(runs), contents.sections(runs, figures.pictures(runs))
    return markdown_page.page(title, sections), html_page.page(title, sections)


def words(folder: Path) -> str:
    """``report.md`` of one run, with nothing drawn or written."""
    runs = [read_run(folder)]
    return markdown_page.page(contents.title(runs), contents.sections(runs, figures.pictures(runs)))
