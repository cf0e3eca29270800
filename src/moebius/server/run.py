"""From bound sockets to a process that serves: listening, signals, and a clean end."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from starlette.applications import Starlette

from moebius.config import host_and_port
from moebius.errors import ConfigError
from moebius.server.capacity import Capacity
from moebius.server.connection import Connection
from moebius.server.faults import Fault

log = logging.getLogger(__name__)

_LAST_SECONDS = 5.0
_BACKLOG = 2048
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Files that the process has open besides connections: the model's, logs, the loop's own.
_OTHER_FILES = 256


class Server:
    """Serves an application until it is told to stop. The first signal drains while the port stays open, the second
    ends at once.

    started     the ports are open
    """

    def __init__(self, app: Starlette) -> None:
        self.started = False
        self._app = app
        self._door = app.state.front_door
        settings = self._door.settings
        self._capacity = Capacity(_openable(settings.max_connections), settings.keep_alive_timeout, self._refused)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._stopped_early = False
        self._signalled = False
        self._draining: asyncio.Task[None] | None = None

    def run(self, sockets: list[socket.socket], on_start: Callable[[], None] = lambda: None) -> None:
        """`serve` on a loop of its own."""
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            runner.run(self.serve(sockets, on_start))

    async def serve(self, sockets: list[socket.socket], on_start: Callable[[], None] = lambda: None) -> None:
        """Open the bound sockets' ports, call `on_start`, serve, and return when all is closed."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        with self._signals():
            async with self._app.router.lifespan_context(self._app) as state:

                def connect() -> Connection:
                    return Connection(self._app, self._capacity, self._tasks, dict(state or {}))

                listeners = [await self._loop.create_server(connect, sock=s, backlog=_BACKLOG) for s in sockets]
                self.started = True
                if self._stopped_early:
                    self._stop.set()
                else:
                    on_start()
                await self._stop.wait()
                for listener in listeners:
                    listener.close()
                await self._close_connections()

    def stop(self) -> None:
        """Stop serving, from any thread: answers under way get some seconds to finish."""
        self._loop.call_soon_threadsafe(self._stop.set)

    def begin_drain(self) -> None:
        """Take no new work; stop when what is in flight is finished, or its time is over."""
        self._door.drain()
        self._capacity.ending = True
        self._draining = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining: %d calls in flight", self._door.in_flight)
        if not await self._door.idle(self._door.settings.drain_timeout):
            log.warning("%d calls were not finished within the drain time", self._door.in_flight)
            self._door.abort_all()
        self._stop.set()

    async def _close_connections(self) -> None:
        self._capacity.finish()
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                while len(self._capacity):
                    await asyncio.sleep(0.01)
        except TimeoutError:
            log.warning("%d connections were cut: their answers were not taken in time", len(self._capacity))
            self._capacity.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Only the main thread hears signals. Python's own handlers run even where the loop hangs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(128 + number)
        self._signalled = True
        if self.started:
            self._loop.call_soon_threadsafe(self.begin_drain)
        else:
            self._stopped_early = True

    def _refused(self, fault: Fault) -> Fault:
        self._door.metrics.rejected(fault.reason)
        log.info("a connection was refused: %d %s", fault.status, fault.code)
        return fault


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _openable(connections: int) -> int:
    """How many of so many connections the process may have open, after asking for as many files as that takes.

    As many again may be hanging up.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    possible = max(1, (wanted - _OTHER_FILES) // 2)
    if possible < connections:
        log.warning("at most %d connections, not %d: the process may open %d files", possible, connections, wanted)
    return min(connections, possible)


def run_server(app: Starlette, sockets: list[socket.socket], on_start: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. Calls `on_start` when the ports are open.

    Raises ConfigError where another took a port.
    """
    for sock in sockets:
        try:
            sock.listen(_BACKLOG)
        except OSError as error:
            name = host_and_port(*sock.getsockname()[:2])
            raise ConfigError(f"cannot listen on {name}: {error.strerror}; choose another --port") from error
    Server(app).run(sockets, on_start)
