"""Writes pieces of the prefix cache behind the engine's back, on a thread of its own.

Nothing is held for it: a piece may be evicted and its place written anew while it is copied. So
what was copied counts only if the piece has lain there all the while; else it is dropped. What
finds the queue full is dropped too. The engine never waits.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from moebius.engine.disk_store import DiskStore
from moebius.schedule.tiers import Kept

MOST_WAITING = 16_384
_NICENESS = 10


class Job(NamedTuple):
    """A piece to be kept under a name."""

    name: bytes
    kept: Kept


class _Used(NamedTuple):
    """Names of a prefix, from its beginning on: behind the jobs that write them."""

    names: tuple[bytes, ...]


class DiskWriter:
    """Writes to `store` what `copy` gives of a piece; None: it has gone meanwhile."""

    def __init__(
        self,
        store: DiskStore,
        copy: Callable[[Kept], memoryview | None],
        *,
        most: int = MOST_WAITING,
    ) -> None:
        self._store = store
        self._copy = copy
        self._most = most
        self._changed = threading.Condition()
        self._queue: deque[Job | _Used] = deque()
        self._waiting: set[bytes] = set()
        self._busy = False
        self._stopped = False
        self._until = 0.0
        self._thread = threading.Thread(target=self._run, name="disk-writer", daemon=True)
        self._thread.start()

    def offer(self, jobs: Sequence[Job], names: Iterable[bytes]) -> None:
        """Write these, as far as the queue has room; `names` are those of the whole prefix."""
        with self._changed:
            fresh = [job for job in jobs if job.name not in self._waiting]
            room = max(0, self._most - len(self._queue))
            for job in fresh[:room]:
                self._waiting.add(job.name)
                self._queue.append(job)
            # Of one text the end is to go first, as in memory.
            self._queue.append(_Used(tuple(names)))
            self._changed.notify()
        if len(fresh) > room:
            self._store.dropped(len(fresh) - room)

    def wait(self, timeout: float) -> bool:
        """Until all that was offered is written, or dropped. False where that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout)

    def close(self, timeout: float) -> None:
        """Write what waits, for so many seconds at most, and stop."""
        with self._changed:
            self._stopped = True
            self._until = time.monotonic() + timeout
            self._changed.notify()
        self._thread.join(timeout + 1.0)

    def _run(self) -> None:
        _let_others_first()
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped and (not self._queue or time.monotonic() > self._until):
                    return
                work = self._queue.popleft()
                self._busy = True
            if isinstance(work, _Used):
                self._store.touch(reversed(work.names))
            else:
                self._write(work)

    def _write(self, job: Job) -> None:
        copied = self._copy(job.kept)
        if copied is None:
            self._store.dropped(1)
        else:
            self._store.write(job.name, copied)
        with self._changed:
            self._waiting.discard(job.name)


def _let_others_first() -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
