"""How long work in this process keeps others waiting, in processor time, so that a busy machine
changes nothing."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable


class Holding:
    """While it is entered, notes the longest time that the interpreter's lock was held without a
    break.

    A thread of its own asks for the lock again and again; between two times that it got it, the
    others have computed. Where it did not run because the machine was busy, they may have computed
    at their own pace: several tries help. The heap is frozen as `moebius serve` has it, so that a
    collection walks what requests made, and nothing else.
    """

    def __enter__(self) -> Holding:
        gc.freeze()
        self.seconds = 0.0
        self._stop = False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()
        gc.unfreeze()

    def _watch(self) -> None:
        before = self._now()
        while not self._stop:
            now = self._now()
            self.seconds = max(self.seconds, min(now[0] - before[0], now[1] - before[1]))
            before = now

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.monotonic(), time.process_time() - time.thread_time()


async def longest_turn(done: Callable[[], bool]) -> float:
    """The most processor time that the running event loop spends between two turns, until
    `done`."""
    longest, before = 0.0, time.thread_time()
    while not done():
        await asyncio.sleep(0)
        now = time.thread_time()
        longest, before = max(longest, now - before), now
    return longest
