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
from collections.abc import Callable, Sequence
from contextlib import suppress

from moebius.engine.disk_store import DiskStore
from moebius.schedule.tiers import Kept

MOST_WAITING = 16_384
_NICENESS = 5


class DiskWriter:
    """Writes to `store`, under their names, what `copy` gives of pieces; None: it has gone
    meanwhile. At most `most` pieces wait."""

    def __init__(
        self,
        store: DiskStore,
        name: Callable[[Kept], bytes],
        copy: Callable[[Kept], memoryview | None],
        *,
        most: int = MOST_WAITING,
    ) -> None:
        self._store = store
        self._name = name
        self._copy = copy
        self._most = most
        self._changed = threading.Condition()
        self._queue: deque[Sequence[Kept]] = deque()
        self._waiting = 0
        self._stopped = False
        self._until: float | None = None
        self._thread = threading.Thread(target=self._run, name="disk-writer", daemon=True)
        self._thread.start()

    def offer(self, prefix: Sequence[Kept]) -> None:
        """Keep these pieces of one prefix, from its beginning on, as far as the queue has room."""
        with self._changed:
            taken = prefix[: max(0, self._most - self._waiting)]
            if taken:
                self._waiting += len(taken)
                self._queue.append(taken)
                self._changed.notify()
        if len(taken) < len(prefix):
            self._store.dropped(len(prefix) - len(taken))

    def wait(self, timeout: float) -> bool:
        """Until all that was offered is written, or dropped. False where that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def close(self, timeout: float) -> None:
        """Write what waits, for so many seconds at most, and stop. The caller's thread does it,
        which has nothing else to do now and stands back for nobody."""
        with self._changed:
            self._until = time.monotonic() + timeout
            self._stopped = True
            self._changed.notify()
        self._thread.join(timeout)
        while self._queue and not self._thread.is_alive():
            self._keep(self._queue.popleft())

    def _run(self) -> None:
        _let_others_first()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped)
                if self._stopped:
                    return
                prefix = self._queue.popleft()
            left = self._keep(prefix)
            with self._changed:
                if left:
                    self._queue.appendleft(left)
                self._changed.notify_all()

    def _keep(self, prefix: Sequence[Kept]) -> Sequence[Kept]:
        """Write what is not there yet; what is left of it, where the writer was stopped."""
        names: list[bytes] = []
        helps = threading.current_thread() is not self._thread
        for number, kept in enumerate(prefix):
            if self._stopped and not helps:
                return prefix[number:]
            name = self._name(kept)
            late = self._until is not None and time.monotonic() > self._until
            if name not in self._store:
                copied = None if late else self._copy(kept)
                if copied is None:
                    self._store.dropped(1)
                else:
                    self._store.write(name, copied)
            names.append(name)
            with self._changed:
                self._waiting -= 1
        self._store.touch(reversed(names))  # of one text the end is to go first, as in memory
        return ()


def _let_others_first() -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
