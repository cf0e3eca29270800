"""One request and its response: the application's `receive` and `send`, and the bytes of a response."""

import asyncio
import http
import logging
import time
from email.utils import formatdate
from functools import lru_cache
from typing import Protocol

from starlette.types import ASGIApp, Message, Scope

from moebius.server.capacity import SMALL_BODY, Capacity
from moebius.server.faults import Fault

log = logging.getLogger(__name__)

# Of a body that nobody reads so much is kept; then the client has to wait.
_UNREAD_BYTES = 64 * 1024

Headers = list[tuple[bytes, bytes]]


class Wire(Protocol):
    """What an exchange needs of its connection."""

    capacity: Capacity

    def write(self, data: bytes) -> None:
        """Send bytes to the client."""

    async def writable(self) -> None:
        """Wait until the client has taken most of what was written, or is gone."""

    def pause_reading(self) -> None:
        """Take nothing more from the client for now."""

    def resume_reading(self) -> None:
        """Take from the client again."""

    def finished(self, exchange: "Exchange") -> None:
        """The exchange's response has been written to its end."""

    def broke_off(self, exchange: "Exchange") -> None:
        """The application ended without a whole response."""


class Exchange:
    """A request as it comes in and a response as it goes out.

    length       the body's size, where the client tells it
    keep_alive   the connection goes on after the response
    received     the request has come in to its end
    started, complete   the response has begun, has ended
    """

    def __init__(self, wire: Wire, scope: Scope, *, keep_alive: bool, length: int | None) -> None:
        self.scope = scope
        self.keep_alive = keep_alive
        self.length = length
        self.received = False
        self.started = False
        self.complete = False
        self._wire = wire
        self._gone = False
        self._news = asyncio.Event()
        self._body = bytearray()
        self._handed_over = 0
        self._room = 0
        expected = [value.lower() for name, value in scope["headers"] if name == b"expect"]
        self._says_continue = expected == [b"100-continue"] and scope["http_version"] == "1.1"
        self._head = b""
        self._chunked = False
        self._bodyless = False
        self._left: int | None = None

    # What the connection tells it

    def take(self, data: bytes) -> None:
        """More of the request's body."""
        self._body += data
        self._says_continue = False
        if len(self._body) > _UNREAD_BYTES:
            self._wire.pause_reading()
        self._news.set()

    def end_of_request(self) -> None:
        self.received = True
        self._says_continue = False
        self._news.set()

    def disconnect(self) -> None:
        """The client is gone: what is sent from now on goes nowhere."""
        self._gone = True
        self._news.set()

    async def run(self, app: ASGIApp) -> None:
        """Have the application answer."""
        try:
            await app(self.scope, self.receive, self.send)
        except Exception as error:
            log.error("an answer broke off: %s", type(error).__name__)
        finally:
            self._wire.capacity.give_body(self._room)
            if not self.complete and not self._gone:
                self._wire.broke_off(self)

    # What the application calls

    async def receive(self) -> Message:
        """The body's next part, or the client's leaving. Raises OverloadError where the body finds no room."""
        self._reserve()
        if self._says_continue and not self.started:
            self._says_continue = False
            self._wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._gone and not self.complete:
            self._wire.resume_reading()
            await self._news.wait()
            self._news.clear()
        if self._gone or self.complete:
            return {"type": "http.disconnect"}
        self._reserve()
        body, self._body = bytes(self._body), bytearray()
        self._handed_over += len(body)
        return {"type": "http.request", "body": body, "more_body": not self.received}

    async def send(self, message: Message) -> None:
        await self._wire.writable()
        if self._gone:
            return
        match message["type"]:
            case "http.response.start" if not self.started:
                self._start(message["status"], list(message.get("headers", ())))
            case "http.response.body" if self.started and not self.complete:
                self._continue(message.get("body", b""), message.get("more_body", False))
            case kind:
                raise RuntimeError(f"{kind} has no place here")

    def _reserve(self) -> None:
        """Hold room for what the body takes, or will take, until the exchange ends."""
        size = max(self.length or 0, self._handed_over + len(self._body))
        if size > max(SMALL_BODY, self._room):
            self._wire.capacity.take_body(size - self._room)
            self._room = size

    def _start(self, status: int, headers: Headers) -> None:
        """Put the head together. It goes out with the body's first bytes."""
        self.started = True
        self._bodyless = self.scope["method"] == "HEAD" or status in (204, 304)
        lengths = [int(value) for name, value in headers if name.lower() == b"content-length"]
        if lengths:
            self._left = lengths[0]
        elif not self._bodyless and self.scope["http_version"] == "1.1":
            self._chunked = True
            headers.append((b"transfer-encoding", b"chunked"))
        elif not self._bodyless:
            self.keep_alive = False  # HTTP/1.0 knows the end of such a body only by the connection's
        asked_to_close = any(name.lower() == b"connection" and value.lower() == b"close" for name, value in headers)
        # The rest of a request that was answered early is not worth reading.
        self.keep_alive = self.keep_alive and self.received and not asked_to_close and not self._wire.capacity.ending
        headers = [header for header in headers if header[0].lower() != b"connection"]
        self._head = head(status, headers, rest=self._wire.capacity.rest if self.keep_alive else None)

    def _continue(self, data: bytes, more: bool) -> None:
        parts = [self._head]
        self._head = b""
        if self._chunked:
            parts += [b"%x\r\n" % len(data), data, b"\r\n"] if data else []
            parts += [] if more else [b"0\r\n\r\n"]
        elif not self._bodyless:
            parts.append(data)
            self._count(len(data), more)
        self._wire.write(b"".join(parts))
        if not more:
            self.complete = True
            self._news.set()
            self._wire.finished(self)

    def _count(self, size: int, more: bool) -> None:
        if self._left is None:
            return
        self._left -= size
        if self._left < 0 or (self._left and not more):
            raise RuntimeError("a response's body is not as long as its content-length says")


@lru_cache(600)
def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


@lru_cache(1)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()


def head(status: int, headers: Headers, *, rest: int | None) -> bytes:
    """A response's head. `rest` is how long the connection may rest after it, in seconds; None: it closes."""
    lines = [(b"date", _date(int(time.time()))), *headers]
    if rest is None:
        lines.append((b"connection", b"close"))
    else:
        lines += [(b"connection", b"keep-alive"), (b"keep-alive", b"timeout=%d" % rest)]
    fields = b"\r\n".join(b"%s: %s" % line for line in lines)
    if fields.count(b"\n") != len(lines) - 1 or fields.count(b"\r") != len(lines) - 1:
        raise RuntimeError("a response's header holds a line break")
    return _status_line(status) + fields + b"\r\n\r\n"


def refusal(fault: Fault) -> bytes:
    """The whole response to what never became a request, after which the connection closes."""
    body = fault.body()
    headers = [(name.lower().encode(), value.encode()) for name, value in fault.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return head(fault.status, headers, rest=None) + body
