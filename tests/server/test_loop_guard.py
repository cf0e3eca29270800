"""The guard of the event loop sees what holds it, whoever calls it, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

import loop_guard
from server.serving import engine, exchange, listening, run


def busy(seconds: float = 0.19) -> None:
    """Keep the processor, by its own clock."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.fixture(autouse=True)
def caught() -> Any:
    """What the guard caught, which would fail these tests too."""
    yield loop_guard.slow
    loop_guard.slow.clear()


async def by_call_soon() -> None:
    asyncio.get_running_loop().call_soon(busy)
    await asyncio.sleep(0.01)


async def by_timer() -> None:
    asyncio.get_running_loop().call_later(0.001, busy)
    await asyncio.sleep(0.2)


async def by_thread() -> None:
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(loop.call_soon_threadsafe, busy)
    await asyncio.sleep(0.01)


async def by_task() -> None:
    async def step() -> None:
        await asyncio.sleep(0.001)
        busy()

    await asyncio.create_task(step())


async def by_protocol() -> None:
    class Busy(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            busy()

    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = await loop.create_server(Busy, sock=sock)
        _, writer = await asyncio.open_connection(*sock.getsockname())
        writer.write(b"x")
        await asyncio.sleep(0.2)
        writer.close()
        server.close()


@pytest.mark.parametrize("how", [by_call_soon, by_timer, by_thread, by_task, by_protocol])
def test_it_fires_on_a_tenth_of_a_second(how: Callable[[], Any], caught: list[str]) -> None:
    loop_guard.run(how())
    (message,) = caught
    assert "took the event loop for 1" in message and (
        "busy" in message or "step" in message or "data_" in message
    )


def test_it_is_blind_to_waiting_and_to_the_collector(caught: list[str]) -> None:
    async def waits() -> None:
        time.sleep(0.1)
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            gc.collect()

    loop_guard.run(waits())
    assert caught == []


def test_it_watches_the_servers_of_tests(
    monkeypatch: pytest.MonkeyPatch, caught: list[str]
) -> None:
    """Behind a socket and without one: the same route holds the loop in both."""
    from moebius.server import api

    honest = api.card
    monkeypatch.setattr(api, "card", lambda *given: busy() or honest(*given))  # type: ignore[func-returns-value]

    async def check(server: Any) -> None:
        busy()  # the test's own
        assert (await server.http.get("/v1/models")).status_code == 200

    run(check)
    assert len(caught) == 1
    with listening(engine()) as (port, _):
        assert b" 200 " in exchange(port, b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert len(caught) == 2 and "RequestResponseCycle.run_asgi" in caught[1]
