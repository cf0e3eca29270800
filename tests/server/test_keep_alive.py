"""Silence in a stream, and who is told what while it lasts."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

from moebius.errors import EngineError
from server.fake_engine import FakeEngine
from server.serving import Server, engine, events, run

COMPLETIONS = "/v1/completions"


def opening_later(fake: FakeEngine, seconds: float) -> FakeEngine:
    fake.gate.clear()
    threading.Timer(seconds, fake.gate.set).start()
    return fake


async def raw_stream(server: Server, **fields: Any) -> Any:
    return await server.post(
        COMPLETIONS, {"prompt": "x", "stream": True, "max_tokens": 3, **fields}
    )


def test_a_long_wait_for_the_first_token_is_bridged_by_comments() -> None:
    async def check(server: Server) -> None:
        response = await raw_stream(server)
        comments = response.content.count(b": keep-alive\n\n")
        assert response.content.startswith(b": keep-alive\n\n") and 3 <= comments <= 32
        *chunks, last = events(response.content)
        assert len(chunks) >= 1 and last == "[DONE]"

    run(check, opening_later(engine(), 1.5), keep_alive=0.05)


def test_no_comment_where_tokens_flow() -> None:
    async def check(server: Server) -> None:
        assert b"keep-alive" not in (await raw_stream(server)).content

    run(check)


def test_after_a_comment_an_error_can_only_be_an_event() -> None:
    async def check(server: Server) -> None:
        response = await raw_stream(server)
        assert response.status_code == 200
        (last,) = events(response.content)
        assert json.loads(last)["error"]["type"] == "server_error"

    run(check, opening_later(engine(fault=lambda r, s: EngineError("x")), 0.2), keep_alive=0.05)


def test_within_the_silence_an_error_is_still_plain_http() -> None:
    async def check(server: Server) -> None:
        assert (await raw_stream(server)).status_code == 500

    run(check, opening_later(engine(fault=lambda r, s: EngineError("x")), 0.1), keep_alive=5)


def test_tokens_without_text_are_silence_too() -> None:
    """Special tokens have no text: a client hears comments while only these are drawn."""

    async def check(server: Server) -> None:
        response = await raw_stream(server, max_tokens=120, ignore_eos=True)
        assert response.content.count(b": keep-alive") >= 3
        chunks = [json.loads(data) for data in events(response.content)[:-1]]
        assert [c["choices"][0]["text"] for c in chunks] == [""]

    fake = engine("", step_seconds=0.01)
    run(check, fake, keep_alive=0.05)


def test_scoring_a_long_prompt_delays_the_headers_not_beyond_the_silence() -> None:
    """Prompt log-probabilities arrive in chunks before any token; a failure in between is plain
    HTTP."""

    async def check(server: Server) -> None:
        fields = {"prompt": [20] * 80, "echo": True, "logprobs": 1}
        assert (await raw_stream(server, **fields, max_tokens=1)).status_code == 500
        server.engine.fault = lambda r, s: None
        response = await raw_stream(server, **fields, max_tokens=1)
        chunk = json.loads(events(response.content)[0])
        assert len(chunk["choices"][0]["logprobs"]["tokens"]) == 81

    steps = iter(range(10**6))
    run(check, engine(fault=lambda r, s: EngineError("x") if next(steps) == 10 else None))


def test_one_hop_to_the_loop_a_step() -> None:
    """However many requests a step serves, the loop is woken once."""

    async def check(server: Server) -> None:
        hops = 0
        original = server.door._loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal hops
            hops += args[0] == server.door._route
            return original(*args, **kwargs)

        server.door._loop.call_soon_threadsafe = counted
        try:
            await asyncio.gather(
                *(server.complete(prompt=[20 + i], max_tokens=10, n=4) for i in range(8))
            )
        finally:
            del server.door._loop.call_soon_threadsafe
        assert 10 <= hops == server.engine.deliveries

    run(check, engine(step_seconds=0.002))
