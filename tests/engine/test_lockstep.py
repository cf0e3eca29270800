"""Ranks that step and sleep together: whoever is given work wakes all, however late others hear."""

from __future__ import annotations

import queue
import random
import threading
import time

import pytest
import torch

from moebius.engine.lockstep import Lockstep
from moebius.errors import PeerError
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.shared_memory import Segment, SharedMemoryExchange

EPOCH = Epoch("lockstep", 1)


def exchanges(size: int, timeout: float = 20.0) -> list[SharedMemoryExchange]:
    spec = ExchangeSpec(size, tokens=8, hidden=4, top_k=1, dtype=torch.float32)
    with Segment(spec, EPOCH) as segment:
        return [
            SharedMemoryExchange(segment.place, spec, rank, EPOCH, timeout=timeout)
            for rank in range(size)
        ]


def test_all_learn_the_greatest_number_of_sequences_that_any_draws_for() -> None:
    ranks = [Lockstep(exchange) for exchange in exchanges(3)]
    steps = [
        threading.Thread(target=one.agree, args=(True, 0, drawn))
        for one, drawn in zip(ranks, (0, 7, 3), strict=True)
    ]
    for step in steps:
        step.start()
    for step in steps:
        step.join()
    assert [one.most_drawn for one in ranks] == [7, 7, 7]


class Rank(threading.Thread):
    """A rank whose requests are numbers of steps; what the front says comes through an inbox."""

    def __init__(self, lockstep: Lockstep) -> None:
        super().__init__(daemon=True)
        self.inbox: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self.finished = 0
        self.steps = 0
        self._lockstep = lockstep
        self._work: list[int] = []
        self._stopping = False

    def run(self) -> None:
        while not self._stopping:
            self._take(block=not self._lockstep.awake)
            if self._lockstep.awake and self._lockstep.agree(bool(self._work)):
                self.steps += 1
                self._work = [left - 1 for left in self._work]
                self.finished += self._work.count(0)
                self._work = [left for left in self._work if left]

    def _take(self, *, block: bool) -> None:
        try:
            item = self.inbox.get(block, 0.05)
        except queue.Empty:
            return
        if item is None:
            self._stopping = True
            return
        number, steps = item
        self._lockstep.hear(number)
        if steps:
            self._work.append(steps)


def deliver_late(
    ranks: list[Rank], letters: list[list[tuple[int, int]]], chance: random.Random
) -> None:
    """Each rank gets its letters in order, but at its own pace."""
    while any(letters):
        rank = chance.choice([i for i, each in enumerate(letters) if each])
        ranks[rank].inbox.put(letters[rank].pop(0))
        if chance.random() < 0.3:
            time.sleep(chance.random() * 0.004)


@pytest.mark.parametrize("seed", range(6))
def test_every_request_is_computed_and_then_all_sleep(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice([1, 2, 3, 4])
    ranks = [Rank(Lockstep(exchange)) for exchange in exchanges(size)]
    for rank in ranks:
        rank.start()
    number = 0
    for _ in range(8):
        letters: list[list[tuple[int, int]]] = [[] for _ in ranks]
        for _ in range(chance.randrange(1, 6)):
            number += 1
            at = chance.randrange(size)
            for rank, letter in enumerate(letters):
                letter.append((number, chance.randrange(1, 4) if rank == at else 0))
        deliver_late(ranks, letters, chance)
        if chance.random() < 0.5:  # some begin while the others still run
            time.sleep(0.01)
    deadline = time.monotonic() + 20
    while sum(rank.finished for rank in ranks) < number or any(
        rank._lockstep.awake for rank in ranks
    ):
        assert time.monotonic() < deadline, [rank.finished for rank in ranks]
        time.sleep(0.002)
    assert len({rank.steps for rank in ranks}) == 1
    for rank in ranks:
        rank.inbox.put(None)
        rank.join(5)
        assert not rank.is_alive()


def test_a_rank_that_heard_of_nothing_new_stays_asleep() -> None:
    first, second = (Lockstep(exchange, heard=3) for exchange in exchanges(2))
    both = [threading.Thread(target=each.agree, args=(False,)) for each in (first, second)]
    assert first.awake and second.awake, "they have just met"
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(5)
    first.hear(3)
    first.hear(2)
    assert not first.awake and not second.awake
    first.hear(4)
    assert first.awake


def test_they_stay_awake_while_one_has_not_heard_what_another_has() -> None:
    first, second = (Lockstep(exchange) for exchange in exchanges(2))
    second.hear(1)
    other = threading.Thread(target=second.agree, args=(False,))
    other.start()
    assert not first.agree(False)
    other.join(5)
    assert first.awake and second.awake
    first.hear(1)
    other = threading.Thread(target=second.agree, args=(False,))
    other.start()
    first.agree(False)
    other.join(5)
    assert not first.awake and not second.awake


def test_a_rank_that_does_not_come_is_an_error() -> None:
    first, _ = exchanges(2, timeout=0.1)
    with pytest.raises(PeerError) as caught:
        Lockstep(first).agree(True)
    assert caught.value.ranks == (1,)
