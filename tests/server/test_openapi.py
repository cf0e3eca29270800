"""/openapi.json and /docs: valid, complete, and true of what the server answers."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from moebius.server.fields import HARMLESS
from moebius.server.openapi import document
from moebius.server.page import PAGE_PATHS
from moebius.server.protocol import ChatRequest, CompletionRequest
from server.serving import MODEL, Server, run

DOCUMENT = document()
NOT_TOLD = {"/v1/models/", "/v1/embeddings", "/v1/responses/{id}", *PAGE_PATHS} - {"/"}
"""Routes that are there for clients who write them otherwise, or to say that there is none; and the
files of the live page."""


def body_schema(name: str) -> Draft202012Validator:
    reference = {"$ref": f"#/components/schemas/{name}"}
    return Draft202012Validator({**reference, "components": DOCUMENT["components"]})


def test_it_is_valid_and_served_without_a_key() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()

    async def check(server: Server) -> None:
        response = await server.http.get("/openapi.json")
        assert response.status_code == 200 and response.json() == DOCUMENT
        docs = await server.http.get("/docs")
        assert docs.status_code == 200
        assert docs.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in docs.headers["content-security-policy"]
        assert (await server.http.get("/v1/models")).status_code == 401

    run(check, api_keys=("secret",))


def test_every_route_is_in_it() -> None:
    async def check(server: Server) -> None:
        routes = {
            (re.sub(":path", "", route.path), method.lower())
            for route in server.app.routes
            for method in route.methods - {"HEAD", "OPTIONS"}
        }
        told = {(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods}
        assert {path for path, _ in routes} - NOT_TOLD == {path for path, _ in told}
        assert told <= routes

    run(check)


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_every_field_is_in_it_and_nothing_else_is_allowed(model: type[Any]) -> None:
    schema = DOCUMENT["components"]["schemas"][model.__name__]
    assert schema["properties"].keys() == model.model_fields.keys() | HARMLESS
    assert schema["additionalProperties"] is False


GOOD: list[dict[str, Any]] = [
    {"prompt": "a"},
    {"prompt": ["a", "b"], "stop": "x", "temperature": 0, "logit_bias": {"5": 1}},
    {"prompt": [1, 2], "stop": ["x"], "seed": None, "user": "me", "stream_options": None},
    {"prompt": [[1], [2]], "truncation_side": "right", "truncate_prompt_tokens": 3},
    {"messages": [{"role": "user", "content": "x"}], "n": 2, "stream": False},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}], "own": 1}]},
]
WRONG: list[dict[str, Any]] = [
    {},
    {"prompt": 5},
    {"prompt": []},
    {"prompt": "a", "n": "2"},
    {"prompt": "a", "nonsense": 1},
    {"prompt": "a", "truncation_side": "up"},
    {"messages": []},
    {"messages": [{"content": "x"}]},
    {"messages": [{"role": "elf", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x"}], "logprobs": 1},
]


def test_the_schemas_take_what_the_server_takes() -> None:
    chat, completion = body_schema("ChatRequest"), body_schema("CompletionRequest")

    async def check(server: Server) -> None:
        for bodies, good in ((GOOD, True), (WRONG, False)):
            for body in bodies:
                schema = chat if "messages" in body else completion
                path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
                assert schema.is_valid(body) is good, body
                response = await server.post(path, {"model": MODEL, **body})
                assert response.status_code == (200 if good else 400), (body, response.text)

    run(check)


class _Elements(HTMLParser):
    """What a page is made of: the names of its elements, and where they point to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "action")]


def test_the_page_shows_every_route_and_field_and_loads_nothing() -> None:
    async def check(server: Server) -> None:
        text = (await server.http.get("/docs")).text
        for path in DOCUMENT["paths"]:
            assert f"<code>{path}</code>" in text
        for name in ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys():
            assert f"<code>{name}</code>" in text
        found = _Elements()
        found.feed(text)
        assert found.links == ["openapi.json"]
        assert found.names.isdisjoint({"script", "link", "img", "iframe", "object", "form"})
        assert "url(" not in text and "@import" not in text

    run(check)
