"""What the server's tests share: a tokenizer, an application on the fake engine, and ways to call
it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import httpx

import loop_guard
from moebius.server.app import create_app
from moebius.server.listen import reserve
from moebius.server.run import Server as RealServer
from moebius.server.settings import ServerSettings
from moebius.text import ChatTemplate, GenerationDefaults, Tokenizer
from server.fake_engine import FakeEngine, constant, hashed
from text.tiny_tokenizers import byte_level, llama

MODEL = "tiny"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
T = TypeVar("T")


@cache
def tokenizer(family: str = "byte_level", *, chat: bool = True) -> Tokenizer:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    templates = {"default": ChatTemplate(TEMPLATE)} if chat else None
    return Tokenizer(
        {"byte_level": byte_level, "llama": llama}[family](), names, templates=templates
    )


def engine(text: str | None = None, **options: Any) -> FakeEngine:
    """A fake engine that says `text` and ends, or tokens that depend on the request where there is
    no text."""
    vocab_size = tokenizer().vocab_size
    script = hashed(vocab_size) if text is None else constant(tokenizer().encode(text, False))
    return FakeEngine(script, vocab_size=vocab_size, **options)


def settings(**options: Any) -> ServerSettings:
    return ServerSettings((MODEL, "alias"), **options)


class Server:
    """An application on a fake engine, called without a socket."""

    def __init__(self, app: Any, fake: FakeEngine, http: httpx.AsyncClient) -> None:
        self.app, self.engine, self.http = app, fake, http
        self.door = app.state.front_door

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **options)

    async def complete(self, **fields: Any) -> dict[str, Any]:
        response = await self.post("/v1/completions", {"model": MODEL, "prompt": "hello", **fields})
        assert response.status_code == 200, response.text
        return response.json()

    async def chat(self, **fields: Any) -> dict[str, Any]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **fields}
        response = await self.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return response.json()

    async def stream(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """All chunks of a stream that ends with [DONE]."""
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        body = {
            "model": MODEL,
            "stream": True,
            **(chat if "chat" in path else {"prompt": "hello"}),
            **fields,
        }
        response = await self.post(path, body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(response.content)
        assert last == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]


def events(raw: bytes) -> list[str]:
    """The data of each server-sent event; comments are checked and left out."""
    blocks = raw.decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(
        block.startswith(("data: ", ": keep-alive")) and "\n" not in block for block in blocks
    )
    return [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]


@contextlib.asynccontextmanager
async def serving(fake: FakeEngine | None = None, **options: Any) -> AsyncIterator[Server]:
    fake = fake or engine()
    spread = options.pop("spread", lambda: None)
    spans = options.pop("spans", None)
    chosen = {name: options.pop(name) for name in ("tokenizer", "defaults") if name in options}
    app = create_app(
        fake,
        chosen.get("tokenizer", tokenizer()),
        chosen.get("defaults", GenerationDefaults()),
        settings(**options),
        spread=spread,
        spans=spans,
    )
    transport = httpx.ASGITransport(loop_guard.apart(app), raise_app_exceptions=True)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20) as http,
    ):
        yield Server(app, fake, http)


def run(
    test: Callable[[Server], Awaitable[T]], fake: FakeEngine | None = None, **options: Any
) -> T:
    """Run a test's coroutine against a server of its own."""

    async def main() -> T:
        async with serving(fake, **options) as server:
            result = await test(server)
            await until(lambda: server.engine.idle)
            assert server.door.in_flight == 0
            return result

    return loop_guard.run(main(), of_server=False)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    asyncio.run(until(condition, seconds))


@contextlib.contextmanager
def listening(fake: FakeEngine, **options: Any) -> Iterator[tuple[int, Any]]:
    """A real server on a free port in a thread: (port, front door)."""
    certificate = options.pop("certificate", None)
    spread = options.pop("spread", lambda: None)
    text = options.pop("tokenizer", None) or tokenizer()
    app = create_app(fake, text, GenerationDefaults(), settings(**options), spread=spread)
    server = RealServer(app, certificate=certificate)
    with reserve("127.0.0.1", 0) as sockets:
        port = sockets[0].getsockname()[1]
        thread = threading.Thread(target=lambda: loop_guard.run(server.serve(sockets)), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield port, app.state.front_door
        finally:
            server.stop()
            thread.join(30)
            assert not thread.is_alive(), "the server did not end"


def http_request(path: str, body: Any, method: str = "POST", **headers: str) -> bytes:
    """A request as bytes, for a socket."""
    data = json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: test", "Content-Type: application/json"]
    lines += [
        f"Content-Length: {len(data)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def exchange(port: int, data: bytes, seconds: float = 5.0) -> bytes:
    """Send bytes, and read until the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        sock.sendall(data)
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
        return b"".join(parts)
