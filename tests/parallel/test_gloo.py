"""Ranks that meet through gloo without a server of addresses: what they leave is carried."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

from moebius.errors import ConfigError, PeerError
from moebius.parallel import gloo
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.gloo import Meeting, join_epoch

SPEC = ExchangeSpec(size=3, tokens=4, hidden=8, top_k=2, dtype=torch.float32)
EPOCH = Epoch("test", 7)


def meetings(size: int = 3) -> list[Meeting]:
    """Each hears what the others leave."""
    made: list[Meeting] = []

    def carry(rank: int) -> Callable[[str, bytes], None]:
        def tell(key: str, value: bytes) -> None:
            for other, meeting in enumerate(made):
                if other != rank:
                    meeting.hear(key, value)

        return tell

    made += [Meeting(EPOCH, carry(rank)) for rank in range(size)]
    return made


def join(
    meeting: Meeting, rank: int, *, timeout: float = 60.0, patience: float = 60.0, **of: Any
) -> Any:
    spec = of.get("spec", SPEC)
    return join_epoch(meeting, spec, rank, "127.0.0.1", timeout, patience)


def test_ranks_meet_and_exchange() -> None:
    met = meetings()
    with ThreadPoolExecutor(3) as threads:
        exchanges = list(threads.map(join, met, range(3)))
        assert [exchange.rank for exchange in exchanges] == [0, 1, 2]
        told = list(threads.map(lambda each: each.agree((each.rank, 10)), exchanges))
        assert told == [[(0, 10), (1, 10), (2, 10)]] * 3
        # One leaves: the others learn of it while they wait for it.
        waiting = [threads.submit(each.agree, (1,)) for each in exchanges[:2]]
        exchanges[2].close()
        for each in waiting:
            with pytest.raises(PeerError, match="epoch 7 of group test"):
                each.result()
    for exchange in exchanges:
        exchange.close()


@pytest.mark.parametrize("alone", [True, False])
def test_who_is_told_that_an_epoch_is_over_waits_no_longer(alone: bool) -> None:
    """Whether the others have left no address yet, or do not answer at theirs."""
    met = meetings()
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(join, met[rank], rank) for rank in range(1 if alone else 2)]
        threading.Event().wait(0.1)
        for meeting in met:
            meeting.give_up([2])
        for each in waiting:
            with pytest.raises(PeerError, match="without rank 2, which") as found:
                each.result(10)
            assert found.value.ranks == (2,)


def test_patience_ends() -> None:
    with pytest.raises(PeerError, match="without rank 0, rank 2, which"):
        join(meetings()[1], 1, patience=0.1)


def test_an_address_that_is_not_of_this_host_is_named() -> None:
    with pytest.raises(PeerError, match=r"gloo does not connect from 192\.0\.2\.1"):
        join_epoch(meetings()[0], SPEC, 0, "192.0.2.1", 5.0, 60.0)


def test_ranks_that_differ_are_refused() -> None:
    met = meetings(2)
    two = ExchangeSpec(size=2, tokens=4, hidden=8, top_k=2, dtype=torch.float32)
    other = ExchangeSpec(size=2, tokens=4, hidden=16, top_k=2, dtype=torch.float32)
    with ThreadPoolExecutor(2) as threads:
        joins = [
            threads.submit(join, met[0], 0, spec=two),
            threads.submit(join, met[1], 1, spec=other),
        ]
        for each in joins:
            with pytest.raises(ConfigError, match="differ in hidden"):
                each.result()


def test_a_value_is_waited_for() -> None:
    first, second = meetings(2)
    with pytest.raises(TimeoutError):
        first.wait(["a"], timedelta(seconds=0.01))
    second.set("a", b"value")
    assert first.get("a") == second.get("a") == b"value"


class Joined:
    """An exchange, as far as whoever does not take it goes."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("late", [True, False])
def test_an_exchange_that_nobody_takes_is_closed(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was given up while it connected or when it just had."""
    connected = threading.Event()
    found = Joined()
    monkeypatch.setattr(gloo._Joining, "_join", lambda self: connected.wait(10) and found)
    joining = gloo._Joining(meetings()[0], SPEC, 0, "127.0.0.1", 60.0)
    if late:
        joining.abandon()
    connected.set()
    assert joining.done.wait(10)
    assert found.closed.is_set() == late
    joining.abandon()
    assert found.closed.is_set()
