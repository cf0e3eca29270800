"""API keys, limits of headers and bodies, and what separates tenants' prefix caches."""

from __future__ import annotations

import asyncio
import gzip
import hmac
from collections.abc import AsyncIterator
from typing import Any

import pytest

from moebius.errors import ConfigError
from moebius.server.access import AccessLog
from moebius.server.gate import Gate
from moebius.server.keys import KeyRing
from moebius.server.limits import HTTP_LIMITS
from moebius.server.settings import ServerSettings
from server.serving import MODEL, Server, run

KEYS = ("key-one", "key-two")
ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/health"),
    ("GET", "/health/ready/"),
    ("GET", "/metrics"),
    ("GET", "/v1/moe/stats"),
    ("GET", "/version"),
    ("GET", "/nowhere"),
    ("GET", "/health/live/"),
    ("GET", "/health/live/../metrics"),
    ("GET", "//health/live"),
    ("GET", "/health%2Flive"),
    ("GET", "/health/liv%65"),
    ("GET", "/HEALTH/LIVE"),
]


def test_every_route_but_four_needs_a_key_on_the_raw_path() -> None:
    async def check(server: Server) -> None:
        for method, path in ROUTES:
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Bearer "},
                {"Authorization": "Basic key-one"},
                {"Authorization": "key-one"},
                {"X-Api-Key": "wrong"},
                {"X-Api-Key": ""},
            ):
                response = await server.http.request(method, path, headers=headers)
                assert response.status_code == 401, (path, headers)
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        twice = [("Authorization", "Bearer wrong"), ("Authorization", "Bearer key-one")]
        assert (await server.http.get("/v1/models", headers=twice)).status_code == 401
        for path in ("/health/live", "/health/ready", "/openapi.json", "/docs"):
            assert (await server.http.get(path)).status_code == 200

    run(check, api_keys=KEYS)


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", "Bearer key-one")],
        [("Authorization", "Bearer key-two")],
        [("Authorization", "bearer  key-two")],
        [("X-Api-Key", "key-one")],
        [("x-api-key", " key-two ")],
        [("x-api-key", "key-one"), ("Authorization", "Bearer key-one")],
        [("Authorization", "Bearer key-one"), ("Authorization", "Bearer key-one")],
    ],
)
def test_each_key_opens(headers: list[tuple[str, str]]) -> None:
    async def check(server: Server) -> None:
        assert (await server.http.get("/v1/models", headers=headers)).status_code == 200

    run(check, api_keys=KEYS)


def test_keys_that_differ_open_nothing() -> None:
    """Each of them known: whose request it is could not be said."""
    one, two = ("Bearer key-one", "key-two")

    async def check(server: Server) -> None:
        for headers in (
            [("Authorization", one), ("x-api-key", two)],
            [("x-api-key", two), ("Authorization", one)],
            [("x-api-key", "key-one"), ("x-api-key", two)],
            [("Authorization", "Basic key-one"), ("x-api-key", "key-one")],
        ):
            assert (await server.http.get("/v1/models", headers=headers)).status_code == 401

    run(check, api_keys=KEYS)


def test_every_known_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    honest = hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return honest(a, b)

    monkeypatch.setattr("moebius.server.keys.hmac.compare_digest", noted)

    async def check(server: Server) -> None:
        for key in ("key-one", "key-two", "x", "key-onf", "k" * 500):
            compared.clear()
            await server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert compared == [(32, 32)] * len(KEYS)

    run(check, api_keys=KEYS)


def test_tenants_and_salts_have_caches_of_their_own() -> None:
    async def check(server: Server) -> None:
        salts: dict[tuple[str, str | None], bytes] = {}
        for key in KEYS:
            for salt in (None, "a", "b"):
                headers = {"Authorization": f"Bearer {key}"}
                body = {"model": MODEL, "prompt": "x", "cache_salt": salt, "max_tokens": 1}
                for _ in range(2):
                    response = await server.post("/v1/completions", body, headers=headers)
                    assert response.status_code == 200
                    found = server.engine.requests[-1].salt
                    assert salts.setdefault((key, salt), found) == found
        assert len(set(salts.values())) == 6
        assert all(salts.values()) and not any(
            key.encode() in salt for salt in salts.values() for key in KEYS
        )

    run(check, api_keys=KEYS)


