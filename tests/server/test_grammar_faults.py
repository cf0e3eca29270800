"""A grammar that an engine cannot follow: who hears of it, and in whose words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from moebius.errors import ConstraintError, ContextLengthError
from server.serving import MODEL, Server, run
from server.test_messages import named_events
from server.test_tools_api import TOKENIZER, TOOLS, saying
from serving import serving
from tiny import write_model

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
USER = {"role": "user", "content": "x"}
CHAT: dict[str, Any] = {"model": MODEL, "messages": [USER]}
NAMED_SCHEMA = {"name": "x", "schema": SCHEMA}
MESSAGES: dict[str, Any] = {"max_tokens": 9, "messages": [USER]}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    (
        "/v1/chat/completions",
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": NAMED_SCHEMA}},
        "response_format.json_schema.schema",
    ),
    ("/v1/chat/completions", {**CHAT, "structured_outputs": {"regex": "a+"}}, "structured_outputs"),
    ("/v1/chat/completions", {**CHAT, "guided_choice": ["a", "b"]}, "guided_choice"),
    ("/v1/chat/completions", {**CHAT, "tools": TOOLS, "tool_choice": "required"}, "tools"),
    ("/v1/chat/completions", {**CHAT, "bad_words": ["a"]}, "bad_words"),
    ("/v1/completions", {"prompt": "x", "grammar": 'start: "a"'}, "grammar"),
    ("/v1/responses", {"input": "x", "text": {"format": {**FORMAT, "name": "x"}}}, "text.format.schema"),
    ("/v1/messages", {**MESSAGES, "output_config": {"format": FORMAT}}, "output_config.format.schema"),
]  # fmt: skip


def failing(server: Server, step: int = 0) -> None:
    error = ConstraintError("the grammar cannot be followed any further: why")
    server.engine.fault = lambda request, at: error if at == step else None


@pytest.mark.parametrize(("route", "fields", "param"), CASES, ids=lambda each: str(each)[:40])
def test_the_field_that_it_came_in_is_named(route: str, fields: dict[str, Any], param: str) -> None:
    """Anthropic's errors have no place for a field's name but their message."""

    async def check(server: Server) -> None:
        failing(server)
        response = await server.post(route, fields)
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert error["message"] == f"{param}: the grammar cannot be followed any further: why"
        if route != "/v1/messages":
            assert error["param"] == param

    run(check, saying("aaaa"), tokenizer=TOKENIZER)


@pytest.mark.parametrize(("route", "fields", "param"), CASES, ids=lambda each: str(each)[:40])
def test_it_is_named_in_the_middle_of_a_stream_too(
    route: str, fields: dict[str, Any], param: str
) -> None:
    async def check(server: Server) -> None:
        failing(server, step=1)
        response = await server.post(route, {**fields, "stream": True})
        assert response.status_code == 200
        assert f'"{param}: the grammar cannot be followed' in response.text
        if "completions" in route:
            assert f'"param":"{param}"' in response.text

    # Long enough for a first token to be sent by itself, however busy the machine.
    run(check, saying("aaaa", step_seconds=0.1), tokenizer=TOKENIZER)


def test_a_response_that_fails_says_so_in_its_last_event() -> None:
    async def check(server: Server) -> None:
        failing(server, step=1)
        fields = {"input": "x", "text": {"format": {**FORMAT, "name": "x"}}, "stream": True}
        last = named_events((await server.post("/v1/responses", fields)).text)[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["message"].startswith("text.format.schema: ")

    run(check, saying("aaaa", step_seconds=0.1), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("/v1/chat/completions", CHAT, "messages"),
        ("/v1/completions", {"prompt": "x"}, "prompt"),
        ("/v1/responses", {"input": "x"}, "input"),
    ],
)
def test_so_is_a_prompt_that_an_engine_has_no_room_for(
    route: str, fields: dict[str, Any], param: str
) -> None:
    async def check(server: Server) -> None:
        error = ContextLengthError("the prompt does not fit")
        server.engine.fault = lambda request, at: error
        response = await server.post(route, fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param

    run(check, saying("aaaa"), tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    with serving(directory, MODEL) as found:
        yield found


def test_a_schema_that_only_the_engine_finds_too_large(address: str) -> None:
    """Through a whole server: it is compiled there, and too much for the first mask."""
    properties = {f"p{i}": {"type": "integer"} for i in range(4000)}
    wanted = {"name": "x", "schema": {"type": "object", "properties": properties}}
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="grammar") as caught,
    ):
        client.chat.completions.create(
            **CHAT, response_format={"type": "json_schema", "json_schema": wanted}
        )
    assert caught.value.param == "response_format.json_schema.schema"
    assert httpx.get(f"{address}/health").status_code == 200
