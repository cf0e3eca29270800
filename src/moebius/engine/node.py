"""What `moebius serve` does on a host without the front: it starts the ranks of this host for the
front, and tells it when one has ended.

It computes nothing. Where it loses the front it kills its ranks, which nobody can ask for anything
any more, and looks for the front again for a while: networks come back, and fronts are restarted.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

from moebius.engine import cluster, wire
from moebius.engine.child import ChildProcess
from moebius.errors import (
    ChannelError,
    ConfigError,
    DeadlineError,
    EngineError,
    MoebiusError,
    WireError,
)
from moebius.parallel.channel import Channel
from moebius.parallel.key import VARIABLE, ClusterKey
from moebius.parallel.meet import connect

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0
_PAUSE_SECONDS = 0.5
_LOOK_SECONDS = 0.25


class Node:
    """This host's part.

    front     where it listens
    patience  seconds for which it is looked for
    """

    def __init__(
        self, hello: cluster.HostHello, front: tuple[str, int], key: ClusterKey, patience: float
    ) -> None:
        self._hello = hello
        self._front = front
        self._key = key
        self._patience = patience
        # Under the lock: one may end before it is known that there is one.
        self._lock = threading.Lock()
        self._ranks: dict[str, ChildProcess] = {}

    def run(self) -> None:
        """Until the front dismisses this host. Raises the error that it does so with; ConfigError
        where the front cannot be reached at first, EngineError where it is gone for good."""
        met = False
        while True:
            channel = self._meet(met)
            met = True
            try:
                self._serve(channel)
                return
            except WireError as error:
                raise ConfigError(f"{self._place} is not understood: {error}") from error
            except ChannelError as error:
                log.error("the front is lost, and the ranks of this host with it: %s", error)
            finally:
                channel.close()
                self._end_all()

    @property
    def _place(self) -> str:
        return f"the front at {self._front[0]}:{self._front[1]}"

    def _meet(self, met: bool) -> Channel:
        """Connect, as soon as the front is there, and say who we are."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                channel = connect(self._front, left, self._key)
                channel.send(cluster.encode_hello(self._hello), wire.SEND_SECONDS)
                return channel
            except ChannelError as error:
                if not isinstance(error.__cause__, OSError):  # no matter of the network
                    raise ConfigError(f"{self._name}: {error}") from error
                if time.monotonic() > deadline:
                    raise self._unreachable(met, error) from error
            time.sleep(_PAUSE_SECONDS)

    @property
    def _name(self) -> str:
        return self._hello.title

    def _unreachable(self, met: bool, error: ChannelError) -> MoebiusError:
        kind = EngineError if met else ConfigError
        return kind(f"{self._name}: no front within {self._patience:g} s: {error}")

    def _serve(self, channel: Channel) -> None:
        """Do what the front says until it dismisses us. ChannelError where it is gone."""
        heard = time.monotonic()
        told = 0.0
        while True:
            now = time.monotonic()
            if now - told >= cluster.BEAT_SECONDS:
                channel.post(cluster.encode(cluster.Beat()))
                told = now
            if now - heard > cluster.SILENCE_SECONDS:
                raise ChannelError(f"{self._place} was silent for {now - heard:.1f} s")
            try:
                frame = channel.receive(_LOOK_SECONDS)
            except DeadlineError:
                continue
            heard = time.monotonic()
            match cluster.decode_to_host(frame):
                case cluster.Beat():
                    continue
                case cluster.Start(ticket):
                    self._start(channel, ticket)
                case cluster.End(ticket):
                    self._end(ticket)
                case cluster.Dismissed(error):
                    if error is not None:
                        raise error
                    return

    def _start(self, channel: Channel, ticket: str) -> None:
        ended = partial(self._ended, channel, ticket)
        variables = {VARIABLE: self._key.text}
        with self._lock:
            try:
                child = ChildProcess(self._front, ticket, variables=variables, ended=ended)
            except EngineError as error:
                channel.post(cluster.encode(cluster.Ended(ticket, str(error))))
                return
            self._ranks[ticket] = child

    def _ended(self, channel: Channel, ticket: str) -> None:
        with self._lock:
            child = self._ranks.pop(ticket, None)
        if child is not None:  # else the front was lost, and all ranks with it
            with suppress(ChannelError):
                channel.send(cluster.encode(cluster.Ended(ticket, child.state)), wire.SEND_SECONDS)

    def _end(self, ticket: str) -> None:
        child = self._ranks.get(ticket)
        if child is not None:
            child.kill()

    def _end_all(self) -> None:
        with self._lock:
            ranks = list(self._ranks.values())
            self._ranks.clear()
        for child in ranks:
            child.kill()
        for child in ranks:
            child.wait()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends what is in the block in order, with exit status 0."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
