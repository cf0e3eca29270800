"""Watches the event loop of every test server: no callback may take its thread's processor for
long.

GuardedLoop is uvloop's loop, as the product runs it, with a clock around whatever it calls: what it
is given by call_soon and its kin (the steps of tasks among them), and the methods of the protocols
of its servers, which uvloop calls by itself. The clock is the thread's processor time, so a busy
machine alone makes nothing slow.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import uvloop

from pace import allowed

MOST_SECONDS = 0.05
T = TypeVar("T")

slow: list[str] = []
"""What took longer, of all loops since the last test."""

_collecting = threading.local()


_tests_own: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()


def _watch_collector(phase: str, info: dict[str, int]) -> None:
    """The collector walks all that a test session holds, which is no callback's doing."""
    now = time.thread_time()
    if phase == "start":
        _collecting.since = now
    else:
        _collecting.seconds = (
            getattr(_collecting, "seconds", 0.0) + now - getattr(_collecting, "since", now)
        )


gc.callbacks.append(_watch_collector)


def _now() -> float:
    return time.thread_time() - getattr(_collecting, "seconds", 0.0)


def timed(callback: Callable[..., T], *args: Any) -> T:
    """Call it, and note it in `slow` where it took long."""
    before = _now()
    try:
        return callback(*args)
    finally:
        seconds = _now() - before
        task = getattr(callback, "__self__", None)
        exempt = isinstance(task, asyncio.Task) and task in _tests_own
        late = seconds > MOST_SECONDS and not exempt and sys.gettrace() is None
        if late and seconds > allowed(MOST_SECONDS):
            slow.append(f"{_name(callback)} took the event loop for {1000 * seconds:.0f} ms")


def _name(callback: Any) -> str:
    """Of a task's step, the coroutine's."""
    task = getattr(callback, "__self__", None)
    if isinstance(task, asyncio.Task):
        return f"a step of {getattr(task.get_coro(), '__qualname__', task)}"
    return getattr(callback, "__qualname__", repr(callback))


class GuardedLoop(uvloop.Loop):
    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        return super().call_soon(timed, callback, *args, context=context)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> Any:
        return super().call_soon_threadsafe(timed, callback, *args, context=context)

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return super().call_later(delay, timed, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return super().call_at(when, timed, callback, *args, context=context)

    async def create_server(self, protocol_factory: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().create_server(
            lambda: _TimedProtocol(protocol_factory()), *args, **kwargs
        )


class _TimedProtocol(asyncio.Protocol):
    """Passes a transport's calls on."""

    def __init__(self, inner: asyncio.Protocol) -> None:
        for name in (
            *("connection_made", "connection_lost", "data_received", "eof_received"),
            *("pause_writing", "resume_writing"),
        ):
            setattr(self, name, functools.partial(timed, getattr(inner, name)))


def run(coroutine: Any, *, of_server: bool = True) -> Any:
    """asyncio.run on a guarded loop. A coroutine that is a test's own may take as long as it
    likes."""

    async def main() -> Any:
        task = asyncio.current_task()
        if task is not None and not of_server:
            _tests_own.add(task)
        return await coroutine

    with asyncio.Runner(loop_factory=GuardedLoop) as runner:
        return runner.run(main())


def apart(app: Any) -> Any:
    """An ASGI application whose requests are answered by tasks of their own, apart from the test
    that waits."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.create_task(app(scope, receive, send))

    return answer
