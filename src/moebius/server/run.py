"""From bound sockets to a process that serves: uvicorn with our connections, signals, and a clean
end."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from moebius.errors import ConfigError, frames, in_one_line
from moebius.server.capacity import Capacity
from moebius.server.connection import Connection, tracked
from moebius.server.cors import Cors
from moebius.server.faults import Fault
from moebius.server.settings import host_and_port
from moebius.server.tls import Certificate

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

_LAST_SECONDS = 5.0
_CUT_SECONDS = 1.0
_BACKLOG = 2048
# So much longer than clients are told a connection may rest: a request that is sent in the last
# moment is served.
_REST_MARGIN = 5
# Files that the process has open besides connections: the model's, logs, the loop's own.
_OTHER_FILES = 256


class Server(uvicorn.Server):
    """uvicorn's server with our connections and our end: the first signal drains while the port
    stays open, the second ends at once.
    """

    def __init__(
        self,
        app: Starlette,
        on_start: Callable[[], None] = lambda: None,
        certificate: Certificate | None = None,
    ) -> None:
        """on_start      called when the ports are open
        certificate   what TLS is spoken with; None: plain HTTP
        """
        self._keys = app.state.keys
        self._certificate = certificate
        self._door = app.state.front_door
        self._access = app.state.access
        self._on_start = on_start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signalled = False
        self._draining: asyncio.Task[None] | None = None
        settings = self._door.settings
        self._readable = Cors(settings.cors_origins).of_no_request()
        self._capacity = Capacity(
            _openable(settings.max_connections), settings.keep_alive_timeout, self._refused
        )
        told = tracked(app)
        self._by_httptools = _config(told, settings.keep_alive_timeout, "httptools")
        self._by_h11 = _config(told, settings.keep_alive_timeout, "h11")
        super().__init__(_config(told, settings.keep_alive_timeout, self._connect))

    def _refused(self, fault: Fault) -> Fault:
        told: Fault = self._access.refused(fault)
        return replace(told, headers={**told.headers, **self._readable})

    def _connect(
        self,
        config: uvicorn.Config,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: object = None,
    ) -> Connection:
        """What uvicorn calls for each new connection."""

        def framing(*, h11: bool, state: dict[str, Any]) -> asyncio.Protocol:
            chosen = self._by_h11 if h11 else self._by_httptools
            make: Any = chosen.http_protocol_class
            protocol: asyncio.Protocol = make(
                config=chosen, server_state=server_state, app_state=state
            )
            return protocol

        return Connection(framing, self._capacity, app_state)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_log_failure)
        for config in (self._by_httptools, self._by_h11, self.config):
            config.load()
        if self._certificate is not None:
            self.config.ssl = self._certificate.context
        with _at_hangup(self._loop, self.reload):
            await super().serve(sockets)

    def reload(self) -> None:
        """Read keys and certificate again; each that is wrong stays as it was, and the log says
        why."""
        for what, reads in (("API keys", self._keys), ("certificate", self._certificate)):
            if reads is None:
                continue
            try:
                reads.reload()
            except ConfigError as error:
                log.error("the %s stay as they were: %s", what, in_one_line(error))
            else:
                log.info("the %s were read again", what)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and not self.should_exit:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Leave no connection behind: uvicorn knows of none that has sent no request yet, and
        leaves those open whose clients are slower than its patience."""
        self._capacity.close_waiting()
        await super().shutdown(sockets)
        self._capacity.cut_all()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CUT_SECONDS):
                while len(self._capacity):
                    await asyncio.sleep(0)

    def stop(self) -> None:
        """Stop serving, from any thread: answers under way get some seconds to finish."""
        self._capacity.ending = True
        self._door.drain()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(128 + sig)
        self._signalled = True
        if self._loop is not None and self.started:
            self._loop.call_soon_threadsafe(self.begin_drain)
        else:
            self.should_exit = True

    def begin_drain(self) -> None:
        """Take no new work; stop when what is in flight is finished, or its time is over."""
        self._door.drain()
        self._capacity.ending = True
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining: %d calls in flight", self._door.in_flight)
        if not await self._door.idle(self._door.settings.drain_timeout):
            log.warning("%d calls were not finished within the drain time", self._door.in_flight)
            self._door.abort_all()
        self.should_exit = True


@contextmanager
def _at_hangup(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> Iterator[None]:
    """Call `call` at SIGHUP, where signals are this thread's to hear."""
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop.add_signal_handler(hangup, call)
    try:
        yield
    finally:
        loop.remove_signal_handler(hangup)


def _log_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What fails on the loop with nobody to hear of it. asyncio would log what was said and handed
    over, too."""
    error = context.get("exception")
    what = "a task or a callback failed" if error is None else frames(error)
    log.error("on the event loop: %s", what)


def _config(app: Any, rest: int, http: Any) -> uvicorn.Config:
    """What we want of uvicorn. Its log says nothing that ours does not say."""
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).disabled = True
    return uvicorn.Config(
        app,
        http=http,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=rest + _REST_MARGIN,
        timeout_graceful_shutdown=int(_LAST_SECONDS),
    )


def _openable(connections: int) -> int:
    """How many of so many connections the process may have open, after asking for as many files as
    that takes.

    As many again may be hanging up.
    """
    if resource is None:
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS grants less than its hard limit
            wanted = soft
    possible = max(1, (wanted - _OTHER_FILES) // 2)
    if possible < connections:
        log.warning(
            "at most %d connections, not %d: the process may open %d files",
            possible,
            connections,
            wanted,
        )
    return min(connections, possible)


def run_server(
    app: Starlette,
    sockets: list[socket.socket],
    on_start: Callable[[], None] = lambda: None,
    certificate: Certificate | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. Calls `on_start` when the ports are
    open. SIGHUP has keys and `certificate` read again.

    Raises ConfigError where another took a port.
    """
    for sock in sockets:
        try:
            sock.listen(_BACKLOG)
        except OSError as error:
            name = host_and_port(*sock.getsockname()[:2])
            raise ConfigError(
                f"cannot listen on {name}: {error.strerror}; choose another --port"
            ) from error
    Server(app, on_start, certificate).run(sockets)
