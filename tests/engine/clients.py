"""An engine behind each kind of client: one body of tests holds for all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moebius.cluster.launched import LaunchedEngine
from moebius.engine import wire
from moebius.engine.client import EngineClient
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.in_process import InProcessClient
from moebius.engine.inline import InlineClient
from moebius.engine.process import Pulse, Service
from moebius.engine.remote import RemoteClient
from moebius.errors import ChannelError
from moebius.front.fleet import Lost
from moebius.front.replay import ReplayClient
from moebius.parallel.channel import Channel

KEY = bytes(range(32))
OF_ONE_ENGINE = ("in this process", "over a channel")
"""Those that end with their engine, which computes on a thread."""
KINDS = (*OF_ONE_ENGINE, "on the caller's thread", "over engines that may be lost")


@dataclass(frozen=True, slots=True)
class Served:
    """client is what a test talks to, and `runs`, where there is one, computes for it with
    `engine`."""

    client: EngineClient
    runs: InProcessClient
    engine: Engine

    def wait_until_stopped(self) -> None:
        self.runs._thread.join(20)
        assert not self.runs._thread.is_alive()


@contextmanager
def served(engine: Engine, kind: str, step_deadline: float = 5.0) -> Iterator[Served]:
    """The engine behind a client of this kind; closed at the end, however the test leaves it."""
    runs = InProcessClient(engine, step_deadline=step_deadline)
    if kind == KINDS[0]:
        yield Served(runs, runs, engine)
        runs.close(5)
    elif kind == KINDS[2]:
        with pumped(InlineClient(engine)) as inline:
            yield Served(inline, runs, engine)
    else:
        with remote(runs) as client:
            if kind == KINDS[1]:
                yield Served(client, runs, engine)
                return
            replayed = ReplayClient(lambda number, lost: launched(client, lost))
            yield Served(replayed, runs, engine)
            replayed.close(5)


@contextmanager
def pumped(client: InlineClient) -> Iterator[InlineClient]:
    """One that makes steps whenever there is work, as its callers do while they wait."""
    ended = threading.Event()

    def pump() -> None:
        while not ended.is_set():
            if not client.advance(lambda: True):
                time.sleep(0.001)

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        yield client
    finally:
        client.close(5)
        ended.set()
        thread.join(20)


class _Thread:
    """What LaunchedEngine needs of a process, whose engine is on a thread of this one."""

    rows = None
    state = "the thread has ended"

    def __init__(self, client: RemoteClient) -> None:
        self._client = client
        self.died: Callable[[Any], None] = lambda process: None

    def launch(self, message: wire.Launch, planned: Callable[[wire.Planned], None]) -> RemoteClient:
        self._client._ended = lambda cause: self.died(self)
        return self._client

    def close(self, timeout: float) -> None:
        self._client.close(timeout)

    def end(self) -> None:
        self._client._channel.close()

    kill = end


def launched(client: RemoteClient, lost: Lost) -> LaunchedEngine:
    message = wire.Launch("", EngineConfig(), KEY, frozenset())
    return LaunchedEngine(message, lost, process=_Thread(client))  # type: ignore[arg-type]


@contextmanager
def remote(runs: InProcessClient) -> Iterator[RemoteClient]:
    """A client at the other end of a socket from what an engine's process serves it with."""
    front, back = socket.socketpair()
    ours, theirs = Channel(front, "the engine"), Channel(back, "the front")

    def serve() -> None:
        pulse = Pulse(theirs)
        try:
            Service(theirs, runs, KEY).run(pulse)
        except ChannelError:
            pass
        finally:
            pulse.end()
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    while not isinstance(loaded := wire.decode_from_engine(ours.receive(10)), wire.Loaded):
        pass
    client = RemoteClient(ours, loaded.info)
    yield client
    client.close(5)
    thread.join(20)
    assert not thread.is_alive()
