"""The live page's stream: a frame a second, made once for all who look, and not at all for nobody.

A viewer has at most one frame waiting for it: who reads slowly misses some. What a frame weighs is
the model's doing: some bytes for each of its experts, and 2 KB.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from functools import partial

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import moebius
from moebius.errors import OverloadError
from moebius.server.faults import DrainingError, fault_of
from moebius.server.metrics import Spread
from moebius.server.recent import Recent
from moebius.server.stream import FrontDoor
from moebius.server.vitals import Heard, Look, facts, frame

log = logging.getLogger(__name__)

MOST_VIEWERS = 8
INTERVAL = 1.0

_LOOK_AT_END = 0.1
_RETRY_SECONDS = 10.0
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Viewer:
    """Somebody who looks: the latest frame, until it has taken it."""

    def __init__(self) -> None:
        self._latest: bytes | None = None
        self._ended = False
        self._wake = asyncio.Event()

    def tell(self, event: bytes) -> None:
        self._latest = event
        self._wake.set()

    def end(self) -> None:
        self._ended = True
        self._wake.set()

    async def next(self) -> bytes | None:
        """The next event; None at the end."""
        while self._latest is None and not self._ended:
            self._wake.clear()
            await self._wake.wait()
        event = None if self._ended else self._latest
        self._latest = None
        return event


class LiveFeed:
    """Frames for up to MOST_VIEWERS viewers. With the first one it begins to look at the engine,
    and has the front door's metrics heard; with the last one both end."""

    def __init__(self, door: FrontDoor, spread: Spread, interval: float | None = None) -> None:
        """interval   seconds between two frames; None: INTERVAL"""
        self.interval = INTERVAL if interval is None else interval
        self._door = door
        self._spread = spread
        self._viewers: set[Viewer] = set()
        self._recent = Recent()
        self._look: Look | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def looks(self) -> bool:
        """Whether anything is computed for viewers."""
        return self._task is not None

    @contextlib.contextmanager
    def viewer(self) -> Iterator[Viewer]:
        """A viewer, until the block ends. Raises OverloadError where enough look on."""
        if self._over:
            raise DrainingError
        if len(self._viewers) >= MOST_VIEWERS:
            raise OverloadError(
                f"{MOST_VIEWERS} live pages are open already; close one",
                retry_after=_RETRY_SECONDS,
            )
        viewer = Viewer()
        self._viewers.add(viewer)
        if self._task is None:
            self._recent = self._door.metrics.recent = Recent()
            self._task = asyncio.create_task(self._run())
        try:
            yield viewer
        finally:
            self._viewers.discard(viewer)
            if not self._viewers:
                self._stop()

    def facts(self) -> bytes:
        """The event that a stream begins with, once there is a frame."""
        assert self._look is not None
        names = self._door.settings.served_model_names
        told = facts(
            self._door.client.info, names[0], moebius.__version__, self.interval, self._look.loads
        )
        return _event("facts", msgspec.json.encode(told))

    @property
    def _over(self) -> bool:
        """The server ends, and all that was in flight has been answered."""
        return self._door.draining and self._door.in_flight == 0

    def _stop(self) -> None:
        self._door.metrics.recent = None
        if self._task is not None:
            self._task.cancel()
        self._task = None
        self._look = None

    async def _run(self) -> None:
        """Make frames until the server ends, or a look fails; then all streams end."""
        try:
            while not self._over:
                heard = Heard.take(self._recent, self._state(), self._door.in_flight)
                self._look, event = await asyncio.to_thread(self._make, self._look, heard)
                for viewer in self._viewers:
                    viewer.tell(event)
                await self._pause()
        except Exception as error:
            fault_of(error)  # which logs it
        self._task = None
        for viewer in self._viewers:
            viewer.end()

    def _make(self, before: Look | None, heard: Heard) -> tuple[Look, bytes]:
        """A frame, on a thread: the engine may take a while to answer."""
        now = Look.take(self._door.client, self._spread)
        return now, _event("frame", msgspec.json.encode(frame(before or now, now, heard)))

    async def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.interval
        while not self._over and (left := until - loop.time()) > 0:
            await asyncio.sleep(min(left, _LOOK_AT_END))

    def _state(self) -> str:
        if self._door.draining:
            return "draining"
        return "ready" if self._door.ready else "not_ready"


class LiveStream(Response):
    """Server-sent events to one viewer, until it leaves or the server ends."""

    def __init__(self, feed: LiveFeed) -> None:
        self.feed = feed
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.feed.viewer() as viewer:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            watch = asyncio.create_task(_end_when_gone(viewer, receive))
            tell = partial(_tell, send)
            try:
                event = await viewer.next()
                if event is not None:
                    await tell(self.feed.facts() + event)
                while (event := await viewer.next()) is not None:
                    await tell(event)
                await tell(b"", more=False)
            finally:
                watch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watch


async def _tell(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _end_when_gone(viewer: Viewer, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    viewer.end()


def _event(kind: str, data: bytes) -> bytes:
    """One server-sent event with a name. JSON holds no line break, so one line suffices."""
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
