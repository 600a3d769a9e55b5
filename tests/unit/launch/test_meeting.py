"""What the ranks say to each other before the first collective; each rank is a thread at a store in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from relora_ds.errors import AllError, RankError, StartError
from relora_ds.launch import meeting
from relora_ds.launch.devices import Gpu
from relora_ds.launch.meeting import Card
from relora_ds.launch.places import Place

A, B = Gpu("GPU-a", "0000:1b:00"), Gpu("GPU-b", "0000:43:00")
CPUS = [Card(0, "n1", 0), Card(1, "n1", 1), Card(2, "n2", 0), Card(3, "n2", 1)]
GPUS = [replace(card, gpus=(A, B)) for card in CPUS]


@pytest.fixture(autouse=True)
def leave_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SPEAK_S", 0.0)


def together(function: Callable[[Any, int], Any], ranks: Sequence[int]) -> list[Any]:
    """``function(store, rank)`` in a thread a rank: what it returns, or the exception that it raises."""
    store = dist.HashStore()

    def call(rank: int) -> Any:
        try:
            return function(store, rank)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(call, ranks))


def test_all_learn_of_all() -> None:
    found = together(lambda store, rank: meeting.meet(store, GPUS[rank], 4, 5.0, pytest.fail), [3, 1, 0, 2])
    assert found == [GPUS] * 4


def test_ranks_that_can_train_are_let_through() -> None:
    meeting.judge(CPUS)
    meeting.judge(GPUS)
    meeting.judge([replace(card, gpus=((A, B)[card.rank % 2],)) for card in CPUS])  # each is shown its own alone


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """First while there is hope, then by all that came; and the node that nobody came from."""
    monkeypatch.setattr(meeting, "REMIND_S", 0.1)
    told: list[str] = []
    nodes = ["n1", "n2"]
    found = together(lambda store, rank: meeting.meet(store, CPUS[rank], 4, 0.4, told.append, nodes), [0, 1])
    assert told == ["waiting for ranks 2, 3 of 4 to start"]
    for error in found:
        assert isinstance(error, StartError) and error.host == "n2"
        assert str(error) == "ranks 2, 3 of 4 did not come to the start within 0 s (no rank of n2 did)"


def test_a_problem_is_told_before_an_absence() -> None:
    cards = [replace(CPUS[0], problem="data.path='/x': is not there"), *CPUS[1:]]
    for error in together(lambda store, rank: meeting.meet(store, cards[rank], 4, 0.2, lambda text: None), [0, 1]):
        assert isinstance(error, RankError) and str(error) == "rank 0 on n1: data.path='/x': is not there"


def test_what_all_find_and_what_some_find() -> None:
    problem = "data.path='/x': is not there"
    with pytest.raises(AllError) as everybody:
        meeting.judge([replace(card, problem=problem) for card in CPUS])
    assert str(everybody.value) == problem
    with pytest.raises(RankError) as some:
        meeting.judge([replace(card, problem=problem if card.host == "n2" else "") for card in CPUS])
    assert (some.value.rank, some.value.host) == (2, "n2")
    assert str(some.value) == f"rank 2 on n2 (and 1 more): {problem}"


@pytest.mark.parametrize(
    ("odd", "line"),
    [
        ([2, 3], "rank 2 on n2 (and 1 more): drives the CPU, where the others drive a GPU"),
        ([0, 1, 3], "rank 2 on n2: drives a GPU, where the others drive the CPU"),
    ],
)
def test_one_kind_of_device_for_all(odd: list[int], line: str) -> None:
    cards = [replace(card, gpus=()) if card.rank in odd else card for card in GPUS]
    with pytest.raises(RankError) as error:
        meeting.judge(cards)
    assert str(error.value).startswith(line)


def test_two_ranks_with_one_gpu_are_named() -> None:
    """A node of which one GPU fell off the bus: two of its ranks would take turns."""
    cards = [replace(card, gpus=(A,)) if card.host == "n2" else card for card in GPUS]
    with pytest.raises(RankError) as error:
        meeting.judge(cards)
    assert (error.value.rank, error.value.host) == (3, "n2")
    line = "rank 3 on n2: drives the same GPU GPU-a as rank 2, and is shown 1: start one process for each GPU"
    assert str(error.value).startswith(line)


def test_one_gpu_for_two_ranks_on_every_node_is_a_setting() -> None:
    with pytest.raises(AllError, match="rank 1 on n1 drives the same GPU"):
        meeting.judge([replace(card, gpus=(A,)) for card in CPUS])


def test_instances_of_one_gpu_are_refused() -> None:
    shown = [Gpu("MIG-1", "0000:1b:00"), Gpu("MIG-2", "0000:1b:00")]
    with pytest.raises(AllError, match=r"two instances \(MIG\) of one GPU"):
        meeting.judge([replace(card, gpus=(shown[card.rank],)) for card in CPUS[:2]])


def test_a_share_of_the_gpus_for_some_ranks() -> None:
    """--gpu-bind=closest: ranks 0 and 1 are shown two GPUs, ranks 2 and 3 the two others."""
    near, far = (A, B), (Gpu("GPU-c", "c"), Gpu("GPU-d", "d"))
    meeting.judge([Card(rank, "n1", rank, near if rank < 2 else far) for rank in range(4)])


@pytest.mark.parametrize(("known", "size"), [(None, None), (1, None), (1, 2)])
def test_a_place_is_completed_by_the_hosts(known: int | None, size: int | None) -> None:
    cards = [replace(card, local_rank=known if card.rank == 3 else None) for card in CPUS]
    place = meeting.complete(Place(3, 4, known, size, "n1", 29500, "torchrun"), cards)
    assert (place.local_rank, place.local_world_size, place.is_one_node) == (1, 2, False)


def test_ranks_on_one_node_are_known_to_be() -> None:
    cards = [Card(rank, "pod", None) for rank in range(2)]
    assert meeting.complete(Place(1, 2, None, None, "pod", 29500, "torchrun"), cards).is_one_node


def test_machines_of_one_name_are_two() -> None:
    """Images of a cloud that are all called localhost: taken for one node, gloo would be kept on the loopback interface."""
    cards = [Card(rank, "localhost", None, (A,), boot=f"boot {rank}") for rank in range(2)]
    meeting.judge(cards)
    place = meeting.complete(Place(1, 2, None, None, "10.0.0.1", 29500, "torchrun"), cards)
    assert (place.local_rank, place.local_world_size, place.is_one_node) == (0, 1, False)


def test_an_error_of_all_ranks_in_the_middle_of_a_run() -> None:
    assert together(lambda store, rank: meeting.is_found_by_all(store, rank, 3), [0, 1, 2]) == [True] * 3


def test_an_error_of_some_ranks_in_the_middle_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "ANSWER_S", 0.2)
    assert together(lambda store, rank: meeting.is_found_by_all(store, rank, 3), [1, 2]) == [False] * 2


def test_rank_0_stays_until_the_last_word_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(store: Any, rank: int) -> float:
        began = time.monotonic()
        time.sleep(0.3 * rank)
        meeting.part(store, rank, 2)
        return time.monotonic() - began

    assert together(leave, [0, 1])[0] > 0.25
    monkeypatch.setattr(meeting, "PARTING_S", 0.1)
    assert together(leave, [0])[0] < 2.0


def test_the_others_stay_until_rank_0_has_told_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """srun --kill-on-bad-exit ends the rest when the first is gone."""
    monkeypatch.setattr(meeting, "SPEAK_S", 0.4)

    def leave(store: Any, rank: int) -> float:
        began = time.monotonic()
        meeting.part(store, rank, 2)
        return time.monotonic() - began

    first, second = together(leave, [0, 1])
    assert first < 0.3 and second >= 0.4
