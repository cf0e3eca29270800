"""Ranks that connect to each other: by addresses that are carried for them, and with the key."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.errors import ConfigError, PeerError
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import connect, name_of
from moebius.parallel.sockets import Meeting, SocketExchange, join_epoch

SPEC = ExchangeSpec(size=3, tokens=4, hidden=8, top_k=2, dtype=torch.float32)
TWO = replace(SPEC, size=2)
EPOCH = Epoch("test", 7)
KEY = ClusterKey.draw()


def meetings(size: int = 3) -> list[Meeting]:
    """Each hears what the others tell."""
    made: list[Meeting] = []

    def carry(rank: int) -> Callable[[str], None]:
        def tell(address: str) -> None:
            for other, meeting in enumerate(made):
                if other != rank:
                    meeting.hear(rank, address)

        return tell

    made += [Meeting(EPOCH, carry(rank)) for rank in range(size)]
    return made


def join(meeting: Meeting, rank: int, **of: Any) -> SocketExchange:
    return join_epoch(
        meeting,
        of.get("spec", SPEC),
        rank,
        of.get("host", "127.0.0.1"),
        of.get("key", KEY),
        timeout=60.0,
        patience=of.get("patience", 60.0),
    )


def test_ranks_meet_and_exchange() -> None:
    met = meetings()
    with ThreadPoolExecutor(3) as threads:
        exchanges = list(threads.map(join, met, range(3)))
        assert [exchange.rank for exchange in exchanges] == [0, 1, 2]
        told = list(threads.map(lambda each: each.agree((each.rank, 10)), exchanges))
        assert told == [[(0, 10), (1, 10), (2, 10)]] * 3
        # One leaves: the others learn at once that it is that one.
        waiting = [threads.submit(each.agree, (1,)) for each in exchanges[:2]]
        exchanges[2].close()
        for each in waiting:
            with pytest.raises(
                PeerError, match=r"epoch 7 of group test.*rank 2 has ended"
            ) as found:
                each.result()
            assert found.value.ranks == (2,)
    for exchange in exchanges:
        exchange.close()


@pytest.mark.parametrize("alone", [True, False])
def test_who_is_told_that_an_epoch_is_over_waits_no_longer(alone: bool) -> None:
    """Whether the others have told no address yet, or do not connect to this one's."""
    met = meetings()
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(join, met[rank], rank) for rank in range(1 if alone else 2)]
        threading.Event().wait(0.1)
        for meeting in met:
            meeting.give_up([2])
        for each in waiting:
            with pytest.raises(PeerError, match="ranks 2 were given up") as found:
                each.result(10)
            assert found.value.ranks == (2,)


@pytest.mark.parametrize(("rank", "missing"), [(1, (0,)), (0, (1, 2))])
def test_patience_ends(rank: int, missing: tuple[int, ...]) -> None:
    with pytest.raises(PeerError, match=f"{missing[-1]} did not come") as found:
        join(meetings()[rank], rank, patience=0.1)
    assert found.value.ranks == missing


def test_an_address_that_is_not_of_this_host_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        join(meetings()[0], 0, host="192.0.2.1")


def test_a_rank_that_is_not_there_any_more() -> None:
    """Its address is known, and nobody listens at it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    meeting = meetings(2)[1]
    meeting.hear(0, name_of(address))
    with pytest.raises(PeerError, match=f"does not get through to rank 0: .*:{address[1]}"):
        join(meeting, 1, spec=TWO, patience=0.2)


def test_ranks_that_differ_are_refused() -> None:
    met = meetings(2)
    with ThreadPoolExecutor(2) as threads:
        joins = [
            threads.submit(join, met[0], 0, spec=TWO),
            threads.submit(join, met[1], 1, spec=replace(TWO, hidden=16)),
        ]
        for each in joins:
            with pytest.raises(ConfigError, match="differ in hidden"):
                each.result()


def test_who_has_another_key_is_not_let_in() -> None:
    met = meetings(2)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(join, met[0], 0, spec=TWO, patience=1.0)
        with pytest.raises(PeerError, match=r"rank 0: .* refused this process"):
            join(met[1], 1, spec=TWO, key=ClusterKey.draw(), patience=0.5)
        with pytest.raises(PeerError, match="ranks 1 did not come"):
            first.result()


@pytest.mark.parametrize("said", [b"", b"\0" * 28], ids=["nothing", "another epoch"])
def test_a_stranger_that_has_the_key_takes_nobodys_place(said: bytes) -> None:
    """Of an earlier epoch, say; the rank that is waited for comes after it."""
    met = meetings(2)
    told = threading.Event()
    addresses: list[str] = []

    def tell(address: str) -> None:
        addresses.append(address)
        told.set()

    met[0].tell = tell
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(join, met[0], 0, spec=TWO)
        assert told.wait(10)
        host, _, port = addresses[0].rpartition(":")
        stranger = connect((host, int(port)), 5.0, KEY).detach()
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        met[1].hear(0, addresses[0])
        second = threads.submit(join, met[1], 1, spec=TWO)
        for each in (first, second):
            each.result(10).close()
        stranger.close()


def test_what_a_peer_sends_is_not_believed() -> None:
    """A row's expert that there is none of, and more rows than a rank may have."""
    for header, body in (
        ((2, 2, 1), [99, 99, *[0] * 8]),
        ((2, 2, 5), []),
        ((9, 2, 0), []),
        ((2, 1, 0), []),
    ):
        mine, theirs = socket.socketpair()
        with closing(theirs), ThreadPoolExecutor(1) as threads:
            # Calls 1, the agreement, and 2.
            joined = threads.submit(SocketExchange, {1: mine}, TWO, 0, EPOCH, timeout=5.0)
            greeting = theirs.recv(4096)
            theirs.sendall(greeting)
            exchange = joined.result()
            words = torch.tensor([header[0], header[1], header[2], 0, *body], dtype=torch.int32)
            theirs.sendall(words.numpy().tobytes())
            rows_RD = torch.zeros(8, 8)
            ids_RK = torch.zeros(8, 2, dtype=torch.int64)
            owners_CE = torch.zeros(1, 5, dtype=torch.int32)
            with pytest.raises(PeerError, match="rank 1 did something else") as found:
                exchange.dispatch(
                    torch.zeros(0, 8),
                    torch.zeros(0, 2, dtype=torch.int64),
                    owners_CE,
                    rows_RD,
                    ids_RK,
                )
            assert found.value.ranks == (1,)
            exchange.close()


def test_nothing_stays_open() -> None:
    def open_sockets() -> set[str]:
        found = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        names = {str(path.readlink()) for path in found if path.is_symlink()}
        return {name for name in names if name.startswith("socket:")}

    before = open_sockets()
    met = meetings(2)
    with ThreadPoolExecutor(2) as threads:
        exchanges = list(threads.map(lambda rank: join(met[rank], rank, spec=TWO), range(2)))
    assert len(open_sockets() - before) == 2
    for exchange in exchanges:
        exchange.close()
    assert open_sockets() <= before
