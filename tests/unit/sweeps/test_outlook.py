"""What is left, and for how long."""

from __future__ import annotations

import math

from relora_ds.sweeps.events import Events
from relora_ds.sweeps.outlook import Pace, as_time, outlook, seconds_left
from relora_ds.sweeps.runs import Figures, standing
from relora_ds.sweeps.sweep_file import Sweep
from tests.unit.sweeps.conftest import make_done, make_run


def test_the_pace_is_the_arms_own_where_it_is_known(sweep: Sweep) -> None:
    lora, relora, lora_2, relora_2 = sweep.runs
    seconds = {lora: 1.0, lora_2: 3.0, relora: 8.0}
    pace = Pace(lambda run: Figures(update=10, seconds=10 * seconds[run]))
    assert math.isnan(pace.of(lora)) and as_time(pace.of(lora)) == "unknown"
    pace.learn(lora)
    assert pace.of(relora) == 1.0, "of all that are done"
    pace.learn(lora_2)
    pace.learn(relora)
    assert (pace.of(lora), pace.of(relora_2)) == (2.0, 8.0)
    assert seconds_left({lora: 5, relora_2: 10}, pace, jobs=2) == (10 + 80) / 2


def test_the_lines_of_a_dry_run(sweep: Sweep) -> None:
    lora, relora, *_ = sweep.runs
    assert list(outlook(sweep, {run: standing(run, Events(sweep.folder)) for run in sweep.runs}, 1))[-1].split() == [
        "all", "4", "to", "train", "80", "10,240", "unknown",
    ]  # fmt: skip
    assert not sweep.folder.exists()
    make_done(lora, 20.0)
    make_run(relora, update=5, losses=[3.0] * 8)
    lines = list(outlook(sweep, {run: standing(run, Events(sweep.folder)) for run in sweep.runs}, 2))
    assert [line.split() for line in lines[1:3]] == [
        ["lora/seed-1", "done", "0", "0", "–"],
        ["relora/seed-1", "stopped", "15", "1,920", "0:00:19"],
    ]
    assert lines[-1].split()[-3:] == ["55", "7,040", "0:00:35"]
