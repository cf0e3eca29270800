"""Ranks that connect to each other: by addresses that are carried for them, and with the key."""

from __future__ import annotations

import gc
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
from moebius.parallel import sockets
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.key import ClusterKey
from moebius.parallel.mapped import make
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
        near=of.get("near", ()),
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
            with pytest.raises(PeerError, match=r"epoch 7 of group test: rank 2 has left") as found:
                each.result()
            assert found.value.ranks == (2,)
    for exchange in exchanges:
        exchange.close()


def test_ranks_of_one_host_share_memory_that_is_gone_with_them() -> None:
    """Rank 2 is on another host. Who leaves is known at once, as where rows go through sockets."""
    name = f"/memfd:moebius-{EPOCH.group}-{EPOCH.number}"

    def meet_and_part() -> None:
        met = meetings()
        near = ((1,), (0,), ())
        with ThreadPoolExecutor(3) as threads:
            exchanges = list(threads.map(lambda r: join(met[r], r, near=near[r]), range(3)))
            # Both ranks that have mapped it are of this process.
            assert Path("/proc/self/maps").read_text().count(name) == 2
            told = list(threads.map(lambda each: each.agree((each.rank, 10)), exchanges))
            assert told == [[(0, 10), (1, 10), (2, 10)]] * 3
            waiting = [threads.submit(exchanges[rank].agree, (1,)) for rank in (0, 2)]
            exchanges[1].close()
            for each in waiting:
                with pytest.raises(PeerError, match=r"rank 1 has left") as found:
                    each.result(10)
                assert found.value.ranks == (1,)
        for exchange in exchanges:
            exchange.close()

    meet_and_part()
    gc.collect()  # errors hold the frames that they came through
    assert name not in Path("/proc/self/maps").read_text()
    assert not any(name in link for link in open_files())


def open_files() -> list[str]:
    numbers = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return [str(path.readlink()) for path in numbers if path.is_symlink()]


def test_memory_that_is_not_what_was_agreed_is_refused() -> None:
    """Another version's, say."""
    met = meetings(2)
    with ThreadPoolExecutor(2) as threads, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sockets.mapped, "make", lambda name, nbytes: make(name, nbytes // 2))
        joins = [threads.submit(join, met[r], r, spec=TWO, near=(1 - r,)) for r in range(2)]
        with pytest.raises(PeerError, match=r"rank 1 shares \d+ bytes of memory"):
            joins[0].result()
        with pytest.raises(PeerError):
            joins[1].result()


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
            with pytest.raises(PeerError, match="rank 2 is lost") as found:
                each.result(10)
            assert found.value.ranks == (2,)


@pytest.mark.parametrize(("rank", "missing"), [(1, (0,)), (0, (1, 2))])
def test_patience_ends(rank: int, missing: tuple[int, ...]) -> None:
    with pytest.raises(PeerError, match=f"rank {missing[-1]} did not come") as found:
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
    with pytest.raises(PeerError, match=f"rank 0 is not to be reached: .*:{address[1]}"):
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
        with pytest.raises(
            PeerError, match=r"rank 0 is not to be reached: .* refused this process"
        ):
            join(met[1], 1, spec=TWO, key=ClusterKey.draw(), patience=0.5)
        with pytest.raises(PeerError, match="rank 1 did not come"):
            first.result()


@pytest.mark.parametrize("said", [b"", b"\0" * 36], ids=["nothing", "another epoch"])
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
        return {name for name in open_files() if name.startswith("socket:")}

    before = open_sockets()
    met = meetings(2)
    with ThreadPoolExecutor(2) as threads:
        exchanges = list(threads.map(lambda rank: join(met[rank], rank, spec=TWO), range(2)))
    assert len(open_sockets() - before) == 2
    for exchange in exchanges:
        exchange.close()
    assert open_sockets() <= before
