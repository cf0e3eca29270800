"""A front and its hosts over TCP: who is let in, what processes they start, how they lose each
other."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from msgspec import structs

from moebius.cluster.cluster import Cluster, HostedProcess
from moebius.engine import cluster, wire
from moebius.engine.config import EngineConfig
from moebius.engine.node import Node
from moebius.errors import ChannelError, ConfigError, EngineError, MoebiusError
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import Listener, connect

KEY = ClusterKey.draw()
OWN = cluster.HostHello(
    release="1.0",
    node=0,
    nodes=2,
    name="anna",
    address="127.0.0.1",
    directory="/a",
    weights="0123",
    config=EngineConfig(ranks=2),
    isas=("portable",),
)
OTHER = structs.replace(OWN, node=1, name="bert")
# What stands for an engine: says nothing but its ticket, and waits.
ENGINE = """
import sys, time
from moebius.engine.cluster import RankHello, encode_hello
from moebius.parallel.endpoint import parse_endpoint
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import connect
address = parse_endpoint(sys.argv[1], "front")
channel = connect(address, 10, ClusterKey.from_environment())
channel.send(encode_hello(RankHello(sys.argv[2])), 10)
try:
    while True:
        channel.receive(60)
except Exception:
    pass
"""


class Running:
    """A node on a thread, and what it ended with."""

    def __init__(self, front: tuple[str, int], patience: float = 20.0, **options: Any) -> None:
        hello = options.get("hello", OTHER)
        self.error: MoebiusError | None = None
        self._node = Node(hello, front, options.get("key", KEY), patience)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._node.run()
        except MoebiusError as error:
            self.error = error

    def ended(self) -> MoebiusError | None:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.error


@contextmanager
def front(patience: float = 20.0, own: cluster.HostHello = OWN) -> Iterator[tuple[Cluster, Any]]:
    listener = Listener.tcp("127.0.0.1", 0, KEY)
    made = Cluster(listener, own, patience)
    try:
        yield made, listener.address
    finally:
        made.close()


@pytest.fixture
def small_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Processes that take no model, and so are there at once."""
    script = tmp_path / "python"
    code = tmp_path / "engine.py"
    code.write_text(ENGINE)
    # What is called is `python -P -c CODE ADDRESS TICKET`.
    script.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} {code} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setattr("moebius.engine.child.sys.executable", str(script))


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_hosts_come_together_and_are_dismissed() -> None:
    with front() as (made, address):
        node = Running(address)
        assert made.assemble() == [OWN, OTHER]
    assert node.ended() is None


def test_a_host_may_come_first() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
    node = Running(address)
    time.sleep(0.2)
    made = Cluster(Listener.tcp(*address, KEY), OWN, 20.0)
    assert made.assemble() == [OWN, OTHER]
    made.close(EngineError("the front fails"))
    assert str(node.ended()) == "the front fails"


def test_who_is_not_alike_ends_both_with_one_line() -> None:
    with front() as (made, address):
        node = Running(address, hello=structs.replace(OTHER, weights="0124"))
        with pytest.raises(ConfigError, match=r"node 1 \(bert\) has another model") as found:
            made.assemble()
        error = node.ended()
    assert isinstance(error, ConfigError) and str(error) == str(found.value)


