"""Reads and checks pieces of a prefix beside the engine's steps, in the order they were asked for.

What is read waits for the engine's thread, which alone puts it into the cache; the reader goes on
only while little waits, so memory is bounded however much was asked for.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass, field

from moebius.engine.disk_memory import MOST_STAGED_BYTES
from moebius.engine.disk_pace import Pace
from moebius.engine.disk_store import DiskStore
from moebius.engine.kv_cache import KVCache
from moebius.schedule.request import Request
from moebius.schedule.tiers import Piece


@dataclass(slots=True, eq=False)
class Load:
    """A request that waits for `left` more pieces."""

    request: Request
    tokens: int
    left: int = 0
    over: bool = False


@dataclass(slots=True, eq=False)
class Read:
    """A file to be read, and for which pieces of whose prefixes.

    memory   what was read and found good; None: nothing
    """

    name: bytes
    group: int | None
    nbytes: int
    wanted: list[tuple[Load, Piece]] = field(default_factory=list)
    memory: list[memoryview] | None = None

    @property
    def useless(self) -> bool:
        """Nobody waits for it any more."""
        return all(load.over for load, _ in self.wanted)


class DiskReader:
    """Reads from `store` what `cache` will hold."""

    def __init__(
        self, store: DiskStore, cache: KVCache, pace: Pace, *, most: int = MOST_STAGED_BYTES
    ) -> None:
        self._store = store
        self._cache = cache
        self._pace = pace
        self._most = most
        self._changed = threading.Condition()
        self._asked: deque[Read] = deque()
        self._done: deque[Read] = deque()
        self._staged = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="disk-reader", daemon=True)
        self._thread.start()

    def ask(self, reads: list[Read]) -> None:
        with self._changed:
            self._asked += reads
            self._changed.notify_all()

    def take(self, most: int) -> list[Read]:
        """What is done, of about so many bytes: one piece at least, if there is any."""
        taken: list[Read] = []
        nbytes = 0
        with self._changed:
            while self._done and (not taken or nbytes + self._done[0].nbytes <= most):
                read = self._done.popleft()
                nbytes += read.nbytes
                taken.append(read)
            self._staged -= nbytes
            self._changed.notify_all()
        return taken

    def wait(self, timeout: float) -> None:
        """Until something is done, for so many seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._stopped, timeout)

    def close(self, timeout: float) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._may_go_on)
                if self._stopped:
                    return
                read = self._asked.popleft()
                self._staged += read.nbytes
            if not read.useless:
                self._read(read)
            with self._changed:
                self._done.append(read)
                self._changed.notify_all()

    def _may_go_on(self) -> bool:
        room = bool(self._asked) and (
            not self._staged or self._staged + self._asked[0].nbytes <= self._most
        )
        return self._stopped or room

    def _read(self, read: Read) -> None:
        began = time.monotonic()
        read.memory = self._store.read(
            read.name, lambda payload: self._cache.opened(read.group, payload)
        )
        if read.memory is not None:
            self._pace.read(read.nbytes, time.monotonic() - began)
