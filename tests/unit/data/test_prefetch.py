"""Batches read ahead: the same ones in the same order, no further than asked, and a thread that ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from relora_ds.data import prefetch
from relora_ds.data.prefetch import Prefetch
from relora_ds.data.token_dataset import TokenDataset, rank_micro_batches
from relora_ds.errors import ConfigError
from tests.unit.data.test_token_dataset import write_folder

CPU = torch.device("cpu")
ORDER = [range(2 * number, 2 * number + 2) for number in range(12)]


class Held:
    """Sample i is the token i; notes what was read, and fails or waits where it is told to."""

    def __init__(self, fails_at: int | None = None, waits_for: threading.Event | None = None) -> None:
        self.read: list[Sequence[int]] = []
        self.fails_at, self.waits_for = fails_at, waits_for
        self.has_begun = threading.Event()

    def batch(self, samples: Sequence[int]) -> Tensor:
        self.has_begun.set()
        if self.waits_for is not None:
            self.waits_for.wait(60)
        self.read.append(samples)
        if self.fails_at in samples:
            raise ConfigError("data.path", "tokens", "a token file is damaged")
        return torch.tensor([[number] for number in samples])


@pytest.fixture
def make() -> Iterator[Callable[..., Prefetch]]:
    """Makes one that is closed after the test."""
    made: list[Prefetch] = []

    def one(dataset: Any, order: Any = None, device: torch.device = CPU, **more: Any) -> Prefetch:
        made.append(Prefetch(dataset, ORDER if order is None else order, device, **more))
        return made[-1]

    yield one
    for each in made:
        each.close()


def until(is_so: Callable[[], bool]) -> bool:
    """Whether it comes to be so within ten seconds."""
    deadline = time.monotonic() + 10
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    return is_so()


@pytest.mark.parametrize("depth", [0, 1, 4, 100])
def test_the_batches_of_a_run_over_epochs(tmp_path: Path, make: Callable[..., Prefetch], depth: int) -> None:
    """Updates 3 to 20 of rank 1 of 2: 144 samples of a split that has 37."""
    dataset = TokenDataset(write_folder(tmp_path / "tokens", "uint16"), "train", 8, seed=5)
    updates = [rank_micro_batches(update, global_batch=8, micro_batch=2, rank=1, world_size=2) for update in range(3, 21)]
    ahead = make(dataset, chain.from_iterable(updates), depth=depth)
    before = torch.get_rng_state()
    for samples in chain.from_iterable(updates):
        assert torch.equal(ahead.batch(samples), dataset.batch(samples))
    assert torch.equal(torch.get_rng_state(), before), "dropout is drawn from it"


def test_no_further_than_it_may(make: Callable[..., Prefetch]) -> None:
    held = Held()
    ahead = make(held, iter(ORDER), depth=3)
    assert held.read == [], "nothing before the first is asked for"
    for number, samples in enumerate(ORDER, start=1):
        ahead.batch(samples)
        read = min(number + 3, len(ORDER))
        assert until(lambda read=read: len(held.read) == read)  # type: ignore[misc]
        time.sleep(0.01)
        assert held.read == ORDER[:read], "whoever is slow has three waiting, and none is beyond the last"


def test_the_order_that_was_told(make: Callable[..., Prefetch]) -> None:
    ahead = make(Held())
    ahead.batch(ORDER[0])
    with pytest.raises(ValueError, match=r"the next batch is range\(2, 4\), not range\(4, 6\)"):
        ahead.batch(ORDER[2])
    beyond = make(Held(), ORDER[:1])
    beyond.batch(ORDER[0])
    with pytest.raises(ValueError, match="the next batch is None"):
        beyond.batch(ORDER[1])


def test_an_error_comes_with_its_batch(make: Callable[..., Prefetch]) -> None:
    held = Held(fails_at=7)
    ahead = make(held)
    for samples in ORDER[:3]:
        ahead.batch(samples)
        assert until(lambda: len(held.read) > 3), "it is known by now"
    with pytest.raises(ConfigError, match="a token file is damaged") as caught:
        ahead.batch(ORDER[3])
    assert "in batch" in "".join(traceback.format_tb(caught.tb)) and caught.traceback[-1].path == Path(__file__)


def test_an_id_that_no_token_has(tmp_path: Path, make: Callable[..., Prefetch]) -> None:
    """Behind the places that are looked at before a run begins."""
    folder = write_folder(tmp_path / "tokens", "uint32", tokens=200_000)
    data = np.zeros(200_000, dtype="<u4")
    data[5000] = 80_000
    (folder / "train.bin").write_bytes(data.tobytes())
    order = [range(600, 610), range(610, 620), range(620, 630)]
    ahead = make(TokenDataset(folder, "train", 8, shuffle=False), order)
    assert [len(ahead.batch(samples)) for samples in order[:2]] == [10, 10]
    with pytest.raises(
        ConfigError, match=r"data\.path=.* holds the id 80000, its vocabulary ends before 80000; delete the folder"
    ):
        ahead.batch(order[2])


@pytest.mark.parametrize("asked", [0, 1, len(ORDER)])
def test_the_thread_ends_when_it_is_closed(asked: int) -> None:
    ahead = Prefetch(Held(), ORDER, CPU)  # type: ignore[arg-type]
    for samples in ORDER[:asked]:
        ahead.batch(samples)
    assert ahead._thread.is_alive()
    ahead.close()
    assert not ahead._thread.is_alive()
    ahead.close()
    with pytest.raises(ValueError, match="the next batch is None"):
        ahead.batch(ORDER[asked : asked + 1] and ORDER[asked])


def test_the_thread_ends_with_its_owner() -> None:
    ahead: Prefetch | None = Prefetch(Held(), ORDER, CPU)  # type: ignore[arg-type]
    assert ahead is not None
    ahead.batch(ORDER[0])
    thread = ahead._thread
    ahead = None
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_disk_that_does_not_answer_holds_no_end_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "CLOSE_S", 0.1)
    answers = threading.Event()
    held = Held(waits_for=answers)
    ahead = Prefetch(held, ORDER, CPU)  # type: ignore[arg-type]
    threading.Thread(target=lambda: ahead.batch(ORDER[0]), daemon=True).start()
    assert held.has_begun.wait(10)
    ahead.close()
    assert ahead._thread.is_alive() and ahead._thread.daemon
    answers.set()
    ahead._thread.join(10)
    assert not ahead._thread.is_alive() and len(held.read) == 1, "what was asked for and not begun is left"


HUNG = """
import time
import torch
from relora_ds.data.prefetch import Prefetch

class Hung:
    def batch(self, samples):
        if samples[0] > 2:
            time.sleep(600)
        return torch.zeros(len(samples), 1, dtype=torch.int64)

ahead = Prefetch(Hung(), [[0], [1], [2], [3], [4]], torch.device("cpu"))
ahead.batch([0])
time.sleep(0.2)
raise RuntimeError("an error of the main thread")
"""


def test_no_process_waits_for_it_at_its_end() -> None:
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run([sys.executable, "-c", HUNG], cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1 and "an error of the main thread" in result.stderr


def test_to_a_gpu_from_pinned_memory_without_waiting(make: Callable[..., Prefetch]) -> None:
    """With a stand-in for the tensor."""
    told: list[Any] = []

    class Ids:
        def pin_memory(self) -> Ids:
            told.append("pinned")
            return self

        def to(self, device: torch.device, *, non_blocking: bool) -> str:
            told.append((device, non_blocking))
            return "on the GPU"

    class Dataset:
        def batch(self, samples: Sequence[int]) -> Ids:
            return Ids()

    cuda = torch.device("cuda", 1)
    assert make(Dataset(), device=cuda).batch(ORDER[0]) == "on the GPU"
    assert told == ["pinned", (cuda, True)]
