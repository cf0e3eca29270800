"""From a socket to a process that serves: binding, connections with deadlines, signals, and a clean end."""

import asyncio
import ipaddress
import logging
import os
import socket
import struct
from asyncio import TimerHandle
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from moebius.errors import ConfigError
from moebius.schedule.request import LIMITS
from moebius.server.faults import Fault
from moebius.server.stream import FrontDoor

log = logging.getLogger(__name__)

_HEADER_SECONDS = 30.0
_STALL_SECONDS = 60.0
_LAST_SECONDS = 5.0
_BACKLOG = 2048


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def reserve_socket(host: str, port: int, *, api_keys: tuple[str, ...] = ()) -> socket.socket:
    """Bind before anything is loaded. The port opens (listens) when the server starts; 0 takes a free one.

    Raises ConfigError where the port is in use or the address is no address of this machine, and for an address that
    others can reach when there is no API key.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; it must lie between 0 and 65535")
    if not _is_loopback(host) and not api_keys:
        raise ConfigError(f"host {host!r} can be reached from other machines; give an --api-key, or use 127.0.0.1")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} cannot be resolved: {error}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot bind {host}:{port}: {error.strerror}; choose another --port or --host") from error
    return sock


def _cancel(timer: TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Connection(HttpToolsProtocol):
    """One client's connection, with what uvicorn leaves open: limits in bytes and time, errors in OpenAI's shape.

    A client must complete its request's headers within _HEADER_SECONDS and LIMITS.header_bytes, and take what waits
    for it within _STALL_SECONDS. Requests find scope["moebius.abort"], which cuts the connection.
    """

    _header_timer: TimerHandle | None = None
    _stall_timer: TimerHandle | None = None
    _header_bytes = 0
    _in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._header_timer)
        _cancel(self._stall_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_headers = self._in_headers
        super().data_received(data)
        if was_in_headers and self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > LIMITS.header_bytes and not self.transport.is_closing():
                self._refuse(431, f"request line and headers are larger than {LIMITS.header_bytes} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["moebius.abort"] = self.cut  # type: ignore[typeddict-unknown-key]
        self._expect_headers()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        _cancel(self._header_timer)
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(_STALL_SECONDS, self.cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._stall_timer)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no valid HTTP request")

    def cut(self) -> None:
        """Hang up at once; what the client has not taken is dropped, in the kernel's buffer too."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None and not self.transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _expect_headers(self) -> None:
        _cancel(self._header_timer)
        self._in_headers, self._header_bytes = True, 0
        self._header_timer = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

    def _refuse(self, status: int, message: str) -> None:
        """Answer what never became a request, and hang up."""
        fault = Fault(status, message, "bad_request", headers={"Content-Type": "application/json"})
        fault = self.config.app.state.access.refused(fault)  # type: ignore[union-attr]
        body = fault.body()
        headers = {**fault.headers, "Content-Length": len(body), "Connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn's server with our end: the first signal drains while the port stays open, the second ends at once."""

    def __init__(self, config: uvicorn.Config, door: FrontDoor) -> None:
        super().__init__(config)
        self._door = door
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signalled = False
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            os._exit(128 + sig)
        self._signalled = True
        if self._loop is not None and self.started:
            self._loop.call_soon_threadsafe(self.begin_drain)
        else:
            self.should_exit = True

    def begin_drain(self) -> None:
        self._door.drain()
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining: %d calls in flight", self._door.in_flight)
        if not await self._door.idle(self._door.settings.drain_timeout):
            log.warning("%d calls were not finished within the drain time", self._door.in_flight)
            self._door.abort_all()
        self.should_exit = True


def make_server(app: Starlette) -> _Server:
    """A server for the application; call `run(sockets=[...])`."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(_LAST_SECONDS),
    )
    return _Server(config, app.state.front_door)


def run_server(app: Starlette, sock: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. Raises ConfigError where another took the port."""
    try:
        sock.listen(_BACKLOG)
    except OSError as error:
        name = sock.getsockname()
        raise ConfigError(f"cannot listen on {name[0]}:{name[1]}: {error.strerror}; choose another --port") from error
    make_server(app).run(sockets=[sock])
