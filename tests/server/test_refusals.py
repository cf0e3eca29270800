"""What a client hears where the engines' queues are full, on every route that computes: before
anything is made of its body, and whatever the engine does."""

from __future__ import annotations

import json
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from moebius.errors import OverloadError
from server.serving import MODEL, Server, engine, listening, run

HELLO = [{"role": "user", "content": "hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": "hello"},
    "/v1/chat/completions": {"model": MODEL, "messages": HELLO},
    "/v1/responses": {"model": MODEL, "input": "hello"},
    "/v1/messages": {"model": MODEL, "max_tokens": 5, "messages": HELLO},
    "/api/chat": {"model": MODEL, "messages": HELLO},
    "/api/generate": {"model": MODEL, "prompt": "hello"},
}
WORDS = "the queue is full: 4 of 4 requests and 9 of 99 tokens wait; try again later"


def full(account: str) -> OverloadError:
    return OverloadError(WORDS, retry_after=6.2)


def shape(path: str, request_id: str) -> dict[str, Any]:
    """The error as the clients of a route know it."""
    if path.startswith("/api"):
        return {"error": WORDS}
    if path == "/v1/messages":
        error = {"type": "overloaded_error", "message": WORDS}
        return {"type": "error", "error": error, "request_id": request_id}
    openai = {"message": WORDS, "type": "server_error", "param": None, "code": "overloaded"}
    return {"error": openai}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_full_queue_is_told_in_each_apis_words(path: str, stream: bool) -> None:
    """The engine makes no step at all."""

    async def check(server: Server) -> None:
        server.engine.gate.clear()
        server.door.refusal = full
        response = await server.post(path, {**BODIES[path], "stream": stream})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "7"
        assert response.json() == shape(path, response.headers["x-request-id"])
        assert server.engine.requests == []
        server.engine.gate.set()
        server.door.refusal = lambda account: None
        assert (await server.post(path, BODIES[path])).status_code == 200

    run(check)


@pytest.mark.parametrize("path", [path for path in BODIES if not path.startswith("/api")])
def test_nothing_is_made_of_the_body(path: str) -> None:
    """It may as well be none. Ollama's routes read theirs first: what loads a model computes
    nothing."""

    async def check(server: Server) -> None:
        server.door.refusal = full
        headers = {"Content-Type": "application/json"}
        response = await server.http.post(path, content=b"{no JSON", headers=headers)
        assert response.status_code == 503

    run(check)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "hello"}),
        ("/v1/messages/count_tokens", BODIES["/v1/messages"]),
        ("/v1/responses/input_tokens", BODIES["/v1/responses"]),
        ("/api/chat", {"model": MODEL, "messages": []}),
        ("/api/generate", {"model": MODEL}),
        ("/api/show", {"model": MODEL}),
    ],
)
def test_what_needs_no_engine_is_answered(path: str, body: dict[str, Any]) -> None:
    async def check(server: Server) -> None:
        server.door.refusal = full
        assert (await server.post(path, body)).status_code == 200

    run(check)


def test_refusals_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def check(server: Server) -> None:
        server.door.refusal = full
        for path, body in BODIES.items():
            await server.post(path, body)
        metrics = (await server.http.get("/metrics")).text
        found = [line for line in metrics.splitlines() if 'reason="overload"' in line]
        assert {line.rsplit(" ", 1)[1] for line in found} == {f"{len(BODIES)}.0"}

    with caplog.at_level("INFO"):
        run(check)
    lines = [line for line in caplog.messages if "reason=overload" in line]
    for path, line in zip(BODIES, lines, strict=True):
        assert line.startswith(f"status=503 method=POST route={path} code=overloaded")


def test_whose_request_it_is_is_asked_by_the_keys_account(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[crowd]\nkey = "k-crowd"\n[one]\nkey = "k-one"\n')
    keys.chmod(0o600)
    asked: list[str] = []

    def refusal(account: str) -> OverloadError | None:
        asked.append(account)
        return full(account) if account == asked[0] else None

    async def check(server: Server) -> None:
        server.door.refusal = refusal
        for key, status in (("k-crowd", 503), ("k-one", 200), ("k-crowd", 503)):
            headers = {"Authorization": f"Bearer {key}"}
            response = await server.post("/v1/completions", {"prompt": "x"}, headers=headers)
            assert response.status_code == status
        assert len(set(asked)) == 2

    run(check, api_keys_file=keys)


def test_a_refused_clients_connection_can_be_used_again() -> None:
    """A small body has been read; what is left of a large one is not waited for."""
    fake = engine()
    with listening(fake) as (port, door), closing(HTTPConnection("127.0.0.1", port)) as client:
        door.refusal = full
        for prompt, says in (("hello", None), ("hello", None), ("x" * 100_000, "close")):
            body = json.dumps({"prompt": prompt})
            client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = client.getresponse()
            assert (response.status, response.getheader("connection")) == (503, says)
            response.read()
