"""One client's connection: HTTP/1.1 and 1.0 in, exchanges with an ASGI application out. Everything has a limit."""

import asyncio
import socket
import struct
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import httptools
from starlette.types import ASGIApp

from moebius.schedule.request import LIMITS
from moebius.server.capacity import Capacity
from moebius.server.exchange import Exchange, Headers, refusal
from moebius.server.faults import Fault

_HEADER_SECONDS = 30.0
_STALL_SECONDS = 60.0
_LINGER_SECONDS = 2.0
# So much longer than clients are told a connection may rest: a request that is sent in the last moment is served.
_REST_MARGIN = 5.0

_PIECE = 8 * 1024
_AHEAD_BYTES = 64 * 1024
_NOTHING = memoryview(b"")


def _not_http(message: str = "this is no valid HTTP request") -> Fault:
    return Fault(400, message, "bad_request")


class Connection(asyncio.Protocol):
    """Parses requests, and has the application answer them one after the other.

    A client must complete a request's headers within _HEADER_SECONDS and LIMITS.header_bytes, and take what waits
    for it within _STALL_SECONDS. Requests find scope["moebius.abort"], which cuts the connection.

    The connection is in one of three states: it waits for a request, it answers one (`_current`; others may be
    queued behind it), or it is closing.
    """

    def __init__(self, app: ASGIApp, capacity: Capacity, tasks: set[asyncio.Task[None]], state: dict[str, Any]) -> None:
        self.capacity = capacity
        self._app = app
        self._tasks = tasks
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._client: tuple[str, int] | None = None
        self._server: tuple[str, int] | None = None
        # What comes next, in order: requests to answer, or what is wrong with the bytes after them.
        self._queue: deque[Exchange | Fault] = deque()
        self._current: Exchange | None = None
        self._incoming: Exchange | None = None
        self._ahead = _NOTHING
        self._closing = False
        self._reading = True
        self._deadline: TimerHandle | None = None
        self._stall: TimerHandle | None = None
        self._taken = asyncio.Event()
        self._taken.set()
        # Of the request whose headers are coming in.
        self._target = b""
        self._headers: Headers = []
        self._in_headers = False
        self._used = False
        # Fed to the parser since it last made something of it.
        self._loose_bytes = 0

    # The transport's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._client = _address(transport.get_extra_info("peername"))
        self._server = _address(transport.get_extra_info("sockname"))
        if self.capacity.admit(self):
            self._wait()
        else:
            message = f"all of the server's {self.capacity.most} connections are in use"
            self._refuse(Fault(503, message, "overloaded", "overload", headers={"Retry-After": "1"}))

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self.capacity.forget(self)
        self._set_deadline(None)
        _cancel(self._stall)
        self._taken.set()
        if self._current is not None:
            self._current.disconnect()
        self._queue.clear()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return  # it is read so that the client reads our answer, instead of failing to send
        self._ahead = memoryview(bytes(self._ahead) + data)
        self._parse()
        if len(self._ahead) > _AHEAD_BYTES:
            self.pause_reading()

    def pause_writing(self) -> None:
        self._taken.clear()
        self._expect_progress()

    def resume_writing(self) -> None:
        self._taken.set()
        if not self._closing:
            _cancel(self._stall)
            self._stall = None

    # The parser's calls

    def on_message_begin(self) -> None:
        self._target, self._headers = b"", []
        self._in_headers = True
        self._loose_bytes = 0
        if self._current is None:
            self._set_deadline(_HEADER_SECONDS)

    def on_url(self, part: bytes) -> None:
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # others trail after a body, and nobody asks for them
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._loose_bytes = 0
        if self._parser.should_upgrade():
            return
        self._in_headers = False
        self._incoming = self._exchange()
        self._queue.append(self._incoming)

    def on_body(self, data: bytes) -> None:
        self._loose_bytes = 0
        if self._incoming is not None:
            self._incoming.take(data)

    def on_message_complete(self) -> None:
        self._loose_bytes = 0
        if self._incoming is not None:
            self._incoming.end_of_request()
        self._incoming = None

    # An exchange's calls

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    async def writable(self) -> None:
        await self._taken.wait()

    def pause_reading(self) -> None:
        if self._reading and not self._closing:
            self._reading = False
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._reading and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()

    def finished(self, exchange: Exchange) -> None:
        self._current = None
        if self._closing:
            return
        if not exchange.keep_alive:
            self.close(linger=not exchange.received or bool(self._ahead))
            return
        self._parse()
        if self._current is None:
            self.resume_reading()

    def broke_off(self, exchange: Exchange) -> None:
        self._current = None
        if exchange.started:
            self.close()
        else:
            self._refuse(Fault(500, "the server failed on this request", "internal_error", "error"))

    # The server's calls

    def finish(self) -> None:
        if self._current is None:
            self.close()
        else:
            self._current.keep_alive = False

    def close(self, *, linger: bool = False) -> None:
        """Hang up once what was written has gone out.

        Closing while the client still sends would reset the connection, and might lose it our answer. Then we
        `linger`: say that we are done, and drop what still comes, for a moment.
        """
        if self._closing:
            return
        self._closing = True
        self._ahead = _NOTHING
        if not self.capacity.leaves(self):
            self.cut()
            return
        self._expect_progress()
        if linger and not self._transport.is_closing():
            self.resume_reading()
            self._transport.write_eof()
            self._set_deadline(_LINGER_SECONDS, self._transport.close)
        else:
            self._set_deadline(None)
            self._transport.close()

    def cut(self) -> None:
        """Hang up at once; what the client has not taken is dropped, in the kernel's buffer too."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and not self._transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # How requests come to be

    def _parse(self) -> None:
        """Make what it can of the bytes that wait: until a request is queued behind the one being answered."""
        while self._ahead and not self._queue and not self._closing:
            piece, self._ahead = self._ahead[:_PIECE], self._ahead[_PIECE:]
            self._feed(piece)
            self._advance()
        self._advance()
        if not self._ahead:
            self._ahead = _NOTHING  # an empty view keeps all that it is a view of

    def _feed(self, piece: memoryview) -> None:
        self._loose_bytes += len(piece)
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(bytes(piece[upgrade.args[0] :]))
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, Fault):
                raise
            self._give_up(error.__context__)
        except httptools.HttpParserError:
            self._give_up(_not_http())
        if self._loose_bytes > LIMITS.header_bytes:
            message = f"request line and headers are larger than {LIMITS.header_bytes} bytes"
            self._give_up(Fault(431, message, "headers_too_large"))

    def _exchange(self) -> Exchange:
        """The request whose headers are complete. Raises Fault where they make no request."""
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise Fault(505, "this server speaks HTTP/1.1 and HTTP/1.0", "bad_request")
        path, raw_path, query = _split(self._target)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": self._parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": self._headers,
            "client": self._client,
            "server": self._server,
            "state": self._state.copy(),
            "moebius.abort": self.cut,
        }
        fields = dict(self._headers)
        length = int(fields[b"content-length"]) if b"content-length" in fields else None
        # A sender of HTTP/1.0 does not know chunks: one that sends them frames its bodies in ways nobody agreed on.
        keep_alive = self._parser.should_keep_alive() and not (version == "1.0" and b"transfer-encoding" in fields)
        return Exchange(self, scope, keep_alive=keep_alive, length=length)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Read a request that offers another protocol (h2c, say) as if it did not: that is how one declines.

        The parser takes what follows the headers of such a request for the other protocol, its body too.
        """
        if self._parser.get_method() == b"CONNECT":
            self._give_up(_not_http("this server is no proxy: it does not serve CONNECT"))
            return
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (method, self._target, version)]
        lines += [b"%s: %s" % header for header in self._headers if header[0] != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        self._ahead = memoryview(b"\r\n".join(lines) + b"\r\n\r\n" + rest + bytes(self._ahead))

    def _give_up(self, fault: Fault) -> None:
        """What comes in is no request: answer those before it, then this, and hang up."""
        broken, self._incoming = self._incoming, None
        self._ahead = _NOTHING
        if broken is not None:
            # The bytes that are wrong belong to a request that the application may be reading.
            broken.disconnect()
            if broken is self._current:
                self._current = None
                if broken.started:
                    self.cut()
                    return
            else:
                self._queue.remove(broken)
        self._queue.append(fault)

    def _advance(self) -> None:
        """Turn to what is next, unless a request is being answered."""
        if self._current is not None or self._closing:
            return
        if not self._queue:
            self._wait()
            return
        item = self._queue.popleft()
        if isinstance(item, Fault):
            self._refuse(item)
            return
        self._used = True
        self._current = item
        self._set_deadline(None)
        self.capacity.works(self)
        task = self._loop.create_task(item.run(self._app))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _wait(self) -> None:
        """Wait for a request, though not forever."""
        if self._deadline is None:
            rests = self._used and not self._in_headers
            self._set_deadline(self.capacity.rest + _REST_MARGIN if rests else _HEADER_SECONDS)
            self.capacity.waits(self)

    def _refuse(self, fault: Fault) -> None:
        """Answer what never became a request, and hang up."""
        fault = self.capacity.refused(fault)
        if not self._transport.is_closing():
            self._transport.write(refusal(fault))
        self.close(linger=True)

    # Deadlines

    def _set_deadline(self, seconds: float | None, then: Callable[[], None] | None = None) -> None:
        _cancel(self._deadline)
        self._deadline = None if seconds is None else self._loop.call_later(seconds, then or self.close)

    def _expect_progress(self) -> None:
        """Whoever takes nothing of what waits for it is cut off."""
        if self._stall is None:
            self._stall = self._loop.call_later(_STALL_SECONDS, self.cut)


def _cancel(timer: TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _address(name: Any) -> tuple[str, int] | None:
    return (str(name[0]), int(name[1])) if isinstance(name, tuple) else None


def _split(target: bytes) -> tuple[str, bytes, bytes]:
    """A request's target as path, path as it was sent, and query; of an absolute URL its own. Raises Fault."""
    try:
        url = httptools.parse_url(target)
        raw_path = url.path or b"/"
        return unquote(raw_path.decode("ascii")), raw_path, url.query or b""
    except (httptools.HttpParserError, UnicodeDecodeError):
        raise _not_http() from None
