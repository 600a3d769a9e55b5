"""Jobs that take care of themselves, on a real SLURM: submitted, stopped, requeued, hit, and finished.

The site is an unkind one: see cluster.py, PARTITIONS and LEAKED. Most of a job's time here is waiting: for SLURM to miss a node, for
credentials to expire. So `make test-cluster` plays several of these stories at once, each on a cluster of its own.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster, missing
from tests.command_line import ROOT, environment, read_log, relora, write_recipe

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=missing() or ""), pytest.mark.timeout(1500)]
RELORA = (sys.executable, "-m", "relora_ds")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
PARTITIONS = """\
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=60
PartitionName=scavenge Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=0 MaxTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
TRAIN = {"updates": 240, "checkpoint_every": 20, "eval_every": 120, "global_batch": 12, "micro_batch": 3}
# without dropout, which each rank draws for itself: these go on over other numbers of ranks
RELORA_LONG = {"restart_every": 40, "restart_warmup": 5, "dropout": 0.0}
RECIPES: dict[str, dict[str, Any]] = {
    "short": {},
    "long": {"train": TRAIN, "relora": RELORA_LONG},
    "limited": {"train": {**TRAIN, "updates": 260}, "relora": RELORA_LONG},
}
LEAKED = {
    "SBATCH_PARTITION": "urgent", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_OPEN_MODE": "truncate",
    "SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2", "SLURM_MEM_PER_CPU": "999999", "SLURM_CPU_BIND": "map_cpu:63",
    "RANK": "1", "WORLD_SIZE": "64", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere", "OMPI_COMM_WORLD_RANK": "1",
    "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "7",
}  # fmt: skip
"""What a login node's profile and the job around a terminal leave in a user's environment; each would spoil the job."""
AT_ONCE = 2
SLOW_LINK = "800kbit"
"""So that an update takes a second, without work for the cores, and 260 take longer than two limits of two minutes."""