def test_an_open_server_has_one_cache_unless_a_client_salts() -> None:
    async def check(server: Server) -> None:
        await server.complete()
        await server.complete(cache_salt="a")
        plain, salted = [request.salt for request in server.engine.requests]
        assert plain == b"" and len(salted) == 32

    run(check)


def test_header_and_path_limits() -> None:
    async def check(server: Server) -> None:
        over = "x" * HTTP_LIMITS.header_bytes
        for response in (
            await server.http.get("/v1/models", headers={"X-Big": over}),
            await server.http.get("/v1/models/" + over),
            await server.http.get("/v1/models?" + over),
        ):
            assert response.status_code == 431
            assert response.json()["error"]["type"] == "invalid_request_error"

    run(check)


def test_body_limit_whether_the_length_is_told_or_not() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 2**20

    async def check(server: Server) -> None:
        headers = {"Content-Type": "application/json"}
        for content in (b" " * (HTTP_LIMITS.body_bytes + 1), endless()):
            response = await server.http.post("/v1/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
            assert response.headers["connection"] == "close"

    run(check)


def test_a_large_body_within_the_limit_is_read() -> None:
    async def check(server: Server) -> None:
        body = {"prompt": "hello", "max_tokens": 1, "user": "x" * (HTTP_LIMITS.body_bytes - 100)}
        assert (await server.post("/v1/completions", body)).status_code == 200

    run(check)


def test_only_json_is_read() -> None:
    async def check(server: Server) -> None:
        for headers in (
            {},
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/x-www-form-urlencoded"},
        ):
            response = await server.http.post(
                "/v1/completions", content=b'{"prompt": "x"}', headers=headers
            )
            assert response.status_code == 415
        for coding in ("gzip", "br, gzip", "deflate", "zstd"):
            headers = {"Content-Type": "application/json", "Content-Encoding": coding}
            response = await server.http.post(
                "/v1/completions", content=gzip.compress(b"{}"), headers=headers
            )
            assert response.status_code == 415 and response.headers["accept-encoding"] == "identity"
            assert "sent as it is, not compressed" in response.json()["error"]["message"]
        headers = {
            "Content-Type": "Application/JSON; charset=utf-8",
            "Content-Encoding": "identity",
        }
        response = await server.http.post(
            "/v1/completions", content=b'{"prompt": "x"}', headers=headers
        )
        assert response.status_code == 200

    run(check)


def test_a_slow_body_and_one_that_breaks_off() -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(0.3)
        yield b"}"

    async def check(server: Server) -> None:
        headers = {"Content-Type": "application/json"}
        response = await server.http.post("/v1/completions", content=slow(), headers=headers)
        assert response.status_code == 408

    run(check, body_timeout=0.1)


def test_a_response_that_breaks_off_is_not_answered_twice() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("secret")

    async def send(message: Any) -> None:
        sent.append(message)

    class Metrics:
        def rejected(self, reason: str) -> None: ...
        def answered(self, method: str, handler: str, status: int) -> None: ...

    scope = {"type": "http", "headers": [], "raw_path": b"/", "query_string": b""}
    guard = Gate(app, KeyRing(), AccessLog(Metrics(), ()))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="broke off"):
        asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    assert len(sent) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"served_model_names": ()},
        {"served_model_names": ("",)},
        {"api_keys": ("",)},
        {"api_keys": ("a b",)},
        {"api_keys": ("ü",)},
        {"unknown_fields": "ignore"},
        {"keep_alive": 0},
        {"request_timeout": float("inf")},
        {"stream_buffer_bytes": 10},
    ],
)
def test_settings_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerSettings(**{"served_model_names": ("m",), **change})