def test_a_number_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is known that the other host is still there."""
    monkeypatch.setattr(cluster, "SILENCE_SECONDS", 1.0)
    with front() as (made, address):
        first = Running(address)
        made.assemble()
        second = Running(address, hello=structs.replace(OTHER, name="carl"))
        assert "node 1 is bert already; carl needs another --node-rank" in str(second.ended())
    assert first.ended() is None


def test_another_key_is_refused_by_name() -> None:
    with front(patience=0.5) as (made, address):
        node = Running(address, key=ClusterKey.draw())
        error = node.ended()
        assert isinstance(error, ConfigError)
        assert "node 1 (bert)" in str(error) and "another cluster key" in str(error)
        with pytest.raises(ConfigError, match="node 1 of 2 did not come"):
            made.assemble()


def test_nobody_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = sock.getsockname()
    error = Running(address, patience=0.1).ended()
    assert isinstance(error, ConfigError)
    assert f"node 1 (bert): no front within 0.1 s: cannot connect to 127.0.0.1:{address[1]}" in str(
        error
    )


@pytest.mark.parametrize("frame", [b"", b"\x00", bytes([wire.VERSION]) + b"\xc0", b"\xff" * 99])
def test_a_frame_that_is_no_hello_is_refused(frame: bytes) -> None:
    with front() as (made, address):
        channel = connect(address, 10, KEY)
        channel.send(frame, 10)
        answer = cluster.decode_to_host(channel.receive(10))
        assert isinstance(answer, cluster.Dismissed) and isinstance(answer.error, ConfigError)
        with pytest.raises(ConfigError, match=r"127\.0\.0\.1"):
            made.assemble()
        channel.close()


def test_a_ticket_that_nobody_gave_is_refused() -> None:
    with front() as (_, address):
        channel = connect(address, 10, KEY)
        channel.send(cluster.encode_hello(cluster.RankHello("mine")), 10)
        with pytest.raises(ChannelError):
            channel.receive(10)
        channel.close()


def started(made: Cluster) -> HostedProcess:
    made.assemble()
    process = made.start(1, rank=1)
    assert process._connected() is not None
    return process


@pytest.mark.usefixtures("small_engines")
def test_a_host_starts_kills_and_reports_processes() -> None:
    with front() as (made, address):
        node = Running(address)
        first = started(made)
        second = started(made)
        assert "rank 1 on node 1 (bert)" in first.state
        pids = {child.pid for child in node._node._ranks.values()}
        assert len(pids) == 2
        first.kill()
        until(lambda: len(node._node._ranks) == 1)
        (left,) = node._node._ranks.values()
        assert not second._wait(0.0)
        left.kill()
        assert second._wait(20.0)
        assert second.state == (
            "rank 1 on node 1 (bert): the engine's process was ended by SIGKILL (as the system does "
            "when memory runs out)"
        )
        third = started(made)
        (child,) = node._node._ranks.values()
    assert node.ended() is None
    assert child.exited.is_set() and third._wait(20.0)


@pytest.mark.usefixtures("small_engines")
def test_a_host_that_is_gone_takes_its_processes_and_may_come_back() -> None:
    with front(patience=20.0) as (made, address):
        node = Running(address)
        process = started(made)
        host = made._hosts[1]
        (child,) = node._node._ranks.values()
        host._channel.close()  # as when a link is cut, which each side sees for itself
        assert process._wait(20.0)
        assert "its host is lost" in process.state
        assert child.wait(20.0), "ranks that the front has lost are ended"
        again = made.start(1, rank=1)
        assert again._connected() is not None
        assert made._hosts[1] is not host
    assert node.ended() is None


def test_a_silent_host_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SILENCE_SECONDS", 0.5)
    with front(patience=0.3) as (made, address):
        channel = connect(address, 10, KEY)
        channel.send(cluster.encode_hello(OTHER), 10)
        until(lambda: 1 in made._hosts)
        until(lambda: 1 not in made._hosts)
        with pytest.raises(EngineError, match=r"node 1 has not come back within 0\.3 s"):
            made.start(1, rank=1)
        channel.close()


def test_a_host_may_come_back_before_its_loss_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its link was cut for as long as it takes one side to notice: not a stranger."""
    monkeypatch.setattr(cluster, "SILENCE_SECONDS", 1.0)
    with front() as (made, address):
        before = connect(address, 10, KEY)
        before.send(cluster.encode_hello(OTHER), 10)
        until(lambda: 1 in made._hosts)
        first = made._hosts[1]
        again = Running(address)
        until(lambda: made._hosts.get(1, first) is not first)
        assert made._hosts[1].hello == OTHER
    assert again.ended() is None
    before.close()


def test_a_process_that_cannot_be_started_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebius.engine.child.sys.executable", "/no/such/python")
    with front() as (made, address):
        node = Running(address)
        made.assemble()
        process = made.start(1, rank=1)
        assert process._wait(20.0)
        assert "can be started: No such file" in process.state
    assert node.ended() is None


class Brief:
    """A child that has ended before its parent knows that it has one."""

    state = "the engine's process ended with exit status 3"

    def __init__(self, *_: object, ended: Callable[[], None], **options: object) -> None:
        told = threading.Thread(target=ended, daemon=True)
        told.start()
        told.join(0.2)

    def kill(self) -> None:
        pass

    def wait(self) -> bool:
        return True


def test_how_a_process_ended_is_told_however_brief_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebius.engine.node.ChildProcess", Brief)
    with front() as (made, address):
        node = Running(address)
        made.assemble()
        process = made.start(1, rank=1)
        assert process._wait(20.0)
        assert process.state == f"rank 1 on node 1 (bert): {Brief.state}"
        assert not node._node._ranks
    assert node.ended() is None
