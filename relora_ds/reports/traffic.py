"""What a run sent: its traffic.json as a table, every line with whose bytes these are; and what factors saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from relora_ds.reports.run_records import Record, Run, column, known
from relora_ds.reports.speed import phases
from relora_ds.units import human_bytes

HEADINGS = ["what", "sent by", "in all", "an update"]
PURPOSES = {
    "gradients": ("gradient",),
    "parameters": ("parameters",),
    "norms and losses": ("norm", "loss"),
    "restarts": ("restart", "verify"),
    "evaluation, checkpoints": ("evaluation", "checkpoint"),
}
"""What the table calls the purposes of traffic.json; the first three are those of updates."""
OF_UPDATES = ("gradients", "parameters", "norms and losses")
NOTE = """Bytes as ring algorithms send them. The lines of one rank are parts of the line of all ranks; the line of the
interfaces was measured beside it, at the nodes' network interfaces, with headers and other programs' bytes, and without what
stays inside a node. ≥: there were other ways than the interfaces that could be read (`unseen` in traffic.json)."""
ONE_MACHINE = "All ranks were on one machine: its interface is the loopback, and nothing went over a network."


def title(start: Record) -> str:
    """Which start of a run an entry of traffic.json is about."""
    ranks, nodes = start["world_size"], len(start["nodes"])
    return f"Updates {start['first_update']:,} to {start['last_update']:,}, {ranks} rank(s) on {nodes} node(s)"


def rows(start: Record) -> list[list[str]]:
    """The table of one start, its heading first, from an entry of traffic.json."""
    by_purpose: Mapping[str, float] = start["wire_bytes"]
    updates = max(1, start["last_update"] - start["first_update"] + 1)
    table = [HEADINGS]
    for name, purposes in PURPOSES.items():
        sent = sum(by_purpose.get(purpose, 0) for purpose in purposes)
        table.append([name, "rank 0", human_bytes(sent), human_bytes(sent / updates) if name in OF_UPDATES else "–"])
    counted, wire = (sum(node[key] for node in start["nodes"]) for key in ("counted_bytes", "sent_bytes"))
    of_update = start["wire_bytes_per_update"]
    table.append(["all of an update", "a rank, on the mean", human_bytes(of_update * updates), human_bytes(of_update)])
    table.append(["everything counted", f"all {start['world_size']} ranks", human_bytes(counted), "–"])
    least = "≥ " if start.get("unseen") else ""
    table.append(["at the interfaces", f"{len(start['nodes'])} node(s)", f"{least}{human_bytes(wire)}", "–"])
    return table


def note(starts: Sequence[Record]) -> str:
    """What must be known to read these tables."""
    is_one_machine = all(len(start["nodes"]) == 1 and start["world_size"] > 1 for start in starts)
    return f"{NOTE} {ONE_MACHINE}" if is_one_machine else NOTE


def saved_bytes(run: Run) -> str:
    """Says what the LoRA phase sent less than the run's own full-rank phase; "" where it had none, or was alone."""
    by_name = {phase.name: phase for phase in phases(run)}
    if not {"full", "lora"} <= by_name.keys() or len({start["world_size"] for start in run.starts}) > 1:
        return ""
    full, lora = by_name["full"], by_name["lora"]
    sent = known(column((record for record in run.updates if record.get("phase") == "lora"), "sent_bytes"))
    if not sent or not full.sent_bytes > 0:
        return ""
    of_restarts = sum(start["wire_bytes"].get(purpose, 0) for start in run.starts for purpose in ("restart", "verify"))
    saved = full.sent_bytes * len(sent) - sum(sent) - of_restarts
    return (
        f"An update of the LoRA phase sent {human_bytes(lora.sent_bytes)}, one of the full-rank phase "
        f"{human_bytes(full.sent_bytes)}: {1 - lora.sent_bytes / full.sent_bytes:.1%} less. Over {len(sent):,} updates rank 0 "
        f"sent {human_bytes(saved)} less than it would have in full-rank training, the {human_bytes(of_restarts)} of the "
        "restarts counted."
    )
