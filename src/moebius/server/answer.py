"""How a Call becomes an HTTP response: one JSON body or server-sent events, and what happens when
the client leaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import ClassVar, Protocol, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moebius.server.access import Visit
from moebius.server.faults import Fault, fault_of
from moebius.server.stream import Call, ClientGone, News

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"
# About so many bytes of JSON are made on the event loop: handing them to a thread would take
# longer.
_SMALL = 64 * 1024

Made = TypeVar("Made")


def event(data: bytes, name: str | None = None) -> bytes:
    """One server-sent event. JSON holds no line break, so one line suffices."""
    named = b"" if name is None else b"event: " + name.encode() + b"\n"
    return named + b"data: " + data + b"\n\n"


class Formatter(Protocol):
    """How one call's outputs become JSON."""

    id: str

    def chunks(self, news: News, /) -> Iterable[object]:
        """What a stream sends."""

    def closing(self) -> Iterable[object]:
        """What a stream sends when all choices are finished."""

    def whole(self) -> Iterable[bytes]:
        """The response that is not streamed, in pieces."""


class Answer(Response):
    """Submits a call when it is awaited, and answers it.

    A stream's headers wait for its first output, so that a request that fails before that gets a
    plain HTTP error; but for `keep_alive` seconds at most, after which the client hears comments
    and an error comes as an event.
    """

    stream_headers: ClassVar = _STREAM_HEADERS
    keep_alive: ClassVar = _KEEP_ALIVE
    done: ClassVar = _DONE
    repeats: ClassVar = False
    """Whether a stream's end tells all of the answer once more."""

    def __init__(self, call: Call, formatter: Formatter, stream: bool) -> None:
        self.call = call
        self.formatter = formatter
        self.stream = stream
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.call.on_cut = scope.get("moebius.abort", lambda: None)
        visit: Visit = scope["moebius.visit"]
        try:
            with contextlib.suppress(ClientGone):
                async with self.call, _watched(self.call, receive):
                    await (
                        self._stream(send) if self.stream else self._collect(scope, receive, send)
                    )
        finally:
            visit.facts |= self.call.facts()
            if self.formatter.id != self.call.id:
                visit.facts["answer"] = self.formatter.id
            visit.fault = self.call.fault

    def framed(self, chunk: object) -> bytes:
        """A chunk as a part of the stream."""
        return event(msgspec.json.encode(chunk))

    def told(self, fault: Fault) -> object:
        """What an error inside the stream says."""
        return msgspec.Raw(fault.body())

    async def _collect(self, scope: Scope, receive: Receive, send: Send) -> None:
        while not self.call.finished:
            await self.call.next()
        pieces = await self._made(lambda: list(self.formatter.whole()), self.call.received_bytes)
        size = b"%d" % sum(map(len, pieces))
        headers = [(b"content-type", b"application/json"), (b"content-length", size)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if self.call.received_bytes <= _SMALL:
            pieces = [b"".join(pieces)]
        for i, piece in enumerate(pieces, 1):
            await send({"type": "http.response.body", "body": piece, "more_body": i < len(pieces)})

    async def _made(self, make: Callable[[], Made], weight: int) -> Made:
        """What `make` makes out of about `weight` bytes: on a thread where that takes long."""
        return make() if weight <= _SMALL else await asyncio.to_thread(make)

    def _events(self, news: News) -> bytes:
        return self._framed(self.formatter.chunks(news))

    def _framed(self, chunks: Iterable[object]) -> bytes:
        return b"".join(map(self.framed, chunks))

    async def _stream(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        patience = self.call.keep_alive
        heard = loop.time()
        told = 0
        news = await self.call.next()
        while news and not any(delta for _, delta in news) and loop.time() - heard < patience:
            news = await self.call.next()
        await send({"type": "http.response.start", "status": 200, "headers": self.stream_headers})
        try:
            while True:
                # What a choice begins with may have come in many steps.
                received = self.call.received_bytes
                data = await self._made(partial(self._events, news), received - told)
                told = received if data else told
                if self.call.finished:
                    break
                if data or not news or loop.time() - heard >= patience:
                    await self._send(send, data or self.keep_alive)
                    heard = loop.time()
                news = await self.call.next()
            weight = self.call.received_bytes if self.repeats else 0
            data += await self._made(lambda: self._framed(self.formatter.closing()), weight)
            data += self.done
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception as error:
            self.call.fault = fault_of(error)
            data = self.framed(self.told(self.call.fault))
        await self._send(send, data, more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        self.call.sending = True
        try:
            await send({"type": "http.response.body", "body": data, "more_body": more})
        finally:
            self.call.sending = False


class NamedEvents(Answer):
    """A stream whose every event says by its name, too, which `type` it is of; it ends without a
    word."""

    done = b""

    def framed(self, chunk: object) -> bytes:
        assert isinstance(chunk, dict)
        return event(msgspec.json.encode(chunk), chunk["type"])


@contextlib.asynccontextmanager
async def _watched(call: Call, receive: Receive) -> AsyncIterator[None]:
    """End the call as soon as its client disconnects."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        call.end(ClientGone())

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
