"""A request's own deadline, by field or header: at most the server's, and told as any deadline
is."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import openai
import pytest

from moebius.text import Tokenizer
from server.serving import MODEL, Server, engine, events, listening, run, until
from server.test_bad_requests import CHAT, COMPLETIONS, GOOD, check_error

HEADER = "X-Request-Timeout"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "asked", [({"timeout": 0.1}, {}), ({}, {HEADER: "0.1"}), ({"timeout": 60}, {HEADER: ".1"})]
)
def test_who_waits_beyond_its_deadline_is_told_so(
    asked: tuple[dict[str, float], dict[str, str]], path: str, stream: bool
) -> None:
    fields, headers = asked

    async def check(server: Server) -> None:
        server.engine.gate.clear()
        started = time.monotonic()
        response = await server.post(
            path, {**GOOD[path], **fields, "stream": stream, "n": 2}, headers=headers
        )
        assert 0.1 <= time.monotonic() - started < 10
        assert response.status_code == 503 and int(response.headers["retry-after"]) >= 1
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("deadline_exceeded", "server_error")
        assert {request.id for request in server.engine.requests} == set(server.engine.aborted)
        server.engine.gate.set()

    run(check)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_inside_a_stream_it_is_the_last_event(path: str) -> None:
    async def check(server: Server) -> None:
        fields = {"stream": True, "max_tokens": 400, "timeout": 1.0}
        asked = asyncio.create_task(server.post(path, {**GOOD[path], **fields}))
        await until(lambda: server.engine.steps >= 3)
        server.engine.gate.clear()
        response = await asked
        *chunks, last = map(json.loads, events(response.content))
        assert (
            response.status_code == 200 and chunks and all("error" not in chunk for chunk in chunks)
        )
        assert last["error"]["code"] == "deadline_exceeded" and "[DONE]" not in response.text
        server.engine.gate.set()

    run(check, engine("hello " * 200, step_seconds=0.02))


def test_the_engine_hears_the_earliest_of_all_deadlines() -> None:
    async def check(server: Server) -> None:
        for fields, headers, seconds in (
            ({}, {}, 50.0),
            ({"timeout": None}, {}, 50.0),
            ({"timeout": 20}, {}, 20.0),
            ({"timeout": 20.5}, {HEADER: "30"}, 20.5),
            ({"timeout": 30}, {HEADER: "20.25"}, 20.25),
            ({"timeout": 1e6}, {HEADER: "1000000"}, 50.0),
        ):
            before = time.monotonic()
            response = await server.post(
                COMPLETIONS, {**GOOD[COMPLETIONS], **fields}, headers=headers
            )
            after = time.monotonic()
            assert response.status_code == 200, response.text
            deadline = server.engine.requests[-1].deadline
            assert deadline is not None and before + seconds <= deadline <= after + seconds

    run(check, request_timeout=50.0)


def test_the_time_that_a_body_takes_counts() -> None:
    async def slow() -> Any:
        yield b'{"prompt": "x", "timeout": 0.1'
        await asyncio.sleep(0.2)
        yield b"}"

    async def check(server: Server) -> None:
        server.engine.gate.clear()
        started = time.monotonic()
        headers = {"Content-Type": "application/json"}
        response = await server.http.post(COMPLETIONS, content=slow(), headers=headers)
        assert response.json()["error"]["code"] == "deadline_exceeded"
        assert server.engine.requests[0].deadline < started + 0.2
        server.engine.gate.set()

    run(check)


@pytest.mark.parametrize("value", [0, -1, -0.0, "5", True, [], {}])
def test_a_wrong_field_is_named(value: Any) -> None:
    async def check(server: Server) -> None:
        for path in (COMPLETIONS, CHAT):
            error = check_error(
                await server.post(path, {**GOOD[path], "timeout": value}),
                status=400,
                param="timeout",
            )
            assert "timeout" in error["message"]

    run(check)


@pytest.mark.parametrize(
    "values",
    [
        ("0",),
        ("-1",),
        ("",),
        ("x",),
        ("nan",),
        ("inf",),
        ("1e3",),
        ("1 s",),
        ("9" * 400,),
        ("0.000",),
        ("5", "5"),
    ],
)
def test_a_wrong_header_is_named(values: tuple[str, ...]) -> None:
    async def check(server: Server) -> None:
        headers = [(HEADER, value) for value in values]
        for path in (COMPLETIONS, CHAT):
            error = check_error(
                await server.post(path, GOOD[path], headers=headers), status=400, param=HEADER
            )
            assert HEADER in error["message"]

    run(check)


def test_the_official_client_sends_and_hears_it() -> None:
    fake = engine()
    fake.gate.clear()
    with (
        listening(fake) as (port, _),
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=20
        ) as client,
    ):
        for extra in ({"extra_body": {"timeout": 0.1}}, {"extra_headers": {HEADER: "0.1"}}):
            with pytest.raises(openai.InternalServerError) as error:
                client.completions.create(model=MODEL, prompt="x", **extra)
            assert error.value.status_code == 503 and error.value.code == "deadline_exceeded"
        fake.gate.set()


def test_whoever_waits_for_a_thread_to_be_tokenised_on_has_a_deadline_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long prompts are encoded on two threads, while a third waits for its turn."""
    gate = threading.Event()
    honest = Tokenizer.encode

    def held(self: Tokenizer, text: str, *rest: Any, **options: Any) -> list[int]:
        assert len(text) < 1000 or gate.wait(20)
        return honest(self, text, *rest, **options)

    monkeypatch.setattr(Tokenizer, "encode", held)

    async def check(server: Server) -> None:
        long = {"model": MODEL, "prompt": "x" * 20_000}
        try:
            responses = await asyncio.gather(*(server.post(COMPLETIONS, long) for _ in range(3)))
        finally:
            gate.set()
        for response in responses:
            assert (
                response.status_code == 503
                and response.json()["error"]["code"] == "deadline_exceeded"
            )
        assert server.engine.requests == []
        await server.complete(max_tokens=1)

    run(check, request_timeout=0.3)
