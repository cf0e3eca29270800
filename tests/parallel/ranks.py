"""Real processes that are the ranks of a group, and do what a test asks of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

# A process that has imported what ranks need once, from which each of them is forked in some
# milliseconds. It has no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "parallel.rank_side"])

ANSWER_SECONDS = 60


@dataclass
class Raised(Exception):
    """What a rank's process raised, and what it took: not every error can be sent."""

    kind: type[Exception]
    text: str
    ranks: tuple[int, ...]
    trace: str
    seconds: float
    processor_seconds: float


class Rank:
    """One process. `start` asks it for a call, `result` waits for what that returned or raised."""

    def __init__(self, rank: int) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=serve, args=(theirs, rank), daemon=True)
        self._process.start()
        self._calls = 0
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        self._calls += 1
        self._pipe.send((self._calls, function, args))

    def result(self) -> Any:
        call = 0
        # A test that failed may have left answers of its calls.
        while call < self._calls:
            if not self._pipe.poll(ANSWER_SECONDS):
                raise AssertionError(f"rank {self.pid} did not answer")
            try:
                call, found = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                raise AssertionError(f"a rank ended, with {self._process.exitcode}") from None
        if isinstance(found, Raised):
            raise found
        return found

    def result_of(self, function: Callable[..., Any], *args: Any) -> Any:
        self.start(function, *args)
        return self.result()

    def error(self) -> Raised:
        """What the call raised."""
        try:
            returned = self.result()
        except Raised as error:
            return error
        raise AssertionError(f"nothing was raised; {returned!r} was returned")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def wait_for_its_end(self) -> None:
        self._process.join(ANSWER_SECONDS)
        assert self._process.exitcode is not None

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self._pipe.close()
        self.kill()


def serve(pipe: Connection, rank: int) -> None:
    """In the process: calls functions with what it holds under names, and its rank, until told."""
    held: dict[str, Any] = {"rank": rank}
    while True:
        try:
            call, function, args = pipe.recv()
        except EOFError:
            return
        begun = time.monotonic()
        used = time.process_time()
        try:
            pipe.send((call, function(held, *args)))
        except Exception as error:
            ranks = getattr(error, "ranks", ())
            seconds = time.monotonic() - begun
            trace = traceback.format_exc()
            spent = time.process_time() - used
            pipe.send((call, Raised(type(error), str(error), ranks, trace, seconds, spent)))


@contextmanager
def ranks(count: int) -> Iterator[list[Rank]]:
    started = [Rank(rank) for rank in range(count)]
    try:
        yield started
    finally:
        for rank in started:
            rank.close()


def together(members: Sequence[Rank], function: Callable[..., Any], *args: Any) -> list[Any]:
    """What the call returns at each, all of them making it at once."""
    for rank in members:
        rank.start(function, *args)
    return [rank.result() for rank in members]
