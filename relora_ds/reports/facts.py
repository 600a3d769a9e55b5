"""What was run, and on what, by what lies in a run's folder; nothing is guessed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from relora_ds.reports.restarts import stored_dtype
from relora_ds.reports.run_records import Record, Run, last
from relora_ds.reports.speed import PHASE_NAMES
from relora_ds.run import manifest as manifests
from relora_ds.run.manifest import ManifestError
from relora_ds.text import json_text
from relora_ds.text.masking import masked
from relora_ds.units import human_bytes

UNKNOWN = "–"
SHAPE = {"num_hidden_layers": "layers", "hidden_size": "hidden size", "num_attention_heads": "heads", "vocab_size": "vocabulary"}
"""Names of a Hugging Face configuration that tell a model's size, with their names in the report."""


def what(run: Run) -> dict[str, str]:
    """What was trained, by what method, on what data; :data:`UNKNOWN` where the folder does not tell."""
    has_factors = any(record.get("phase") == "lora" for record in run.updates)
    facts = {"method": run.method, "model": _model(run), "first weights": _first_weights(run)} | _parameters(run)
    if has_factors:
        facts |= _factors(run)
        # Left out, it is the other one.
        facts["learning rate of the factors"] = _text(run, "optimizer.lora_lr", otherwise=_text(run, "optimizer.lr"))
    facts |= {
        "learning rate": _text(run, "optimizer.lr"),
        "schedule": _text(run, "optimizer.schedule"),
        "one update": _batch(run),
        "data": _data(run),
        "seed": _text(run, "run.seed"),
    }
    return facts


def on_what(run: Run) -> dict[str, str]:
    """Machines, versions, dates and time, as far as the folder records them."""
    newest = manifests.newest(run.folder.checkpoints)
    precision = f"{newest[1].precision}, ZeRO stage {newest[1].zero_stage}" if newest else UNKNOWN
    versions = [newest[1].versions] if newest else []
    known = {"machines": _machines(run), "precision": precision}
    if not run.begun:
        return known | {
            "versions": _then(map(_versions, versions)),
            "updates done": progress(run),
            "metrics.jsonl last written": _date(run),
        }
    return known | {
        "hardware": _then(map(_hardware, run.begun)),
        "versions": _then(_versions(start.get("versions")) for start in run.begun),
        "started": _started(run),
        "updates done": progress(run),
        "peak memory of rank 0": _peak_memory(run),
    }


def _text(run: Run, key: str, otherwise: str = UNKNOWN) -> str:
    value = run.setting(key)
    return otherwise if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _model(run: Run) -> str:
    content = _json(run, "config.json")
    sizes = [f"{title} {content[name]:,}" for name, title in SHAPE.items() if isinstance(content.get(name), int)]
    return ", ".join([str(content.get("model_type", "")), *sizes]).strip(", ") or UNKNOWN


