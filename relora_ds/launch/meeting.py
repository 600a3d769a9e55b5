"""The ranks meet at the store before the first collective: what only some of them find ends all at once, and in one line.

Each says who it is, what it drives, and what is wrong with it, if anything. Rank 0 gathers this and hands it to all, who judge alike.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from relora_ds.errors import AllError, RankError, StartError
from relora_ds.launch import devices
from relora_ds.launch.devices import Gpu
from relora_ds.launch.places import Place

ARRIVAL_S = 600.0
"""How long the ranks may take to arrive: the imports of the slowest. Those that are missing for good are not waited for longer."""
REMIND_S = 60.0
"""After so long it is told who is waited for; and so long a rank with a problem waits for the others."""
ANSWER_S = 10.0
"""How long a rank that finds something wrong in the middle of a run waits for others that find the same."""
PARTING_S = 5.0
"""How long the rank that holds the store waits for the others to have read the last word in it."""
SPEAK_S = 2.0
"""How long the others stay after it, so that rank 0 can tell it: whoever is the first to exit may have the rest ended."""
POLL_S = 0.02


@dataclass(frozen=True)
class Card:
    """What a rank says of itself.

    Attributes:
        rank, host, local_rank: who; the last is None where its launcher does not say.
        gpus: those that it is shown; none on a CPU.
        problem: why it cannot train; empty where it can.
        boot: what tells its machine from another of the same name.
    """

    rank: int
    host: str
    local_rank: int | None
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    boot: str = ""

    @property
    def node(self) -> tuple[str, str]:
        """Two containers of one machine have other names, and two machines may have the same."""
        return self.host, self.boot

    @property
    def kind(self) -> str:
        return "a GPU" if self.gpus else "the CPU"


def meet(
    store: Any, card: Card, world_size: int, limit_s: float, tell: Callable[[str], None], nodes: Sequence[str] = ()
) -> list[Card]:
    """The cards of all ranks, by rank.

    Args:
        store: of torch.distributed, with all ranks at it.
        card: this rank's.
        world_size: of the job.
        limit_s: how long to wait for the others.
        tell: rank 0 tells the user whom it waits for.
        nodes: of the job, by the names that ranks have for them; none where nobody says.

    Raises:
        RankError: one of those that came has a problem, and others did not come.
        StartError: some ranks did not come.
        RuntimeError: the store is gone, and rank 0 with it.
    """
    store.set(_key(card.rank), json.dumps(asdict(card)))
    if card.rank == 0:
        missing = _await(store, world_size, limit_s, tell)
        cards = [json.loads(store.get(_key(rank))) for rank in range(world_size) if rank not in missing]
        store.set("all", json.dumps({"cards": cards, "missing": missing}))
    store.wait(["all"], timedelta(seconds=limit_s + PARTING_S))
    found = json.loads(store.get("all"))
    cards = [Card(**{**entry, "gpus": tuple(Gpu(**gpu) for gpu in entry["gpus"])}) for entry in found["cards"]]
    if found["missing"]:
        part(store, card.rank, len(cards))
        _refuse_problems(cards)
        absent = [node for node in nodes if node not in {card.host for card in cards}]
        where = f" (no rank of {', '.join(absent[:8])} did)" if absent else ""
        text = f"{_ranks(found['missing'])} of {world_size} did not come to the start within {limit_s:.0f} s{where}"
        raise StartError(text, next(iter(absent), None))
    return cards


def _await(store: Any, world_size: int, limit_s: float, tell: Callable[[str], None]) -> list[int]:
    """Waits for the cards of all ranks; returns the ranks that did not come."""
    started, missing = time.monotonic(), list(range(world_size))
    for pause_s in (min(REMIND_S, limit_s), limit_s):
        left_s = started + pause_s - time.monotonic()
        with suppress(RuntimeError):
            store.wait([_key(rank) for rank in missing], timedelta(seconds=max(left_s, 0.001)))
            return []
        missing = [rank for rank in missing if not store.check([_key(rank)])]
        if pause_s < limit_s:
            tell(f"waiting for {_ranks(missing)} of {world_size} to start")
    return missing


def _key(rank: int) -> str:
    return f"rank {rank}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' * (len(ranks) > 1)} {shown}{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''}"


def part(store: Any, rank: int, world_size: int) -> None:
    """Says that this rank has read the last word. Rank 0, whose end may be the store's, waits a while for all to have, and the others
    for rank 0 to tell it."""
    with suppress(RuntimeError):
        read, deadline = store.add("read", 1), time.monotonic() + PARTING_S
        while rank == 0 and read < world_size and time.monotonic() < deadline:
            time.sleep(POLL_S)
            read = store.add("read", 0)
    if rank != 0:
        time.sleep(SPEAK_S)


def judge(cards: Sequence[Card]) -> None:
    """Whether the ranks can train together. PURE.

    Raises:
        AllError: they all find an obstacle.
        RankError: some of them do.
    """
    if all(card.problem for card in cards):
        raise AllError(cards[0].problem)
    _refuse_problems(cards)
    _judge_kinds(cards)
    _judge_gpus(cards)


def _refuse_problems(cards: Sequence[Card]) -> None:
    found = [card for card in cards if card.problem]
    if found:
        raise RankError(found[0].rank, found[0].host, found[0].problem, more=len(found) - 1)


def _judge_kinds(cards: Sequence[Card]) -> None:
    """A job over CPUs and GPUs would wait for itself in two kinds of process groups."""
    kinds = Counter(card.kind for card in cards)
    if len(kinds) > 1:
        usual = "a GPU" if kinds["a GPU"] >= kinds["the CPU"] else "the CPU"
        odd = [card for card in cards if card.kind != usual]
        problem = f"drives {odd[0].kind}, where the others drive {usual}: all must have the same kind of device"
        raise RankError(odd[0].rank, odd[0].host, problem, more=len(odd) - 1)


def _judge_gpus(cards: Sequence[Card]) -> None:
    locals_ = local_ranks(cards)
    driven = [
        (card.rank, card.node, card.gpus[devices.own(local, len(card.gpus))])
        for card, local in zip(cards, locals_, strict=True)
        if card.gpus
    ]
    found = devices.shared(driven)
    if not found:
        return
    first, second, its, gpu = next(iter(found.values()))
    host = cards[second].host
    what = "the same GPU" if its.uuid == gpu.uuid else "two instances (MIG) of one GPU, which NCCL does not serve,"
    shown = len(cards[second].gpus)
    problem = (
        f"drives {what} {gpu.uuid or gpu.bus} as rank {first}, and is shown {shown}: "
        "start one process for each GPU, and show each its own or all of them"
    )
    if len(found) == len({card.node for card in cards}):  # on every node: it was asked for so
        raise AllError(f"rank {second} on {host} {problem}")
    raise RankError(second, host, problem)


def local_ranks(cards: Sequence[Card]) -> list[int]:
    """Each rank's number on its node: its launcher's word, or else by counting."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for card in cards:
        found.append(seen[card.node] if card.local_rank is None else card.local_rank)
        seen[card.node] += 1
    return found


def complete(place: Place, cards: Sequence[Card]) -> Place:
    """The place with what its launcher did not say of the node, by the hosts of the ranks. PURE."""
    here = sum(card.node == cards[place.rank].node for card in cards)
    return replace(
        place,
        local_rank=local_ranks(cards)[place.rank],
        local_world_size=here if place.local_world_size is None else place.local_world_size,
    )


def is_found_by_all(store: Any, rank: int, world_size: int) -> bool:
    """Whether all ranks have found something wrong by now: called by each that has. The others may wait in a collective."""
    try:
        found, deadline = store.add("refused", 1), time.monotonic() + ANSWER_S
        while found < world_size and time.monotonic() < deadline:
            time.sleep(POLL_S)
            found = store.add("refused", 0)
    except RuntimeError:  # rank 0 is gone
        return False
    if found >= world_size:
        part(store, rank, world_size)
    return bool(found >= world_size)
