"""What stands between a client's socket and uvicorn: limits in bytes and time, and an end that the
client hears.

uvicorn frames requests and responses. Every byte passes through here on its way, and `tracked`
tells, from the side of the application, where requests begin and end.
"""

import asyncio
import http
import re
import socket
import struct
from asyncio import TimerHandle
from collections.abc import Callable
from typing import Any, Protocol, cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moebius.server.capacity import Capacity
from moebius.server.faults import Fault
from moebius.server.limits import HTTP_LIMITS

_HEADER_SECONDS = 30.0
_STALL_SECONDS = 60.0
_LINGER_SECONDS = 2.0

# So much may come in while the application takes nothing of it: what uvicorn keeps, and the rest of
# a read.
_UNREAD_BYTES = 512 * 1024

# h11 takes some 40 microseconds for each chunk of a body, which may be as small as 6 bytes: others
# get their turn.
_H11_PIECE = 4096

_KEY = "moebius.connection"
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_REQUEST_LINE = re.compile(rb"[A-Z-]+ \S+ HTTP/1\.[01]\r?")
_BEGINNING_OF_ONE = re.compile(rb"[A-Z-]*( \S*( (H(T(T(P(/(1(\.[01]?)?)?)?)?)?)?)?\r?)?)?")
_NEEDS_H11 = re.compile(rb"\A[^\n]* HTTP/1\.0\r?\n|\nupgrade[ \t]*:", re.IGNORECASE)


class Framing(Protocol):
    """uvicorn's protocols, of which one connection gets one."""

    def __call__(self, *, h11: bool, state: dict[str, Any]) -> asyncio.Protocol:
        """h11 knows HTTP/1.0 and declines upgrades well, httptools is fast; `state` becomes
        scope["state"]."""


