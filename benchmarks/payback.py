"""When a restart has paid: the losses of two arms of a sweep that saw the same tokens, one with restarts and one without.

    python -m benchmarks.payback runs/table2_small --pairs relora_best_r16 lora_best_r16 [WITH WITHOUT …] [--window 15]

Both are the same run up to the first restart. So what is between them from there on is the restart's, and what most of a loss
is, the text of its update, falls out. A row a pair: the mean difference, over the seeds that both were trained with, in each
window of updates between the first restart and the second; and the updates from the restart to the first window, behind the
worst one, in which the run with it is no worse.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relora_ds.errors import ConfigError
from relora_ds.reports.run_records import Run, column, mean, read_run
from relora_ds.reports.tables import markdown


@dataclass(frozen=True)
class Difference:
    """Losses with restarts less those without, in the updates that follow the first restart, up to the second or the end.

    Attributes:
        restart: the update after which that was.
        seeds: how many the means are over.
        losses: one an update, means over the seeds, in nats.
    """

    restart: int
    seeds: int
    losses: list[float]

    def windows(self, of: int) -> list[float]:
        """Means over whole windows of so many updates."""
        return [mean(self.losses[at : at + of]) for at in range(0, len(self.losses) - of + 1, of)]

    def even_after(self, of: int) -> int | None:
        """Updates up to the first window, from the worst one on, that is no worse with the restart; None where none is."""
        windows = self.windows(of)
        worst = windows.index(max(windows)) if windows else 0
        return next((at * of for at in range(worst, len(windows)) if windows[at] <= 0), None)


def difference(folder: Path, arm: str, without: str) -> Difference:
    """Of two arms, over the seeds that a sweep's folder has of both.

    Raises:
        ConfigError: a run cannot be read, or did not restart; two are not the same up to there; there is no seed in common.
    """
    seeds = sorted(
        {path.name for path in (folder / arm).glob("seed-*/")} & {path.name for path in (folder / without).glob("seed-*/")}
    )
    if not seeds:
        raise ConfigError("--pairs", f"{arm} {without}", f"{folder} has no seed of both")
    restarts, rows = set(), []
    for seed in seeds:
        run, other = read_run(folder / arm / seed), read_run(folder / without / seed)
        losses, others = _losses(run), _losses(other)
        ends = [record["update"] for record in run.restarts[:2]]
        if not ends or len(losses) != len(others):
            raise ConfigError(arm, seed, "has not restarted" if not ends else f"has not as many updates as {without}")
        first, end = ends[0], ends[1] if len(ends) > 1 else len(losses)
        if losses[:first] != others[:first]:
            raise ConfigError(
                arm, seed, f"is not the same run as {without} up to its first restart", "name two that differ by restarts"
            )
        restarts.add(first)
        rows.append([mine - its for mine, its in zip(losses[first:end], others[first:end], strict=True)])
    return Difference(min(restarts), len(seeds), [mean(values) for values in zip(*rows, strict=True)])


def _losses(run: Run) -> list[float]:
    return column(run.updates, "loss")


def table(folder: Path, pairs: Sequence[tuple[str, str]], window: int) -> list[list[str]]:
    found = [(arm, without, difference(folder, arm, without)) for arm, without in pairs]
    columns = max(len(one.windows(window)) for *_, one in found)
    rows = [["with", "without", "seeds", *(f"to {(at + 1) * window}" for at in range(columns)), "even after"]]
    for arm, without, one in found:
        cells = [f"{value:+.3f}" for value in one.windows(window)]
        even = one.even_after(window)
        rows.append([arm, without, str(one.seeds), *cells, *["–"] * (columns - len(cells)), "–" if even is None else str(even)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of a sweep")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="ARM", help="WITH WITHOUT, and so on")
    parser.add_argument("--window", type=int, default=15, help="updates of which a column is the mean (default 15)")
    options = parser.parse_args()
    if len(options.pairs) % 2 or options.window < 1:
        parser.error("--pairs: arms come in twos, with restarts and without; --window: at least 1")
    try:
        rows = table(options.folder, list(zip(options.pairs[::2], options.pairs[1::2], strict=True)), options.window)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
