"""Engines in step: each has its own requests, and outlives the others' leaving."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.collector import Collector
from engine.test_engine import ask, engine, prompts, tokens
from moebius.engine.engine import Engine
from moebius.engine.in_process import InProcessClient
from moebius.engine.rank import RankEngine
from moebius.errors import EngineError, PeerError
from moebius.ops.steps import StepInputs
from moebius.parallel.exchange import Epoch, Exchange, ExchangeSpec
from moebius.parallel.shared_memory import Segment, SharedMemoryExchange

SPEC = ExchangeSpec(2, tokens=8, hidden=4, top_k=1, dtype=torch.float32)


class Pair:
    """Two ranks of one process, whose models need nobody's experts: what they share is the step."""

    def __init__(self, directory: Path) -> None:
        self.alone = engine(directory)
        self.parted: list[tuple[int, PeerError]] = []
        self.used: list[Exchange] = []
        self.engines = [self._rank(engine(directory), rank) for rank in range(2)]
        self.clients = [InProcessClient(each, step_deadline=20) for each in self.engines]
        self.heard = Collector()
        self.number = 0
        self.epoch = 0
        for client in self.clients:
            client.start(self.heard)
        self.join()

    def _rank(self, one: Engine, rank: int) -> RankEngine:
        made = RankEngine(one.runner, one.scheduler, one.info, use=self.used.append)
        made.on_parted = lambda error: self.parted.append((rank, error))
        return made

    def join(self) -> None:
        self.epoch += 1
        epoch = Epoch("pair", self.epoch)
        with Segment(SPEC, epoch) as segment:
            members = [
                SharedMemoryExchange(segment.place, SPEC, rank, epoch, timeout=20)
                for rank in range(2)
            ]
        for rank, member in enumerate(members):
            self.do(rank, lambda rank=rank, member=member: self._join(rank, member))  # type: ignore[misc]

    def _join(self, rank: int, member: Exchange) -> None:
        self.engines[rank].join(member, self.number)

    def do(self, rank: int, work: Callable[[], None]) -> None:
        self.clients[rank].between_steps(work)

    def submit(self, rank: int, id: str, prompt: list[int], max_tokens: int = 8) -> None:
        self.number += 1
        number = self.number
        self.clients[rank].submit(ask(self.alone, id, prompt, max_tokens=max_tokens))
        for other, member in enumerate(self.engines):
            self.do(other, lambda member=member: member.hear(number))  # type: ignore[misc]

    def wait(self, *ids: str) -> None:
        self.heard.wait(lambda: all(self.heard.ended(id) for id in ids))

    def tokens(self, id: str) -> list[int]:
        return tokens(self.heard.outputs[id])


@pytest.fixture
def pair(tiny_model: Path) -> Iterator[Pair]:
    made = Pair(tiny_model)
    yield made
    for client in made.clients:
        client.close(5)


def expected(pair: Pair, id: str, prompt: list[int], max_tokens: int = 8) -> list[int]:
    client = InProcessClient(pair.alone, step_deadline=20)
    heard = Collector()
    client.start(heard)
    client.submit(ask(pair.alone, id, prompt, max_tokens=max_tokens))
    heard.wait(lambda: heard.ended(id))
    client.close(5)
    return tokens(heard.outputs[id])


def test_ranks_without_work_take_part_and_all_sleep_in_the_end(pair: Pair) -> None:
    pair.submit(0, "a", [1, 2, 3], 20)
    pair.wait("a")
    deadline = time.monotonic() + 10
    while any(each.has_work for each in pair.engines):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    steps = [each.stats().steps for each in pair.engines]
    assert steps[0] == steps[1] == 20
    assert pair.tokens("a") == expected(pair, "a", [1, 2, 3], 20)


def test_requests_at_both_ranks(pair: Pair) -> None:
    many = prompts(12, seed=4)
    for i, prompt in enumerate(many):
        pair.submit(i % 2, str(i), prompt)
    pair.wait(*map(str, range(12)))
    assert all(len(pair.tokens(str(i))) == 8 for i in range(12))


def test_a_rank_that_leaves_stops_the_other_until_the_next_epoch(pair: Pair) -> None:
    """Requests wait where they are; nothing of them is lost or drawn twice."""
    pair.submit(0, "a", [1, 2, 3], 300)
    pair.submit(1, "b", [4, 5, 6], 300)
    pair.heard.wait(lambda: "a" in pair.heard.outputs and "b" in pair.heard.outputs)
    pair.do(1, pair.engines[1].leave)
    deadline = time.monotonic() + 10
    while not pair.parted:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert pair.parted[0][0] == 0 and pair.parted[0][1].ranks == (1,)
    assert not pair.heard.ended("a") and not pair.heard.ended("b")
    assert not any(each.has_work for each in pair.engines)
    pair.join()
    pair.wait("a", "b")
    assert pair.tokens("a") == expected(pair, "a", [1, 2, 3], 300)
    assert pair.tokens("b") == expected(pair, "b", [4, 5, 6], 300)


def test_a_step_that_fails_on_one_rank_ends_its_requests_and_no_others(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank may wait for what this one was about to send, so both meet again."""
    broken = threading.Event()
    execute = pair.engines[0].runner.execute

    def fail(inputs: StepInputs) -> object:
        if len(inputs.input_ids_host) and not broken.is_set():
            broken.set()
            raise RuntimeError("the device is on fire")
        return execute(inputs)

    monkeypatch.setattr(pair.engines[0].runner, "execute", fail)
    pair.submit(1, "b", [4, 5, 6], 30)
    pair.submit(0, "a", [1, 2, 3], 30)
    deadline = time.monotonic() + 10
    while len(pair.parted) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    pair.join()
    pair.wait("a", "b")
    assert isinstance(pair.heard.outputs["a"][-1].error, EngineError)
    assert pair.tokens("b") == expected(pair, "b", [4, 5, 6], 30)
