"""What a run left in its folder, read for a report: updates, evaluations, restarts, ranks' times, traffic, settings.

Nothing here needs torch, a GPU, or a run that has come to its end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from relora_ds.errors import ConfigError
from relora_ds.run.folder import RunFolder, read_jsonl, read_traffic
from relora_ds.text.yaml_text import read_yaml_file

Record = dict[str, Any]

NUMBERS_OF_A_START = ("first_update", "last_update", "world_size", "wire_bytes_per_update")
NUMBERS_OF_A_NODE = ("counted_bytes", "sent_bytes")
LARGEST = 1e300
"""Nothing that is measured is larger; and what is drawn must leave room for the margin of an axis."""


@dataclass(frozen=True)
class Run:
    """What one run folder holds.

    Attributes:
        label: tells it from the other runs of the same report.
        method: of its recipe.
        updates, evals, restarts, ranks: the records of its logs, without those that a resumed run wrote a second time.
        starts: the entries of its traffic.json.
        begun: the records of its starts.jsonl, one for each start; none in runs of earlier versions.
        folder: where it all lies.
        settings: the content of its config.yaml.
    """

    label: str
    method: str
    updates: list[Record]
    evals: list[Record]
    restarts: list[Record]
    ranks: list[Record]
    starts: list[Record]
    folder: RunFolder
    settings: Record = field(default_factory=dict)
    begun: list[Record] = field(default_factory=list)

    @property
    def phase_changes(self) -> list[int]:
        """The updates that are the first of a new phase (not the first of the run)."""
        pairs = pairwise(self.updates)
        return [after["update"] for before, after in pairs if before.get("phase") != after.get("phase")]

    @property
    def restart_updates(self) -> list[int]:
        """The updates that a restart followed."""
        return [record["update"] for record in self.restarts]

    @property
    def has_teeth(self) -> bool:
        """Whether the learning rate climbs from 0 again after a reset of the factors' optimizer."""
        return self.setting("optimizer.schedule") in (None, "jagged")

    @property
    def climbs_after_restarts(self) -> bool:
        """Whether it does so after every restart; resets may have an interval of their own."""
        return self.has_teeth and self.setting("relora.reset.every") is None

    @property
    def tokens_of_updates(self) -> list[float]:
        """How many tokens each update trained on; NaN where the log does not say."""
        totals = column(self.updates, "tokens")
        first = totals[0] if self.updates[0]["update"] == 1 else math.nan
        return [first, *(after - before for before, after in pairwise(totals))]

    @property
    def seconds(self) -> list[float]:
        """How long each update took, with the restart that followed it; NaN where the log does not say."""
        speeds = column(self.updates, "tokens_per_s")
        return [tokens / speed if speed > 0 else math.nan for tokens, speed in zip(self.tokens_of_updates, speeds, strict=True)]

    def setting(self, key: str) -> Any:
        """The value of a dotted key of config.yaml; None where the file has none."""
        value: Any = self.settings
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def column(records: Iterable[Record], key: str) -> list[float]:
    """One field of every record, with NaN (which plots as a gap) where it is missing, null, not finite or beyond measure."""
    values = (record.get(key) for record in records)
    return [float(value) if _is_number(value) else math.nan for value in values]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and abs(value) < LARGEST  # not so NaN


def known(values: Iterable[float]) -> list[float]:
    """The values that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN without any."""
    return statistics.fmean(known(values) or [math.nan])


def median(values: Iterable[float]) -> float:
    """Median of the values that are not NaN; NaN without any."""
    return statistics.median(known(values) or [math.nan])


def last(values: Sequence[float]) -> float:
    """The last value; NaN without any."""
    return values[-1] if values else math.nan


def without_redone(records: Iterable[Record], last: float = math.inf) -> list[Record]:
    """The records up to update ``last``, less those that a resumed run wrote a second time: the later ones count."""
    kept: list[Record] = []
    for record in records:
        while kept and kept[-1]["update"] >= record["update"]:
            kept.pop()
        kept.append(record)
    return [record for record in kept if record["update"] <= last]


def read_run(path: Path, label: str | None = None) -> Run:
    """Reads one run folder; raises :class:`ConfigError` where it holds no update or a file of it is damaged."""
    folder = RunFolder(path)
    if not folder.metrics.is_file():
        raise ConfigError("RUN_DIR", str(path), "the folder has no metrics.jsonl", "name the folder that a training run wrote")
    records = read_jsonl(folder.metrics)
    updates = without_redone(record for record in records if "loss" in record)
    if not updates:
        raise ConfigError("RUN_DIR", str(path), "metrics.jsonl holds no update", "wait for the run's first update")
    newest = updates[-1]["update"]
    evals = without_redone((record for record in records if "eval_loss" in record), newest)
    logs = (folder.restarts, folder.ranks)
    restarts, ranks = (without_redone(read_jsonl(log), newest) if log.is_file() else [] for log in logs)
    for record in ranks:
        if not _is_of_ranks(record):
            problem = f"ranks.jsonl tells of update {record['update']} without hosts and their seconds"
            raise ConfigError("RUN_DIR", str(path), problem, "mend or remove that line")
    starts = [start for start in read_traffic(folder.traffic) if _is_of_a_start(start)]
    content = read_yaml_file(folder.config, "RUN_DIR") if folder.config.is_file() else {}
    settings = content if isinstance(content, dict) else {}
    method = str(settings.get("method", "–"))
    begun = read_jsonl(folder.starts) if folder.starts.is_file() else []
    return Run(label or path.resolve().name, method, updates, evals, restarts, ranks, starts, folder, settings, begun)


def _is_of_a_start(start: Record) -> bool:
    """Whether an entry of traffic.json tells what its table needs."""
    sent, nodes = start.get("wire_bytes"), start.get("nodes")
    if not isinstance(sent, dict) or not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        return False
    numbers = [start.get(key) for key in NUMBERS_OF_A_START] + [node.get(key) for node in nodes for key in NUMBERS_OF_A_NODE]
    return all(map(_is_number, [*numbers, *sent.values()]))


def _is_of_ranks(record: Record) -> bool:
    hosts, seconds = record.get("hosts"), record.get("forward_s")
    if not isinstance(hosts, list) or not isinstance(seconds, list) or not hosts or len(hosts) != len(seconds):
        return False
    return all(_is_number(value) and value > 0 for value in seconds) and all(isinstance(host, str) for host in hosts)


def unique_labels(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parent folders in front as it takes to tell them apart (the folders must differ)."""
    parts, depth = [folder.resolve().parts for folder in folders], 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]).encode("utf-8", "replace").decode("utf-8") for part in parts]  # a name may be no UTF-8