def _json(run: Run, name: str) -> Mapping[str, Any]:
    try:
        content = json_text.parse((run.folder.model / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _first_weights(run: Run) -> str:
    for key in ("model.path", "model.weights"):
        if run.setting(key) is not None:
            return str(run.setting(key))
    return "random" if run.settings else UNKNOWN


def _parameters(run: Run) -> dict[str, str]:
    """How many parameters there are in the newest phase, and how many of them are trained."""
    newest = next((start for start in reversed(run.starts) if isinstance(start.get("trainable_parameters"), int)), None)
    if newest is None:
        return {"parameters": UNKNOWN, "of these trained": UNKNOWN}
    trained = newest["trainable_parameters"]
    phase = next((str(record.get("phase")) for record in run.updates if record["update"] == newest["last_update"]), "")
    frozen = 0 if phase == "full" or run.method == "low_rank" else frozen_parameters(run)
    if frozen is None:
        return {"parameters": UNKNOWN, "of these trained": f"{trained:,}"}
    return {"parameters": f"{trained + frozen:,}", "of these trained": f"{trained:,} ({trained / (trained + frozen):.1%})"}


def frozen_parameters(run: Run) -> int | None:
    """How many frozen weights the newest base holds; None where there is none that can be read."""
    for folder in sorted(run.folder.base.glob("restart_*"), reverse=True):
        try:
            layers = manifests.read_json(folder)["layers"]
            return sum(math.prod(layer["shape"]) for layer in layers.values())
        except (ManifestError, KeyError, TypeError, AttributeError):
            continue
    return None


def _factors(run: Run) -> dict[str, str]:
    rank, alpha = run.setting("relora.rank"), run.setting("relora.alpha")
    is_known = isinstance(rank, int) and isinstance(alpha, (int, float)) and rank > 0
    facts = {
        "rank": _text(run, "relora.rank"),
        "alpha": f"{alpha:g} (B·A counts {alpha / rank:g} times)" if is_known else UNKNOWN,
    }
    if run.setting("relora.trainable_scaling") is True:
        facts["alpha"] = "not used: B·A counts by a trained number of each layer"
    if run.method == "low_rank":  # whatever its recipe, which other arms of a sweep share, says of these
        return facts | {"warm start": "none", "frozen weights stored in": "none: a layer is B·A alone"}
    facts["warm start"] = _updates(run, "relora.warm_start", "{} updates at full rank")
    if run.method == "relora":
        growth = run.setting("relora.restart_growth")
        grows = f", each interval {growth:g} times the one before" if isinstance(growth, (int, float)) and growth != 1 else ""
        facts["restart"] = _updates(run, "relora.restart_every", "every {} updates" + grows)
        every = run.setting("relora.reset.every")
        if isinstance(every, int) and run.setting("relora.restart_every") is None:
            facts["restart"] = "never"
        whose = ", of the factors alone" if run.setting("relora.rewarm") == "factors" else ""
        climb = _updates(run, "relora.restart_warmup", "{} updates" + whose)
        facts["learning rate climbs again over"] = climb if run.has_teeth else "nothing, by this schedule"
        facts[f"optimizer every {every:,} updates" if isinstance(every, int) else "optimizer at a restart"] = _reset(run)
    facts["frozen weights stored in"] = stored_dtype(run) or UNKNOWN
    return facts


def _updates(run: Run, key: str, pattern: str) -> str:
    value = run.setting(key)
    return pattern.format(f"{value:,}") if isinstance(value, int) else UNKNOWN


def _reset(run: Run) -> str:
    kind, ratio = run.setting("relora.reset.kind"), run.setting("relora.reset.ratio")
    if kind in ("magnitude", "random") and isinstance(ratio, (int, float)):
        which = "smallest" if kind == "magnitude" else "random"
        return f"the {which} {ratio:.1%} of the moments are set to 0"
    return {"full": "all moments are set to 0", "none": "the moments are kept"}.get(str(kind), UNKNOWN)


def _batch(run: Run) -> str:
    batch, length = run.setting("train.global_batch"), run.setting("data.sequence_length")
    if not isinstance(batch, int) or not isinstance(length, int):
        return UNKNOWN
    return f"{batch:,} sequences of {length:,} tokens: {batch * length:,} tokens"


def _data(run: Run) -> str:
    newest = manifests.newest(run.folder.checkpoints)
    digests = newest[1].data.get("sha256") if newest else None
    digest = (
        f" (SHA-256 of the training tokens {str(digests['train'])[:12]}…)"
        if isinstance(digests, dict) and "train" in digests
        else ""
    )
    return f"{_text(run, 'data.path')}{digest}"


def _machines(run: Run) -> str:
    described = []
    for start in run.starts:
        hosts = ", ".join(str(node.get("host")) for node in start["nodes"])
        backend = f", {start['backend']}" if start.get("backend") else ""
        described.append(f"{start['world_size']} rank(s) on {hosts}{backend}")
    return "; then ".join(dict.fromkeys(described)) or UNKNOWN


def progress(run: Run) -> str:
    """How far a run has come: updates, of how many, and tokens."""
    wanted, wanted_tokens = run.setting("train.updates"), run.setting("train.tokens")
    of = f" of {wanted:,}" if isinstance(wanted, int) else ""
    of_tokens = f" of {wanted_tokens:,}" if isinstance(wanted_tokens, int) else ""
    tokens = last([record["tokens"] for record in run.updates if isinstance(record.get("tokens"), int)])
    return f"{run.updates[-1]['update']:,}{of}" + ("" if math.isnan(tokens) else f", {tokens:,}{of_tokens} tokens")


def world_size(run: Run) -> int:
    """The ranks of the newest start; 1 where the folder does not tell."""
    sizes = [start.get("world_size") for start in (*run.starts, *run.begun)]
    return next((size for size in reversed(sizes) if isinstance(size, int)), 1)


def commands(run: Run) -> list[str]:
    """By which command lines a run was started, and on how many ranks, each once; as Markdown."""
    found = [
        f"`{masked(str(start['command']))}` on {start.get('world_size', 1)} rank(s)"
        for start in run.begun
        if start.get("command")
    ]
    return list(dict.fromkeys(found))


def _then(texts: Iterable[str]) -> str:
    """Each text once, in the order in which they came."""
    return "; then ".join(filter(None, dict.fromkeys(texts))) or UNKNOWN


def _versions(versions: object) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items()) if isinstance(versions, dict) else ""


def _hardware(start: Record) -> str:
    """Of rank 0, which other ranks need not share."""
    found = start.get("hardware")
    if not isinstance(found, dict):
        return ""
    told = (
        [f"{start.get('world_size', 1)} × {found['gpu']} with {_bytes(found.get('gpu_memory_bytes'))}"] if "gpu" in found else []
    )
    told += [
        str(found.get("cpu", "")),
        f"{found.get('cores', UNKNOWN)} core(s) usable",
        f"{_bytes(found.get('memory_bytes'))} of memory",
    ]
    return ", ".join(filter(None, told))


def _started(run: Run) -> str:
    times = [str(start.get("time", UNKNOWN)).replace("T", " ") for start in run.begun]
    return times[0] if len(times) == 1 else f"{times[0]}; {len(times)} times in all, at last {times[-1]}"


def peak_memory(run: Run) -> dict[str, float]:
    """The peak of each phase in bytes, over all starts: of the GPU where there is one, else of the process."""
    fields = ("gpu_allocated_peak_bytes", "resident_peak_bytes")
    field = next((field for field in fields if any(start.get(field) for start in run.begun)), "")
    peaks: dict[str, float] = {}
    for start in run.begun:
        by_phase = start.get(field)
        for phase, value in by_phase.items() if isinstance(by_phase, dict) else ():
            if isinstance(value, (int, float)):
                peaks[str(phase)] = max(peaks.get(str(phase), 0.0), value)
    return peaks


def _peak_memory(run: Run) -> str:
    of_gpu = any(start.get("gpu_allocated_peak_bytes") for start in run.begun)
    which = "allocated on the GPU" if of_gpu else "resident in main memory, the whole process since its begin"
    peaks = [f"{PHASE_NAMES.get(phase, phase)} phase {human_bytes(value)}" for phase, value in peak_memory(run).items()]
    return f"{', '.join(peaks)} ({which})" if peaks else UNKNOWN


def _bytes(value: object) -> str:
    return human_bytes(value) if isinstance(value, (int, float)) else UNKNOWN


def _date(run: Run) -> str:
    """A file's date is all that tells it: runs write none. A copy of the folder may have another."""
    at = datetime.fromtimestamp(run.folder.metrics.stat().st_mtime, tz=timezone.utc)
    return f"{at:%Y-%m-%d %H:%M} UTC, by the file's date (a copy may have another)"
