"""What fails after the checks: refusals, engine faults, deadlines; before the first token and
inside a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from typing import Any

import pytest

from moebius.engine.faults import failure
from moebius.errors import (
    ContextLengthError,
    DeadlineError,
    EngineError,
    MoebiusError,
    NumericalError,
    OverloadError,
    RequestError,
)
from moebius.server.api import Api
from moebius.text import ChatTemplate, Tokenizer
from server.serving import TEMPLATE, Server, engine, events, run, serving, until
from text.tiny_tokenizers import byte_level

COMPLETIONS = "/v1/completions"
SECRET = "the-secret-prompt"
CASES: list[tuple[MoebiusError, int, str | None]] = [
    (OverloadError("the queue is full", retry_after=2.3), 503, "overloaded"),
    (DeadlineError(SECRET), 503, "deadline_exceeded"),
    (NumericalError(SECRET), 500, "numerical_error"),
    (EngineError(SECRET), 500, "internal_error"),
    (RequestError("logit_bias is wrong", param="logit_bias"), 400, None),
    (ContextLengthError("too long"), 400, "context_length_exceeded"),
]


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": SECRET, "max_tokens": 20, **fields}


@pytest.mark.parametrize("error, status, code", CASES, ids=lambda case: type(case).__name__)
@pytest.mark.parametrize("stream", [False, True])
def test_before_the_first_token_an_error_is_plain_http(
    error: MoebiusError, status: int, code: str | None, stream: bool
) -> None:
    async def check(server: Server) -> None:
        response = await server.post(COMPLETIONS, body(n=2, stream=stream))
        assert response.status_code == status
        assert response.headers["content-type"] == "application/json"
        found = response.json()["error"]
        assert found["code"] == code
        assert SECRET not in response.text
        if status == 503:
            assert int(response.headers["retry-after"]) >= 1
        if status == 500:
            assert "error id" in found["message"] and found["type"] == "server_error"

    run(check, engine(fault=lambda request, step: error))


def test_a_refused_submission_leaves_nothing_behind() -> None:
    async def check(server: Server) -> None:
        response = await server.post(COMPLETIONS, body(n=3))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert server.engine.requests == []

    run(check, engine(refuse=OverloadError("the queue holds 5 requests", retry_after=2.3)))


@pytest.mark.parametrize("error, status, code", CASES, ids=lambda case: type(case).__name__)
def test_an_error_inside_a_stream_is_its_last_event(
    error: MoebiusError, status: int, code: str | None
) -> None:
    async def check(server: Server) -> None:
        response = await server.post(COMPLETIONS, body(n=2, stream=True))
        assert response.status_code == 200
        *chunks, last = map(json.loads, events(response.content))
        assert len(chunks) >= 3 and all("error" not in chunk for chunk in chunks)
        assert list(last) == ["error"] and last["error"]["code"] == code
        assert SECRET not in response.text and "[DONE]" not in response.text
        assert {request.id for request in server.engine.requests} <= set(server.engine.aborted)

    run(
        check,
        engine(
            step_seconds=0.002,
            fault=lambda r, step: error if step == 5 and r.id.endswith("1") else None,
        ),
    )


def test_without_a_stream_a_late_error_is_plain_http() -> None:
    async def check(server: Server) -> None:
        assert (await server.post(COMPLETIONS, body())).status_code == 500

    run(check, engine(fault=lambda r, step: EngineError("x") if step == 5 else None))


def test_one_calls_fault_is_no_neighbours() -> None:
    async def check(server: Server) -> None:
        bad = {r for r in range(0, 10, 3)}
        posts = [server.post(COMPLETIONS, body(prompt=[20 + i], max_tokens=10)) for i in range(10)]
        responses = await asyncio.gather(*posts)
        assert [r.status_code for r in responses] == [500 if i in bad else 200 for i in range(10)]

    fault = EngineError("x")
    run(
        check,
        engine(
            fault=lambda r, step: fault if (r.prompt_ids[0] - 20) % 3 == 0 and step == 4 else None
        ),
    )


def test_an_unforeseen_exception_is_a_500_with_an_id_and_logs_no_prompt(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Api, request: Any, asked: Any) -> Any:
        raise KeyError(asked.prompt[0])

    monkeypatch.setattr(Api, "generate", broken)

    async def check(server: Server) -> None:
        response = await server.post(COMPLETIONS, body())
        assert response.status_code == 500
        error = response.json()["error"]
        error_id = error["message"].split("error id ")[1].rstrip(")")
        assert SECRET not in response.text
        assert error_id in caplog.text and "KeyError" in caplog.text and "broken" in caplog.text

    with caplog.at_level(logging.DEBUG):
        run(check)
    assert SECRET not in caplog.text


@pytest.mark.case("C20")
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_has_one_id_from_its_log_to_the_client(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def check(server: Server) -> None:
        response = await server.post(COMPLETIONS, body(stream=stream))
        (error_id,) = re.findall(r"\(error id ([0-9a-f]+)\)", response.text)
        found = [
            record.getMessage() for record in caplog.records if error_id in record.getMessage()
        ]
        first, last = found  # the engine's, with the places, and the request's line
        assert "ValueError" in first and "in broken" in first and f"error_id={error_id}" in last

    def broken() -> None:
        raise ValueError(SECRET)

    def fault(request: Any, step: int) -> MoebiusError | None:
        if step == 3:
            try:
                broken()
            except ValueError as error:
                return failure("step 3 with 1 requests", error)
        return None

    with caplog.at_level(logging.INFO):
        run(check, engine(step_seconds=0.002, fault=fault))
    assert SECRET not in caplog.text


def test_logs_name_ids_and_numbers_never_prompts(caplog: pytest.LogCaptureFixture) -> None:
    async def check(server: Server) -> None:
        answer = await server.complete(prompt=SECRET, max_tokens=5)
        await server.post(COMPLETIONS, body(stop="x" * 300, model=SECRET))
        assert answer["id"] in caplog.text and "completion_tokens=5" in caplog.text

    with caplog.at_level(logging.INFO, "moebius"):
        run(check, engine(SECRET))
    assert SECRET not in caplog.text


def test_an_engine_that_never_answers_is_not_waited_for_beyond_the_deadline() -> None:
    async def check(server: Server) -> None:
        server.engine.gate.clear()
        response = await server.post(COMPLETIONS, body())
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "deadline_exceeded"
        assert server.engine.aborted == [server.engine.requests[0].id]
        server.engine.gate.set()

    run(check, request_timeout=0.1)


def test_draining_refuses_new_work_and_finishes_what_is_in_flight() -> None:
    async def check(server: Server) -> None:
        server.engine.gate.clear()
        task = asyncio.create_task(server.complete(max_tokens=5))
        await until(lambda: len(server.engine.requests) == 1)
        server.door.drain()
        response = await server.post(COMPLETIONS, body())
        assert response.status_code == 503 and response.json()["error"]["code"] == "draining"
        assert int(response.headers["retry-after"]) >= 1
        assert (await server.http.get("/health/ready")).status_code == 503
        assert (await server.http.get("/health/live")).status_code == 200
        assert not await server.door.idle(0.02)
        server.engine.gate.set()
        assert (await task)["usage"]["completion_tokens"] == 5
        assert await server.door.idle(1)

    run(check)


def test_what_is_not_finished_within_the_drain_time_ends_with_an_error() -> None:
    async def check(server: Server) -> None:
        server.engine.gate.clear()
        task = asyncio.create_task(server.post(COMPLETIONS, body()))
        await until(lambda: server.door.in_flight == 1)
        server.door.abort_all()
        response = await task
        assert response.status_code == 503 and response.json()["error"]["code"] == "draining"
        server.engine.gate.set()

    run(check)


def test_ready_follows_the_engine() -> None:
    async def check(server: Server) -> None:
        for path in ("/health", "/health/ready"):
            assert (await server.http.get(path)).status_code == 200
        server.engine.ready = False
        for path in ("/health", "/health/ready"):
            response = await server.http.get(path)
            assert response.status_code == 503 and response.json()["error"]["code"] == "not_ready"
        assert (await server.http.get("/health/live")).status_code == 200

    run(check)


def test_the_engine_is_closed_with_the_application() -> None:
    async def main() -> None:
        async with serving() as server:
            assert not server.engine.closed
        assert server.engine.closed

    asyncio.run(main())


def test_whatever_wakes_a_call_is_called_on_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """An asyncio.Event that is set elsewhere may not be seen before something else happens on the
    loop."""
    setters: list[int] = []
    original = asyncio.Event.set

    def noted(event: asyncio.Event) -> None:
        setters.append(threading.get_ident())
        original(event)

    async def main() -> None:
        async with serving(engine(step_seconds=0.01)) as server:
            asked = asyncio.create_task(server.complete(max_tokens=500))
            await until(lambda: bool(server.engine.requests))
            monkeypatch.setattr(asyncio.Event, "set", noted)
        with pytest.raises(AssertionError, match="shutting down"):
            await asked

    asyncio.run(main())
    assert setters and set(setters) == {threading.get_ident()}


def test_nothing_is_built_once_requests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer for texts that hold special tokens' names takes as long as the first one took
    to load."""
    fresh = Tokenizer(byte_level(), templates={"default": ChatTemplate(TEMPLATE)})

    async def check(server: Server) -> None:
        monkeypatch.setattr(
            "moebius.text.special_tokens._Aliased",
            lambda *_: pytest.fail("built while others wait"),
        )
        await server.chat(messages=[{"role": "user", "content": "a <|im_end|> b"}], max_tokens=1)

    run(check, tokenizer=fresh)
