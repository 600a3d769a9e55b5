"""Tables of the small sweeps' records, from the runs.csv that ``relora-ds sweep`` writes.

    python -m benchmarks.arms rates runs/rates_small
    python -m benchmarks.arms gap runs/table2_small --worst lora_r16 --best full [--arms relora_r16 …]
    python -m benchmarks.arms grid runs/border_small

``rates``: arms called METHOD_RATE, a row a method, a column a rate. ``gap``: what share of the way from one arm to another an arm has
gone, seed by seed. ``grid``: arms called rRANK_UPDATES_RESTARTS, a row a rank and length, a column a number of restarts.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from relora_ds.reports.run_records import known
from relora_ds.reports.tables import markdown
from relora_ds.sweeps.table import mean_and_spread

NUMBER = r"\d+\.?\d*(?:[eE][-+]?\d+)?"
NAMES = {"rates": "METHOD_RATE", "grid": "rRANK_UPDATES_RESTARTS"}
"""What the arms are called that a table is made of."""
Perplexities = Mapping[str, Mapping[int, float]]
"""By arm and seed; NaN of a run that diverged, or that was not judged."""


def perplexities(folder: Path) -> tuple[Perplexities, list[str]]:
    """Of the runs in a sweep's folder that came to their end; and the others, which are left out."""
    found: dict[str, dict[int, float]] = {}
    left_out = []
    with open(folder / "runs.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["state"] in ("done", "diverged"):
                value = float(row["perplexity"] or "nan") if row["state"] == "done" else math.nan
                found.setdefault(row["arm"], {})[int(row["seed"])] = value
            else:
                left_out.append(f"{row['arm']}/seed-{row['seed']} ({row['state']})")
    return found, left_out


def told(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Mean and spread; behind them, how many of the values are numbers, where some are not."""
    mean, spread = mean_and_spread(values)
    if math.isnan(mean):
        return "diverged" if values else "–"
    numbers = len(known(values))
    of = "" if numbers == len(values) else f" ({numbers} of {len(values)})"
    return form.format(mean) + ("" if math.isnan(spread) else " ± " + form.format(spread)) + of


def unfit(table: str, arms: Iterable[str]) -> str | None:
    """The first arm whose name is none of those that a table is made of; None where all are."""
    forms = {"rates": rf".+_{NUMBER}", "grid": rf"r?{NUMBER}_{NUMBER}_{NUMBER}"}
    return next((arm for arm in arms if not re.fullmatch(forms.get(table, ".*"), arm)), None)


def _sorted(words: set[str]) -> list[str]:
    return sorted(words, key=float)


def rates(found: Perplexities) -> list[list[str]]:
    """The least of a method's is bold."""
    methods: dict[str, dict[str, float]] = {}
    for arm, by_seed in found.items():
        method, _, rate = arm.rpartition("_")
        methods.setdefault(method, {})[rate] = mean_and_spread(list(by_seed.values()))[0]
    columns = _sorted({rate for by_rate in methods.values() for rate in by_rate})
    rows = [["method", *columns]]
    for method, by_rate in methods.items():
        least = min(known(by_rate.values()), default=math.nan)
        cells = [told([by_rate[rate]] if rate in by_rate else []) for rate in columns]
        rows.append(
            [method, *(f"**{cell}**" if by_rate.get(rate) == least else cell for rate, cell in zip(columns, cells, strict=True))]
        )
    return rows


def closed(found: Perplexities, arm: str, worst: str, best: str) -> list[float]:
    """(worst - arm) / (worst - best) in perplexity, for each seed that all three were trained with."""
    seeds = found[arm].keys() & found[worst].keys() & found[best].keys()
    return [(found[worst][seed] - found[arm][seed]) / (found[worst][seed] - found[best][seed]) for seed in sorted(seeds)]


def gap(found: Perplexities, worst: str, best: str, arms: Sequence[str]) -> list[list[str]]:
    rows = [["arm", "perplexity", f"of the way from {worst} to {best}", "seeds"]]
    for arm in arms or found:
        rows.append([arm, told(list(found[arm].values())), told(closed(found, arm, worst, best), "{:.0%}"), str(len(found[arm]))])
    return rows


def grid(found: Perplexities) -> list[list[str]]:
    cells = {tuple(arm.removeprefix("r").split("_")): list(by_seed.values()) for arm, by_seed in found.items()}
    restarts = _sorted({key[2] for key in cells})
    rows = [["rank", "updates", *(f"{count} restarts" for count in restarts)]]
    for rank in _sorted({key[0] for key in cells}):
        for updates in _sorted({key[1] for key in cells}):
            rows.append([rank, updates, *(told(cells.get((rank, updates, count), [])) for count in restarts)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("rates", "gap", "grid"))
    parser.add_argument("folder", type=Path, help="the folder of a sweep")
    parser.add_argument("--worst", help="the arm that has gone 0%% of the way")
    parser.add_argument("--best", help="the arm that has gone all of it")
    parser.add_argument("--arms", nargs="+", default=[], help="which arms; default: all")
    options = parser.parse_args()
    try:
        found, left_out = perplexities(options.folder)
    except (OSError, KeyError, ValueError) as error:
        parser.exit(2, f"{options.folder}: no runs.csv of a sweep ({error}); relora-ds sweep SWEEP.yaml --table writes one\n")
    if left_out:
        print(f"left out, since they are not done: {', '.join(left_out)}", file=sys.stderr)
    if (arm := unfit(options.table, found)) is not None:
        parser.exit(
            2, f"{options.table}: arm {arm!r} of {options.folder} is not called {NAMES[options.table]}; take another table\n"
        )
    if options.table == "gap":
        missing = [arm for arm in (options.worst, options.best, *options.arms) if arm not in found]
        if missing:
            parser.error(f"no run of {', '.join(map(str, missing))} is done in {options.folder}; there are {', '.join(found)}")
        rows = gap(found, options.worst, options.best, options.arms)
    else:
        rows = rates(found) if options.table == "rates" else grid(found)
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