class Connection(asyncio.Protocol):
    """One client's connection.

    A client must complete a request's headers within _HEADER_SECONDS and HTTP_LIMITS.header_bytes,
    and take what waits for it within _STALL_SECONDS. uvicorn gets one request after the other: what
    comes in behind one that is being answered waits here. Requests find scope["moebius.abort"],
    which cuts the connection.
    """

    def __init__(self, framing: Framing, capacity: Capacity, state: dict[str, Any]) -> None:
        self._framing = framing
        self._capacity = capacity
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._inner: asyncio.Protocol | None = None
        self._by_h11 = False
        self._feeding = False
        # Whether more of what is held goes to uvicorn on the loop's next turn; whether uvicorn
        # wants none for now.
        self._in_pieces = False
        self._paused = False
        # Bytes that came in since the application last got anything of a request.
        self._loose_bytes = 0
        # What uvicorn gets later: the first request's beginning, or what follows the request being
        # answered.
        self._held = b""
        self._answering = False
        self._received = False
        self._started = False
        self._over = asyncio.Event()
        self._closing = False
        self._deadline: TimerHandle | None = None
        self._stall: TimerHandle | None = None

    # The transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._capacity.admit(self):
            self._set_deadline(_HEADER_SECONDS)
            self._capacity.waits(self)
        else:
            message = f"all of the server's {self._capacity.most} connections are in use"
            self._refuse(
                Fault(503, message, "overloaded", "overload", headers={"Retry-After": "1"})
            )

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._capacity.forget(self)
        self._set_deadline(None)
        self._set_stall(None)
        self._over.set()
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return  # it is read so that the client reads our answer, instead of failing to send
        if self._in_pieces or (self._answering and self._received):
            self._held += data
            if len(self._held) > HTTP_LIMITS.header_bytes:
                self._transport.pause_reading()
            return
        self._feed(data)

    def pause_writing(self) -> None:
        self._set_stall(_STALL_SECONDS)
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._set_stall(None)
        if self._inner is not None:
            self._inner.resume_writing()

    # What the application's side tells

    def begin(self, headers: Headers, version: str) -> asyncio.Event | None:
        """The application has a request; what is set when it is answered, or its client gone. None:
        it is refused."""
        if not self._by_h11 and (version == "1.0" or "upgrade" in headers):
            # httptools has framed it wrongly, or has lost its body.
            message = (
                "HTTP/1.0 or an offer of another protocol must not follow other requests on one "
                "connection"
            )
            self._refuse(Fault(400, message, "bad_request"))
            return None
        self._answering = True
        self._started = False
        self._received = (
            "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"
        )
        self._loose_bytes = 0
        self._over = asyncio.Event()
        if self._closing:
            self._over.set()
        self._set_deadline(None)
        self._capacity.works(self)
        return self._over

    def receive(self, *, whole: bool) -> None:
        """The application has a part of the request's body, or the last of it."""
        self._received = whole
        self._loose_bytes = 0

    def start(self, headers: MutableHeaders, *, persistent: bool) -> None:
        """A response begins: say in its headers whether, and how long, the connection may be used
        again."""
        self._started = True
        # The rest of a body that nobody reads is not worth waiting for.
        if self._capacity.ending or not self._received or not persistent:
            headers["Connection"] = "close"
        elif headers.get("connection", "").lower() != "close":
            headers["Keep-Alive"] = f"timeout={self._capacity.rest}"

    def end(self) -> None:
        """The response is complete."""
        self._answering = False
        self._loose_bytes = 0
        self._over.set()
        if self._closing or self._transport.is_closing():
            return
        self._capacity.waits(self)
        self._feed_held()

    def cut(self) -> None:
        """Hang up at once; what the client has not taken is dropped, in the kernel's buffer too."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and not self._transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # uvicorn's calls, by way of its transport

    def pause_reading(self) -> None:
        self._paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._paused = False
        if not self.closing and not self._in_pieces:
            self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Send what uvicorn writes.

        What it says while bytes are fed to it is not the application's: it complains of them, in
        its own words.
        """
        if self._closing:
            return
        if not self._feeding:
            self._transport.write(data)
        else:
            self._complain(Fault(400, "this is no valid HTTP request", "bad_request"))

    def close(self) -> None:
        """Hang up once what was written has gone out.

        Closing while the client still sends would reset the connection, and might lose it our
        answer. Then we say that we are done, and drop what still comes, for a moment.
        """
        if self._closing:
            return
        self._closing = True
        self._held = b""
        self._set_stall(_STALL_SECONDS)
        if not self._capacity.leaves(self):
            self.cut()
        elif (
            (self._answering or self._loose_bytes)
            and not self._received
            and not self._transport.is_closing()
        ):
            self._transport.resume_reading()
            if self._transport.can_write_eof():  # TLS says that by closing alone
                self._transport.write_eof()
            self._set_deadline(_LINGER_SECONDS, self._transport.close)
        else:
            self._set_deadline(None)
            self._transport.close()

    @property
    def closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    # How bytes reach uvicorn

    def _feed(self, data: bytes) -> None:
        if not self._answering and self._deadline is None:
            self._set_deadline(_HEADER_SECONDS)
        self._loose_bytes += len(data)
        if self._inner is None:
            data = self._held + data
            self._held = b""
            if (
                not _END_OF_HEAD.search(data)
                and _may_be_head(data)
                and self._loose_bytes <= HTTP_LIMITS.header_bytes
            ):
                self._held = data
                return
            state = {**self._state, _KEY: self}
            self._by_h11 = _NEEDS_H11.search(data) is not None
            self._inner = self._framing(h11=self._by_h11, state=state)
            self._inner.connection_made(_Transport(self, self._transport))
        if self._by_h11 and len(data) > _H11_PIECE:
            self._held = data[_H11_PIECE:]
            data = data[:_H11_PIECE]
            self._in_pieces = True
            self._transport.pause_reading()
            self._loop.call_soon(self._feed_next_piece)
        self._feeding = True
        try:
            self._inner.data_received(data)
        finally:
            self._feeding = False
        # By then the application has what became a request, or a part of one.
        self._loop.call_soon(self._check_size)

    def _feed_next_piece(self) -> None:
        self._in_pieces = False
        # Behind a request that has been received, the rest is the next one's, and waits.
        if not (self._answering and self._received):
            self._feed_held()

    def _feed_held(self) -> None:
        held = self._held
        self._held = b""
        if self.closing:
            return
        if held:
            self._feed(held)
        if not self._in_pieces and not self._paused:
            self._transport.resume_reading()

    def _check_size(self) -> None:
        """Headers, and what frames a body without being of it (chunks' extensions, trailers), must
        come to an end."""
        most = _UNREAD_BYTES if self._answering else HTTP_LIMITS.header_bytes
        if self._loose_bytes > most and not self._closing:
            message = f"request line and headers are larger than {HTTP_LIMITS.header_bytes} bytes"
            self._complain(Fault(431, message, "headers_too_large"))

    def _complain(self, fault: Fault) -> None:
        """What comes in is no HTTP: say so, unless that would stand in the middle of an answer."""
        if self._answering and self._started:
            self.cut()
        else:
            self._refuse(fault)

    def _refuse(self, fault: Fault) -> None:
        """Answer what never became a request, and hang up."""
        fault = self._capacity.refused(fault)
        if not self._transport.is_closing():
            self._transport.write(_refusal(fault))
        self._received = False
        self._loose_bytes = max(self._loose_bytes, 1)
        self.close()

    # Deadlines

    def _set_deadline(self, seconds: float | None, then: Callable[[], None] | None = None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = (
            None if seconds is None else self._loop.call_later(seconds, then or self.close)
        )

    def _set_stall(self, seconds: float | None) -> None:
        """Whoever takes nothing of what waits for it is cut off."""
        if self._stall is not None:
            self._stall.cancel()
        self._stall = None if seconds is None else self._loop.call_later(seconds, self.cut)


class _Transport(asyncio.Transport):
    """The transport as uvicorn sees it: writing and closing are the connection's."""

    def __init__(self, connection: Connection, transport: asyncio.Transport) -> None:
        super().__init__()
        self._connection = connection
        self._transport = transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._connection.write(bytes(data))

    def close(self) -> None:
        self._connection.close()

    def abort(self) -> None:
        self._transport.abort()

    def pause_reading(self) -> None:
        self._connection.pause_reading()

    def resume_reading(self) -> None:
        self._connection.resume_reading()

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._connection.closing


def _may_be_head(data: bytes) -> bool:
    """Whether this can be how a request begins, whose end is still to come."""
    line, newline, _ = data.partition(b"\n")
    return (_REQUEST_LINE if newline else _BEGINNING_OF_ONE).fullmatch(line) is not None


def _refusal(fault: Fault) -> bytes:
    """The whole response to what never became a request."""
    body = fault.body()
    lines = [f"HTTP/1.1 {fault.status} {http.HTTPStatus(fault.status).phrase}"]
    lines += ["content-type: application/json", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name.lower()}: {value}" for name, value in fault.headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def tracked(app: ASGIApp) -> ASGIApp:
    """`app`, each of whose requests tells its connection when it begins, has been read, and is
    answered."""

    async def on_connection(scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection | None = scope.get("state", {}).get(_KEY)
        if connection is None:
            await app(scope, receive, send)
            return
        asked = Headers(scope=scope)
        persistent = (
            scope["http_version"] == "1.1" and "close" not in asked.get("connection", "").lower()
        )
        scope["moebius.abort"] = connection.cut
        over = connection.begin(asked, scope["http_version"])
        if over is None:
            return
        whole = False

        async def heard() -> Message:
            nonlocal whole
            if whole:
                # uvicorn, which looks at the last of pipelined requests alone, would let a client's
                # leaving pass.
                await over.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if message["type"] == "http.request":
                whole = not message.get("more_body", False)
                connection.receive(whole=whole)
            return message

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message.get("headers", ())))
                connection.start(headers, persistent=persistent)
                message = {**message, "headers": headers.raw}
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                connection.end()

        await app(scope, heard, told)

    return on_connection
