"""Every request has one line in the log and an id in its response, whatever became of it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from moebius.errors import EngineError, OverloadError
from moebius.server.access import logfmt
from moebius.server.limits import HTTP_LIMITS
from server.serving import Server, engine, exchange, http_request, listening, run, wait_until

LOGGER = "moebius.server.access"
COMPLETIONS = "/v1/completions"
SECRET = "the prompt that nobody may log"


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, "moebius"):
        yield


def parsed(line: str) -> dict[str, str]:
    """A logfmt line as its readers take it: bare values, and quoted ones with the escapes that JSON
    has."""
    pairs = re.findall(r'(?:^| )(\w+)=("(?:[^"\\]|\\.)*"|[^ "=]+)', line)
    assert " ".join(f"{key}={value}" for key, value in pairs) == line, line
    assert line.isascii() and line.isprintable() and len(line) < 1000
    fields = {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}
    assert len(fields) == len(pairs)
    return fields


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, str]]:
    """All lines since the last time."""
    found = [parsed(record.getMessage()) for record in caplog.records if record.name == LOGGER]
    caplog.clear()
    return found


async def slow() -> AsyncIterator[bytes]:
    yield b"{"
    await asyncio.sleep(0.3)


JSON = {"Content-Type": "application/json"}
KEY = {"Authorization": "Bearer key"}
REFUSED: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "no such field": ({"json": {"prompt": SECRET, SECRET: 1}}, 400, COMPLETIONS, None),
    "no JSON": ({"content": SECRET, "headers": JSON}, 400, COMPLETIONS, None),
    "no key": (
        {"json": {}, "headers": {"Authorization": "Bearer x"}},
        401,
        COMPLETIONS,
        "invalid_api_key",
    ),
    "no such model": (
        {"json": {"prompt": SECRET, "model": SECRET}},
        404,
        COMPLETIONS,
        "model_not_found",
    ),
    "no such route": ({"url": "/nowhere", "json": {}}, 404, "other", "not_found"),
    "no such method": ({"method": "GET"}, 405, COMPLETIONS, "method_not_allowed"),
    "slow": ({"content": slow(), "headers": JSON}, 408, COMPLETIONS, "body_timeout"),
    "large": (
        {"content": b" " * (HTTP_LIMITS.body_bytes + 1), "headers": JSON},
        413,
        COMPLETIONS,
        "request_too_large",
    ),
    "no JSON by its type": ({"content": SECRET}, 415, COMPLETIONS, "unsupported_media_type"),
    "large headers": (
        {"headers": {"X": "x" * HTTP_LIMITS.header_bytes}},
        431,
        COMPLETIONS,
        "headers_too_large",
    ),
}


@pytest.mark.case("C20")
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_request_has_its_line(case: str, caplog: pytest.LogCaptureFixture) -> None:
    asked, status, route, code = REFUSED[case]

    async def check(server: Server) -> None:
        asking = {
            "method": "POST",
            "url": COMPLETIONS,
            **asked,
            "headers": {**KEY, **asked.get("headers", {})},
        }
        response = await server.http.request(**asking)
        assert response.status_code == status
        (line,) = lines(caplog)
        assert (line["status"], line["route"], line.get("code")) == (str(status), route, code)
        assert response.json()["error"]["code"] == code
        assert line["reason"] == (
            "invalid_request" if code in (None, "model_not_found") else "http"
        )
        assert line["method"] == asking["method"] and float(line["seconds"]) >= 0
        assert line["request_id"] == response.headers["x-request-id"]

    run(check, api_keys=("key",), body_timeout=0.1)
    assert SECRET not in caplog.text


@pytest.mark.case("C20")
def test_overload_failure_and_a_server_that_is_not_ready(caplog: pytest.LogCaptureFixture) -> None:
    async def check(server: Server) -> None:
        body = {"prompt": SECRET}
        assert (await server.post(COMPLETIONS, body)).status_code == 500
        (line,) = lines(caplog)
        assert (line["status"], line["code"], line["reason"]) == ("500", "internal_error", "error")
        assert line["error_id"] and line["call"].startswith("cmpl-") and line["end"] == "failed"
        server.engine.refuse = OverloadError("full", retry_after=1)
        assert (await server.post(COMPLETIONS, {**body, "stream": True})).status_code == 503
        (line,) = lines(caplog)
        assert (line["status"], line["code"], line["reason"]) == ("503", "overloaded", "overload")
        assert line["end"] == "refused"
        server.door.drain()
        for path in ("/health/ready", "/health"):
            assert (await server.http.get(path)).status_code == 503
            (line,) = lines(caplog)
            assert (line["status"], line["route"], line["code"]) == ("503", path, "draining")

    run(check, engine(fault=lambda request, step: EngineError(SECRET)))
    assert SECRET not in caplog.text


@pytest.mark.case("C20")
def test_an_error_inside_a_stream_and_a_client_that_left(caplog: pytest.LogCaptureFixture) -> None:
    fault = EngineError("x")
    fake = engine(
        step_seconds=0.01,
        fault=lambda request, step: fault if request.max_tokens == step + 4 else None,
    )
    body = {"prompt": SECRET, "stream": True, "ignore_eos": True}

    def last_line() -> dict[str, str]:
        wait_until(lambda: any(record.name == LOGGER for record in caplog.records))
        (line,) = lines(caplog)
        return line

    with listening(fake) as (port, door):
        failing = http_request(COMPLETIONS, {**body, "max_tokens": 7}, Connection="close")
        assert b'"code":"internal_error"' in exchange(port, failing)
        line = last_line()
        assert (line["status"], line["code"], line["end"]) == ("200", "internal_error", "failed")
        for stream, status in ((True, "200"), (False, "499")):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
                sock.sendall(
                    http_request(COMPLETIONS, {**body, "max_tokens": 300, "stream": stream})
                )
                wait_until(lambda: door.in_flight == 1)
                if stream:
                    sock.recv(100)
            line = last_line()
            assert (line["status"], line["end"], line["choices"]) == (status, "client_gone", "1")
            assert int(line["completion_tokens"]) < 300
    assert SECRET not in caplog.text


@pytest.mark.case("C20")
@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00\x01 nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * (HTTP_LIMITS.header_bytes + 1), 431),
    ],
    ids=["no HTTP", "endless headers"],
)
def test_what_never_became_a_request_has_its_line_too(
    data: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(engine()) as (port, door):
        answer = exchange(port, data)
        assert answer.startswith(b"HTTP/1.1 %d" % status)
        (line,) = lines(caplog)
        assert (line["status"], line["route"], line["reason"]) == (str(status), "other", "http")
        assert f"x-request-id: {line['request_id']}\r\n".encode() in answer.lower()
        page = door.metrics.exposition().decode()
        assert 'http_requests_total{handler="other",method="other",status="4xx"} 1.0' in page
        assert re.search(r'moebius_admission_rejections_total\{.*reason="http"} 1.0', page)


@pytest.mark.case("C20")
def test_answered_calls_have_the_same_form_and_probes_are_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check(server: Server) -> None:
        answer = await server.complete(prompt=SECRET, n=2, max_tokens=5, ignore_eos=True)
        (line,) = lines(caplog)
        assert line["call"] == answer["id"] and line["end"] == "finished"
        assert (line["status"], line["method"], line["route"]) == ("200", "POST", COMPLETIONS)
        counts = {
            name: int(line[name])
            for name in ("choices", "prompt_tokens", "cached_tokens", "completion_tokens")
        }
        usage = answer["usage"]
        assert counts == {
            "choices": 2,
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": 0,
            "completion_tokens": 10,
        }
        assert "code" not in line
        await server.stream("/v1/chat/completions", max_tokens=3)
        (line,) = lines(caplog)
        assert line["call"].startswith("chatcmpl-") and line["end"] == "finished"
        for path in ("/health/live", "/health/ready", "/metrics", "/v1/models"):
            assert (await server.http.get(path)).status_code == 200
        assert lines(caplog) == []

    run(check)
    assert SECRET not in caplog.text


@pytest.mark.case("C20")
@pytest.mark.parametrize(
    "path", ["/nowhere", "/v1/completion", "/a%0Astatus=200%1b[2J%22%5C", "/x/" + "long" * 200]
)
def test_a_404_names_its_path_on_one_bounded_line(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def check(server: Server) -> None:
        response = await server.http.get(f"{path}?key={SECRET}")
        message = response.json()["error"]["message"]
        assert response.status_code == 404 and message.isprintable() and len(message) < 250
        (line,) = lines(caplog)
        start = {"/a": "/a\nstatus=200\x1b[2J", "/x": "/x/longlong"}.get(path[:2], path)
        assert (
            line["path"].startswith(start) and len(line["path"]) <= 200 and line["status"] == "404"
        )
        assert path[:4].removesuffix("%0") in message
        wrong = await server.http.put("/v1/models")
        assert wrong.status_code == 405 and "PUT" in wrong.json()["error"]["message"]

    run(check)
    assert "key=" not in caplog.text


@pytest.mark.case("C20")
def test_the_clients_id_comes_back_if_it_is_fit_to_be_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def check(server: Server) -> None:
        async def given(*ids: str | bytes, path: str = "/v1/nowhere") -> str:
            headers = [
                (b"X-Request-Id", id if isinstance(id, bytes) else id.encode()) for id in ids
            ]
            response = await server.http.get(path, headers=headers)  # type: ignore[arg-type]
            assert response.headers.get_list("x-request-id") == [response.headers["x-request-id"]]
            if response.status_code != 200:
                assert lines(caplog)[-1]["request_id"] == response.headers["x-request-id"]
            return response.headers["x-request-id"]

        for fit in ("abc-123", "x" * 128, "a.B_c", "0"):
            assert await given(fit) == fit
            assert await given(fit, path="/health/live") == fit
        made = {
            await given(*ids)
            for ids in (
                (),
                ("x" * 129,),
                ("",),
                ("caf\u00e9",),
                (b"a\x7f",),
                ("a", "b"),
                ("a b",),
                ("a;",),
            )
        }
        assert len(made) == 8 and all(re.fullmatch(r"req-[0-9a-f]{24}", id) for id in made)
        headers = {"X-Request-Id": "mine"}
        for stream in (False, True):
            body = {"prompt": "x", "max_tokens": 2, "stream": stream}
            response = await server.post(COMPLETIONS, body, headers=headers)
            assert response.headers["x-request-id"] == "mine"
        assert {request.id[:5] for request in server.engine.requests} == {"cmpl-"}, (
            "ids are the server's"
        )
        assert {line["request_id"] for line in lines(caplog)} == {"mine"}

    run(check)


def test_what_fails_on_the_loop_is_logged_without_its_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """asyncio itself would show the arguments of a callback, and of an exception all that it
    says."""

    def broken(said: str) -> None:
        raise ValueError(said)

    async def forgotten(said: str) -> None:
        broken(said)

    def run_both(loop: asyncio.AbstractEventLoop) -> None:
        loop.create_task(forgotten(SECRET))
        broken(SECRET)

    with listening(engine()) as (_, door):
        loop = door._loop
        loop.call_soon_threadsafe(run_both, loop)
        wait_until(lambda: len(re.findall("in broken", caplog.text)) == 2)
    assert caplog.text.count("on the event loop: ValueError") == 2 and SECRET not in caplog.text
    assert {record.name for record in caplog.records} == {"moebius.server.run"}
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.case("C20")
def test_a_call_is_found_by_the_id_that_its_client_reads(caplog: pytest.LogCaptureFixture) -> None:
    async def check(server: Server) -> None:
        answer = await server.complete(max_tokens=1, request_id="mine-1")
        (line,) = lines(caplog)
        assert line["answer"] == answer["id"] == "cmpl-mine-1"
        assert line["call"] == server.engine.requests[0].id.removesuffix("-0000"), (
            "ids are the server's"
        )
        await server.complete(max_tokens=1)
        assert "answer" not in lines(caplog)[0]

    run(check)


def test_logfmt_quotes_what_would_break_a_line() -> None:
    texts = {"a": "plain/1.0", "b": "two words", "c": 'q"=\\', "d": "\n\r\x00\x7f\u2028é", "e": ""}
    line = logfmt({**texts, "f": None, "g": 1.23456})
    assert parsed(line) == {**texts, "g": "1.235"}
    assert len(logfmt({"x": "\U0001f600" * 10_000})) < 3000
