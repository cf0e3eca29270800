"""Web pages of other origins: what a browser asks before it lets a page call, and what it wants to
see after."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from moebius.errors import ConfigError
from moebius.server.settings import ServerSettings
from server.serving import MODEL, Server, engine, exchange, listening, run, wait_until

PAGE = "https://chat.example.com"
OTHER = "https://other.example.com"
COMPLETIONS = "/v1/completions"
BODY = {"model": MODEL, "prompt": "x", "max_tokens": 2}
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


async def preflight(
    server: Server, origin: str, path: str = COMPLETIONS, **more: str
) -> httpx.Response:
    return await server.http.options(path, headers={"Origin": origin, **PREFLIGHT, **more})


def names(value: str) -> set[str]:
    return {name.strip().lower() for name in value.split(",")}


@pytest.mark.case("C7")
def test_a_preflight_of_an_allowed_origin_needs_no_key() -> None:
    async def check(server: Server) -> None:
        for path in (COMPLETIONS, "/v1/chat/completions", "/v1/models", "/metrics"):
            response = await preflight(server, PAGE, path)
            assert response.status_code == 204 and response.content == b""
            assert response.headers["access-control-allow-origin"] == PAGE
            assert {"get", "post"} <= names(response.headers["access-control-allow-methods"])
            assert names(response.headers["access-control-allow-headers"]) == {
                "authorization",
                "content-type",
            }
            assert {"origin", "access-control-request-headers"} <= names(response.headers["vary"])
            assert "access-control-allow-credentials" not in response.headers
        # The official client for browsers sends these.
        asked = "authorization,content-type,x-stainless-os,x-stainless-lang"
        response = await preflight(server, PAGE, **{"Access-Control-Request-Headers": asked})
        assert names(response.headers["access-control-allow-headers"]) == names(asked)
        response = await server.http.options(COMPLETIONS, headers={"Origin": PAGE})
        assert response.status_code == 204
        response = await preflight(
            server, PAGE, **{"Access-Control-Request-Private-Network": "true"}
        )
        assert response.headers["access-control-allow-private-network"] == "true"

    run(check, api_keys=("k",), cors_origins=(PAGE, "http://localhost:3000"))


@pytest.mark.case("C7")
@pytest.mark.parametrize("origins", [(), (PAGE,)])
@pytest.mark.parametrize(
    "origin", [OTHER, "null", PAGE + ".evil.com", PAGE.upper(), "http://chat.example.com", ""]
)
def test_the_refusal_of_any_other_origin_names_the_option(
    origins: tuple[str, ...], origin: str
) -> None:
    async def check(server: Server) -> None:
        response = await preflight(server, origin)
        error = response.json()["error"]
        assert response.status_code == 403 and error["code"] == "origin_not_allowed"
        assert "--cors-origin" in error["message"] and origin[:40] in error["message"]
        assert not any(name.startswith("access-control") for name in response.headers)
        assert b'reason="http"} 1.0' in server.door.metrics.exposition()

    run(check, api_keys=("k",), cors_origins=origins)


@pytest.mark.case("C7")
def test_every_answer_to_an_allowed_origin_says_so() -> None:
    """An answer, a stream and errors of each kind: a page could not read the error otherwise."""

    async def check(server: Server) -> None:
        key = {"Authorization": "Bearer k"}
        cases: list[tuple[int, dict[str, Any], dict[str, str]]] = [
            (200, BODY, key),
            (200, {**BODY, "stream": True}, key),
            (400, {**BODY, "n": 0}, key),
            (404, {**BODY, "model": "gpt"}, key),
            (401, BODY, {}),
            (503, BODY, key),
        ]
        for status, body, headers in cases:
            if status == 503:
                server.door.drain()
            response = await server.post(COMPLETIONS, body, headers={**headers, "Origin": PAGE})
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == PAGE
            assert "origin" in names(response.headers["vary"])
            assert "retry-after" in names(response.headers["access-control-expose-headers"])
        for origin in ({"Origin": OTHER}, {}):
            response = await server.http.get("/v1/models", headers={**key, **origin})
            assert (
                response.status_code == 200
                and "access-control-allow-origin" not in response.headers
            )
            assert response.headers["vary"] == "Origin"

    run(check, api_keys=("k",), cors_origins=(PAGE,))


@pytest.mark.case("C7")
@pytest.mark.parametrize("origin", [PAGE, "null", "http://localhost:3000"])
def test_a_star_allows_any_origin(origin: str) -> None:
    async def check(server: Server) -> None:
        for response in (
            await preflight(server, origin),
            await server.post(COMPLETIONS, BODY, headers={"Origin": origin}),
        ):
            assert response.status_code in (200, 204)
            assert response.headers["access-control-allow-origin"] == "*"

    run(check, cors_origins=("*",))


@pytest.mark.case("C7")
def test_pages_from_files_have_an_origin_too() -> None:
    async def check(server: Server) -> None:
        assert (await preflight(server, "null")).headers["access-control-allow-origin"] == "null"

    run(check, cors_origins=("null",))


@pytest.mark.case("C7")
def test_nothing_is_added_where_the_option_is_not_given() -> None:
    async def check(server: Server) -> None:
        response = await server.post(COMPLETIONS, BODY, headers={"Origin": PAGE})
        assert response.status_code == 200
        assert not {
            name for name in response.headers if name.startswith("access-control") or name == "vary"
        }

    run(check)


@pytest.mark.case("C7")
def test_a_page_that_is_closed_is_noticed() -> None:
    fake = engine(step_seconds=0.02)
    with listening(fake, cors_origins=(PAGE,)) as (port, door):
        body = {**BODY, "max_tokens": 400, "stream": True, "ignore_eos": True}
        url = f"http://127.0.0.1:{port}{COMPLETIONS}"
        with httpx.stream("POST", url, json=body, headers={"Origin": PAGE}) as response:
            assert response.headers["access-control-allow-origin"] == PAGE
            next(response.iter_raw())
        wait_until(lambda: door.in_flight == 0 and fake.idle)
        assert max(fake.drawn.values()) < 100


@pytest.mark.case("C7")
@pytest.mark.parametrize(
    "origin, hint",
    [
        ("https://chat.example.com/", "scheme://host"),
        ("chat.example.com", "scheme://host"),
        ("https://a.example https://b.example", "scheme://host"),
        ("https://*.example.com", "scheme://host"),
        ("https://Chat.Example.com", "https://chat.example.com"),
        ("https://chat.example.com:443", ":443"),
        ("http://chat.example.com:80", ":80"),
        ("", "scheme://host"),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(origin: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        ServerSettings(("m",), cors_origins=(origin,))
    assert hint in str(error.value) and repr(origin) in str(error.value)


@pytest.mark.case("C7")
@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "http://[::1]:8080", "app://obsidian.md", "null", "*"]
)
def test_origins_that_browsers_send(origin: str) -> None:
    assert ServerSettings(("m",), cors_origins=(origin,)).cors_origins == (origin,)


@pytest.mark.case("C7")
@pytest.mark.parametrize(
    ("origins", "expected"), [(("*",), b"*"), (("https://page.example",), None)]
)
def test_a_page_reads_why_it_never_had_a_request(
    origins: tuple[str, ...], expected: bytes | None
) -> None:
    """Where any page may; of a refusal without a request it is not known which page asked."""
    with listening(engine(), cors_origins=origins) as (port, _):
        head, _, _ = exchange(port, b"no HTTP\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert fields.get(b"access-control-allow-origin") == expected
    assert (b"access-control-expose-headers" in fields) == (expected is not None)
