"""An engine behind each kind of client that leaves the computing to a thread: one body of tests
holds for both."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moebius.engine import wire
from moebius.engine.client import EngineClient
from moebius.engine.engine import Engine
from moebius.engine.in_process import InProcessClient
from moebius.engine.process import Pulse, Service
from moebius.engine.remote import RemoteClient
from moebius.errors import ChannelError
from moebius.parallel.channel import Channel

KEY = bytes(range(32))
KINDS = ("in this process", "over a channel")


@dataclass(frozen=True, slots=True)
class Served:
    """client is what a test talks to, and `runs` computes for it with `engine`."""

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
        return
    with remote(runs) as client:
        yield Served(client, runs, engine)


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
