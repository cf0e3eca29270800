"""An OpenAI-compatible server that answers by script: what it sends, byte for byte, and when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Step = tuple[float, bytes]
"""Seconds to wait, then bytes to send."""


def event(body: dict[str, Any] | str) -> bytes:
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n".encode()


def text(piece: str, **more: Any) -> bytes:
    return event({"choices": [{"index": 0, "text": piece, "finish_reason": None, **more}]})


def chat(piece: str | None = None, **delta: Any) -> bytes:
    fields = delta if piece is None else {"content": piece, **delta}
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


END = event({"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": "length"}]})
DONE = event("[DONE]")


def usage(prompt: int, completion: int) -> bytes:
    return event(
        {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}
    )


def answer(first: float, gaps: Sequence[float], prompt: int = 7) -> list[Step]:
    """A whole answer: the first token after `first` seconds, the others after `gaps`."""
    tokens = [(wait, text(f"t{i} ")) for i, wait in enumerate((first, *gaps))]
    return [*tokens, (0, END), (0, usage(prompt, len(tokens))), (0, DONE)]


class FakeOpenAI:
    """`script(number, body)` gives the steps of request `number`, or (status, body) for a refusal.

    bodies, keys    of every request so far, in order of arrival      most_at_once   requests under
                    way together
    """

    def __init__(
        self, script: Callable[[int, dict[str, Any]], list[Step] | tuple[int, bytes]]
    ) -> None:
        self.script = script
        self.models: list[str] | None = ["fake", "other"]
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = self._now = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._serve(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        body = json.loads(await reader.readexactly(int(fields.get("content-length", 0))) or b"{}")
        if head.startswith("get"):
            listed = {"data": [{"id": name} for name in self.models or ()]}
            self._send(writer, 404 if self.models is None else 200, json.dumps(listed).encode())
        else:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            await self._answer(writer, fields, body)
            self._now -= 1

    async def _answer(
        self, writer: asyncio.StreamWriter, fields: dict[str, str], body: dict[str, Any]
    ) -> None:
        self.bodies.append(body)
        self.keys.append(fields.get("authorization"))
        steps = self.script(len(self.bodies) - 1, body)
        if isinstance(steps, tuple):
            self._send(writer, *steps)
            return
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
        )
        for wait, data in steps:
            await asyncio.sleep(wait)
            writer.write(data)
        await writer.drain()

    def _send(self, writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
        writer.write(
            b"HTTP/1.1 %d X\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            % (status, len(body))
            + body
        )


@contextmanager
def running(fake: FakeOpenAI) -> Iterator[str]:
    """The server on a free port and a thread of its own; its URL."""
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    ends: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    async def main() -> None:
        server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        ends.put(lambda: loop.call_soon_threadsafe(over.set))
        ports.put(server.sockets[0].getsockname()[1])
        await over.wait()
        server.close()
        await asyncio.sleep(0.01)  # connections that are being closed

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{ports.get(timeout=5)}"
    finally:
        ends.get(timeout=5)()
        thread.join(5)
        assert not thread.is_alive()
