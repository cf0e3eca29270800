"""What clients find out before they ask: models, methods, whether the server is there."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import anthropic
import httpx
import openai
import pytest

from moebius.server.gate import LIVE
from server.serving import MODEL, Server, engine, listening, run


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with listening(engine("hi")) as (port, _):
        yield f"http://127.0.0.1:{port}"


def test_openais_client_reads_the_list(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        page = client.models.list()
        assert [model.id for model in page] == [MODEL, "alias"]
        assert client.models.retrieve("alias").object == "model"


def test_anthropics_client_reads_the_same_list(url: str) -> None:
    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        models = list(client.models.list())
        assert [(model.id, model.type) for model in models] == [
            (MODEL, "model"),
            ("alias", "model"),
        ]
        one = client.models.retrieve(MODEL)
    assert one.display_name == MODEL and one.max_input_tokens == 512
    assert isinstance(one.created_at, datetime)
    assert abs((datetime.now(UTC) - one.created_at).total_seconds()) < 3600


def test_codex_finds_its_own_list(url: str) -> None:
    found = httpx.get(f"{url}/v1/models?client_version=1.2.3").json()
    assert found["models"] == []


def test_a_model_need_not_be_named(url: str) -> None:
    body = {"prompt": "x"}
    answers = [
        httpx.post(f"{url}/v1/completions", json=body | named).json()["model"]
        for named in ({}, {"model": None}, {"model": "alias"})
    ]
    assert answers == [MODEL, MODEL, "alias"]


def test_every_route_answers_head_and_options() -> None:
    async def check(server: Server) -> None:
        for route in server.app.routes:
            path = route.path.replace("{id:path}", MODEL)
            options = await server.http.options(path)
            assert (options.status_code, options.content) == (204, b"")
            allowed = set(options.headers["allow"].split(", "))
            assert allowed >= {"HEAD", "OPTIONS"} and allowed & {"GET", "POST"}
            head = await server.http.head(path)
            assert head.content == b""
            if path == LIVE:  # whose body has no end
                assert head.headers["content-type"].startswith("text/event-stream")
            elif "GET" in allowed:
                got = await server.http.get(path)
                assert head.status_code == got.status_code
                assert head.headers["content-type"] == got.headers["content-type"]
            else:
                assert (head.status_code, head.headers["allow"]) == (200, options.headers["allow"])
            refused = await server.http.request("PATCH", path)
            assert refused.status_code == 405
            assert set(refused.headers["allow"].split(", ")) == allowed

    run(check)


def test_ping_says_whether_the_server_is_ready() -> None:
    async def check(server: Server) -> None:
        assert (await server.http.get("/ping")).status_code == 200
        server.engine.ready = False
        assert (await server.http.get("/ping")).status_code == 503
        assert (await server.http.post("/ping")).status_code == 503

    run(check)


@pytest.mark.parametrize("key", ["", "Bearer wrong"])
def test_options_needs_the_key_where_there_is_one(key: str) -> None:
    async def check(server: Server) -> None:
        headers = {"Authorization": key} if key else {}
        assert (await server.http.options("/v1/models", headers=headers)).status_code == 401

    run(check, api_keys=("secret",))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nowhere", "/v1/completions"])
def test_an_id_of_the_clients_is_on_every_answer(url: str, path: str) -> None:
    for mine, comes_back in (("abc-1.2_3", True), ("a b", False), ("x" * 129, False)):
        response = httpx.get(url + path, headers={"X-Request-Id": mine})
        assert (response.headers["x-request-id"] == mine) is comes_back