class Site:
    """A cluster, and the folder of one run on it."""

    def __init__(self, cluster: Cluster, folder: Path, tokens: Path) -> None:
        self.cluster, self.folder, self.tokens = cluster, folder, tokens
        self.run_dir = folder / "run"

    def recipe(self, kind: str, **changes: Any) -> Path:
        return write_recipe(self.folder, self.tokens, "run", **{**RECIPES[kind], **changes})

    def slurm(self, *arguments: object, expect: int = 0, within: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Runs ``relora-ds slurm ARGUMENTS`` on the login node, or in the job that the words ``within`` start."""
        words = (*within, *RELORA, "slurm", *arguments)
        env = environment(HOME=str(self.folder), **({} if within else LEAKED))
        result = self.cluster.run("ctl", *words, check=False, env=env, cwd=ROOT)
        assert result.returncode == expect, f"{words}\n{result.stdout}\n{result.stderr}"
        return result

    def submit(self, recipe: Path, *options: object, within: Sequence[str] = ()) -> int:
        given = ("--partition", "main", "--tasks-per-node", 1, "--time", 30, *options)
        said = self.slurm("submit", recipe, *given, within=within).stdout
        return int(said.split("submitted job ")[1].split(":")[0])

    def urgent(self) -> None:
        """A job of higher priority takes all nodes, and gives them back."""
        script = self.folder / "urgent.sbatch"
        script.write_text("#!/bin/bash\nsleep 3\n")
        self.cluster.wait(self.cluster.sbatch(script, "--partition=urgent", "--nodes=4", "--exclusive"), "COMPLETED")

    def rank_environment(self, node: str) -> dict[str, str]:
        """What a rank on ``node``, not the batch script's, was started with."""
        (rank, *_) = self.cluster.run(node, "pgrep", "-f", "relora_ds train").stdout.split()
        pairs = self.cluster.run(node, "cat", f"/proc/{rank}/environ").stdout.split("\0")
        return dict(pair.split("=", 1) for pair in pairs if pair)

    def finish(self, job: int) -> dict[str, Any]:
        """The job once it is over; it has come to the end of the run."""
        ended = self.cluster.wait(job, OVER, timeout=1200)
        assert ended["state"] == "COMPLETED", self.output
        assert "the run is done" in self.output
        return ended

    def train_to(self, job: int, update: int) -> None:
        """Until the run has logged ``update``."""
        deadline, asked = time.monotonic() + 180, time.monotonic()
        while self.updates < update:
            assert time.monotonic() < deadline, f"{self.cluster.job(job)}\n{self.output}"
            if time.monotonic() > asked + 2:
                assert (shown := self.cluster.job(job))["state"] not in OVER, f"{shown}\n{self.output}"
                asked = time.monotonic()
            time.sleep(0.1)

    @property
    def updates(self) -> int:
        log = self.run_dir / "metrics.jsonl"
        return sum('"loss"' in line for line in log.read_text().splitlines()) if log.exists() else 0

    @property
    def output(self) -> str:
        path = self.run_dir / "slurm" / "job.out"
        return path.read_text() if path.exists() else "no output"

    def events(self, kind: str, field: str) -> list[Any]:
        """One field of the events of a kind."""
        lines = (self.run_dir / "slurm" / "events.jsonl").read_text().splitlines()
        return [event[field] for event in map(json.loads, lines) if event["event"] == kind]

    def assert_equals(self, whole: Path) -> None:
        """To the last digit."""
        for log in ("metrics.jsonl", "restarts.jsonl"):
            assert read_log(self.run_dir / log) == read_log(whole / log)

    def assert_near(self, whole: Path) -> None:
        """Every update is there once; the order of sums over another number of ranks is all that may differ, and what grows of it."""
        mine, theirs = (
            [record for record in read_log(path / "metrics.jsonl") if "loss" in record] for path in (self.run_dir, whole)
        )
        assert [record["update"] for record in mine] == [record["update"] for record in theirs]
        assert [record["loss"] for record in mine] == pytest.approx([record["loss"] for record in theirs], rel=1e-3)


Story = Callable[[Site, Callable[[str], Path]], None]


# The stories


def four_nodes(site: Site, whole: Callable[[str], Path]) -> None:
    """Warm start, restarts, evaluations and checkpoints over four nodes, one of which is drained at first."""
    set_n4 = ("scontrol", "update", "nodename=n4", "reason=test")
    site.cluster.run("ctl", *set_n4, "state=drain")
    job = site.submit(site.recipe("short"), "--nodes", 4)
    assert f"job {job} (run): PENDING" in site.slurm("status", site.run_dir).stdout, "it waits for the fourth"
    site.cluster.run("ctl", *set_n4, "state=resume")
    site.finish(job)
    site.assert_equals(whole("short"))
    assert site.events("started", "nodes") == [site.cluster.names]
    assert sorted(path.name for path in (site.run_dir / "slurm").iterdir()) == [
        "commit.json", "deepspeed.json", "events.jsonl", "job.out", "job.sbatch", "outcome.json", "recipe.yaml",
    ]  # fmt: skip
    said = site.slurm("status", site.run_dir).stdout
    assert f"job {job} (run): COMPLETED" in said and "update 30 of 30 (100.0%)" in said and "requeues: 0" in said
    assert "the run is done" in site.slurm("logs", site.run_dir, "-n", 3).stdout


def torchrun(site: Site, whole: Callable[[str], Path]) -> None:
    """An agent on each of two nodes; stopped once by a signal, which the ranks heed and the agents do not."""
    job = site.submit(site.recipe("long"), "--nodes", 2, "--launcher", "torchrun")
    site.train_to(job, 30)
    site.cluster.run("ctl", "scancel", "--signal=USR2", job)
    site.finish(job)
    assert site.events("ended", "code") == [75, 0]
    site.assert_equals(whole("long"))


def mpirun(site: Site, whole: Callable[[str], Path]) -> None:
    """Ended with a checkpoint, submitted again, and requeued by an operator."""
    options = (site.recipe("long"), "--nodes", 2, "--launcher", "mpi", "--srun-args=--allow-run-as-root")
    job = site.submit(*options)
    site.train_to(job, 30)
    site.slurm("cancel", site.run_dir)
    site.cluster.wait(job, OVER)
    assert site.events("ended", "code") == [75], site.output
    job = site.submit(*options)
    site.train_to(job, 90)
    site.cluster.run("ctl", "scontrol", "requeue", job)
    assert site.finish(job)["restarts"] == 1
    assert site.events("ended", "decision") == ["stop", "slurm", "stop"]
    site.assert_equals(whole("long"))


def time_limits(site: Site, whole: Callable[[str], Path]) -> None:
    """Its limit is shorter than its training, over slow links. SLURM looks twice a minute, so with one second of warning the signal
    comes 119 to 149 s after the start: by then a busy machine has started its ranks, too."""
    job = site.submit(site.recipe("limited"), "--nodes", 2, "--time", 2, "--sbatch-args=--signal=USR2@1")
    ended = site.finish(job)
    assert ended["restarts"] >= 2
    *stops, last = site.events("ended", "code")
    assert last == 0 and len(stops) == ended["restarts"] and stops.count(75) >= 2
    assert set(stops) <= {75, 140}, (
        "140: the signal came before a rank could hear it, on a machine that takes so long to start one"
    )
    assert site.events("ended", "suspects") == [[]] * len([*stops, last]), "no node is to blame"
    site.assert_equals(whole("limited"))


def signals_operators_preemption(site: Site, whole: Callable[[str], Path]) -> None:
    """scancel --signal, scontrol requeue and a job of higher priority, one after the other."""
    job = site.submit(site.recipe("long"), "--nodes", 2)
    site.train_to(job, 30)
    fields, environ = site.cluster.job(job)["fields"], site.rank_environment("n2")
    assert (fields["Partition"], fields["TimeLimit"], fields["Requeue"]) == ("main", "00:30:00", "1")
    assert {name: value for name, value in environ.items() if LEAKED.get(name) == value} == {}
    site.cluster.run("ctl", "scancel", "--signal=USR2", job)
    site.train_to(job, 90)
    site.cluster.run("ctl", "scontrol", "requeue", job)
    site.train_to(job, 150)
    site.urgent()
    assert site.finish(job)["restarts"] in (3, 4)
    # SLURM 24.11 starts a job once more that requeued itself in the grace of a preemption, though it is done by then
    ends = list(zip(site.events("ended", "decision"), site.events("ended", "code"), strict=True))
    assert ends[:4] == [("requeue", 75), ("slurm", 75), ("requeue", 75), ("stop", 0)], "every stop had its checkpoint"
    assert ends[4:] in ([], [("stop", 0)])
    site.assert_equals(whole("long"))


def preempted_by_cancel(site: Site, whole: Callable[[str], Path]) -> None:
    """SLURM cancels the job for another, without a word before; and gives jobs nothing of the environment of who submits."""
    variables = site.folder / "variables"
    variables.write_text(f"PYTHONPATH={ROOT}\nOMP_NUM_THREADS=1\nNEEDED='by all'\n")
    none = ("--sbatch-args=--export=NONE", "--environment-file", variables)
    job = site.submit(site.recipe("long"), "--nodes", 2, "--partition", "scavenge", *none)
    site.train_to(job, 70)
    assert site.rank_environment("n2").get("NEEDED") == "by all"
    site.urgent()
    assert site.finish(job)["restarts"] == 1
    site.assert_equals(whole("long"))


def dead_node(site: Site, whole: Callable[[str], Path]) -> None:
    """SIGKILL to all that runs on a node: the job goes on with the three others.

    Where the machine is busy, SLURM's word to end the first start may reach a node late, and end the second: one start more.
    """
    job = site.submit(site.recipe("long"), "--nodes", "2-4")
    site.train_to(job, 70)
    site.cluster.kill_node("n2")
    assert "n2" not in site.finish(job)["nodes"]
    first, *others = site.events("started", "nodes")
    assert first == site.cluster.names and others and all(nodes == ["n1", "n3", "n4"] for nodes in others)
    assert site.events("ended", "suspects")[0] == ["n2"]
    site.assert_near(whole("long"))


def cut_off_node(site: Site, whole: Callable[[str], Path]) -> None:
    """Rank 0's node, until the job has begun elsewhere: it goes on there while the old ranks and their script live.

    Once it is back, its srun may end the step of the same number, which is the new start's: one start more.
    """
    job = site.submit(site.recipe("long"), "--nodes", "2-4")
    site.train_to(job, 70)
    site.cluster.cut("n1")
    deadline = time.monotonic() + 300
    while len(site.events("started", "nodes")) < 2:  # SLURM looks at its nodes twice a minute, and waits before it starts anew
        assert time.monotonic() < deadline, f"{site.cluster.job(job)}\n{site.output}"
        time.sleep(0.5)
    time.sleep(10)
    site.cluster.join("n1")
    site.finish(job)
    first, second, *_ = site.events("started", "nodes")
    assert (first, second) == (site.cluster.names, site.cluster.names[1:])
    assert site.events("ended", "decision")[0] == "vanished"
    site.assert_near(whole("long"))


def bad_node(site: Site, whole: Callable[[str], Path]) -> None:
    """A rank is killed; the next one on the same node does not find the tokens. Both starts end in seconds; the node is excluded."""
    job = site.submit(site.recipe("long"), "--nodes", 2)
    site.train_to(job, 45)
    (site.folder / "empty").mkdir()
    site.cluster.run("n2", "mount", "--bind", site.folder / "empty", site.tokens)
    site.cluster.run("n2", "pkill", "-KILL", "-f", "relora_ds train")
    killed = time.monotonic()
    site.cluster.wait(job, ("PENDING", "COMPLETING", *OVER), timeout=60)
    assert time.monotonic() - killed < 40, "no collective is waited for"
    ended = site.finish(job)
    assert site.events("ended", "suspects") == [["n2"], ["n2"], []]
    assert "n2" not in ended["nodes"] and ended["fields"]["ExcNodeList"] == "n2"
    assert any("n2" in line and "data.path" in line for line in site.output.splitlines())
    site.assert_equals(whole("long"))


def hung_rank(site: Site, whole: Callable[[str], Path]) -> None:
    """Its process is stopped: the others write their stacks after train.hang_timeout, the job ends and goes on.

    Of a step that it could not end at once, SLURM may later end the one of the same number: one start more.
    """
    job = site.submit(site.recipe("long", train={**TRAIN, "hang_timeout": 5.0}), "--nodes", 2)
    site.train_to(job, 45)
    site.cluster.run("n2", "pkill", "-STOP", "-f", "relora_ds train")
    site.finish(job)
    first, *others = site.events("ended", "suspects")
    assert first == ["n2"] and others and not any(others)
    assert list((site.run_dir / "stacks").glob("*/rank_00000.txt"))
    site.assert_equals(whole("long"))


def successor(site: Site, whole: Callable[[str], Path]) -> None:
    """Where users may not requeue: the next job takes over where the first stopped."""
    job = site.submit(site.recipe("long"), "--nodes", 2, "--requeue-by", "dependency")
    site.train_to(job, 30)
    site.cluster.run("ctl", "scancel", "--signal=TERM", job)
    assert site.cluster.wait(job, OVER)["exit_code"] == 75
    (following,) = site.events("successor", "job")
    assert following > job and site.finish(following)["restarts"] == 0
    waiting = site.cluster.run("ctl", "squeue", "--noheader", "--states=PENDING,RUNNING").stdout
    assert waiting == "", "none is left to wait for a run that is done"
    site.assert_equals(whole("long"))


def cancelled(site: Site, _whole: Callable[[str], Path]) -> None:
    """One job for a run, submitted from inside another job; its end on demand, with a checkpoint."""
    path = site.recipe("long")
    job = site.submit(path, "--nodes", 1, within=("srun", "--partition=urgent", "--gpus-per-node=1", "--cpu-bind=none"))
    refused = site.slurm("submit", path, "--tasks-per-node", 1, expect=2).stderr
    assert f"job {job} (" in refused and "is there for it; relora-ds slurm cancel" in refused, refused
    site.train_to(job, 10)
    said = site.slurm("status", site.run_dir).stdout
    assert f"job {job} (run): RUNNING on n1" in said and "left of its time limit" in said and "of 240 (" in said
    assert site.slurm("hostfile", "--job", job, "--slots", 8).stdout == "n1 slots=8\n"
    site.slurm("cancel", site.run_dir)
    site.cluster.wait(job, OVER)
    assert (site.events("ended", "decision"), site.events("ended", "code")) == (["stop"], [75])
    assert "a checkpoint is written" in site.output and "cancelled" in site.output


def gpus_unseen(site: Site, _whole: Callable[[str], Path]) -> None:
    """SLURM gives GPUs that PyTorch does not see, as where a driver is missing: nothing trains on CPUs in their stead."""
    job = site.submit(site.recipe("short"), "--nodes", 2, "--gpus-per-node", 1, "--gpu-request", "gres")
    ended = site.cluster.wait(job, OVER)
    assert (ended["exit_code"], ended["restarts"], site.updates) == (2, 0, 0), site.output
    (line,) = [line for line in site.output.splitlines() if line.startswith("relora-ds: error: ")]
    assert "SLURM gave n1 GPUs, but PyTorch sees none" in line


def bad_submissions(site: Site, _whole: Callable[[str], Path]) -> None:
    """Each is one line, and leaves no job and no folder behind."""
    refused: list[tuple[tuple[object, ...], dict[str, Any], str]] = [
        (("--partition", "nope"), {}, "--partition='nope': SLURM refuses the job: invalid partition specified: nope"),
        (
            ("--nodes", 8),
            {},
            "--nodes='8': SLURM refuses the job: allocation failure: Requested node configuration is not available",
        ),
        (("relora.rnak=4",), {}, "relora.rnak=4: unknown key; did you mean 'rank'?"),
        (("--nodes", 3), {}, "train.global_batch=8: is not a multiple of micro_batch x ranks = 2 x 3"),
        (("--ndoes", 3), {}, "--ndoes=None: unknown option; did you mean '--nodes'?"),
        ((), {"run": {"dir": "/dev/null/run"}}, "run.dir='/dev/null/run': Not a directory"),
        ((), {"data": {"path": "/nowhere"}}, "data.path='/nowhere'"),
    ]
    for options, changes, message in refused:
        recipe = site.recipe("short", **{"train": {"micro_batch": 1} if 8 in options else {}, **changes})
        result = site.slurm("submit", recipe, "--tasks-per-node", 1, *options, expect=2)
        assert result.stderr.startswith(f"relora-ds: error: {message}"), result.stderr
        assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert site.cluster.run("ctl", "squeue", "--noheader", "--states=all").stdout == ""
    assert not site.run_dir.exists()


STORIES: list[Story] = [
    time_limits, cut_off_node, signals_operators_preemption, preempted_by_cancel, dead_node, bad_node, hung_rank, four_nodes,
    torchrun, mpirun, successor, cancelled, gpus_unseen, bad_submissions,
]  # fmt: skip


# How they are played


@pytest.fixture(scope="module")
def played(
    request: pytest.FixtureRequest, token_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The stories of the tests that were selected, under way."""
    names = [item.callspec.id for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    whole = Wholes(tmp_path_factory.mktemp("whole"), token_folder)

    def play(story: Story) -> None:
        place = tmp_path_factory.mktemp(story.__name__)
        rate = SLOW_LINK if story is time_limits else None
        with Cluster(tmp_path_factory.mktemp("c"), 4, partitions=PARTITIONS, rate=rate) as cluster:
            story(Site(cluster, place, token_folder), whole)

    with ThreadPoolExecutor(AT_ONCE) as stage:
        stories = {story.__name__: stage.submit(play, story) for story in STORIES if story.__name__ in names}
        yield stories
        for future in stories.values():
            future.cancel()


class Wholes:
    """Runs that nothing happened to, on one machine; each is trained when it is asked for first."""

    def __init__(self, folder: Path, tokens: Path) -> None:
        self.folder, self.tokens, self.lock = folder, tokens, threading.Lock()

    def __call__(self, kind: str) -> Path:
        with self.lock:
            if not (self.folder / kind).exists():
                relora(
                    "train", write_recipe(self.folder, self.tokens, kind, **RECIPES[kind]), "--nproc", 4 if kind == "short" else 2
                )
        return self.folder / kind


def why_not(story: Story) -> str:
    if story is mpirun and not (shutil.which("mpirun") and importlib.util.find_spec("mpi4py")):
        return "not installed: openmpi-bin, mpi4py"
    return ""


@pytest.mark.parametrize(
    "name",
    [pytest.param(story.__name__, marks=pytest.mark.skipif(bool(why_not(story)), reason=why_not(story))) for story in STORIES],
    ids=lambda name: name,
)
def test_story(name: str, played: dict[str, Future[None]]) -> None:
    played[name].result()


def test_without_slurm_there_is_one_line(token_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, token_folder, "run")
    result = relora("slurm", "submit", recipe, "--tasks-per-node", 1, expect=2, PATH="/nowhere")
    assert result.stderr == (
        "relora-ds: error: sbatch=None: is not on the PATH; run this where SLURM's commands are: a login node of the cluster\n"
    )
    shown = relora("slurm", "submit", recipe, "--tasks-per-node", 1, "--dry-run", PATH="/nowhere").stdout
    assert shown.startswith("#!/bin/bash\n#SBATCH --job-name=run\n") and not (tmp_path / "run").exists()
