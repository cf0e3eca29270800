"""What an answer's text is to be, asked in the words of Responses and Messages."""

from __future__ import annotations

from typing import Any

import pytest

from server.serving import MODEL, Server, run
from server.test_tools_api import TOKENIZER, saying

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
BAD: dict[str, Any] = {"type": "object", "not": {}}


def text_format(schema: dict[str, Any]) -> dict[str, Any]:
    wanted = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    return {"model": MODEL, "input": "x", "text": {"format": wanted}}


def output_config(schema: dict[str, Any]) -> dict[str, Any]:
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    turn = {"role": "user", "content": "x"}
    return {"max_tokens": 9, "messages": [turn], "output_config": wanted}


@pytest.mark.parametrize(
    "route, asked, param",
    [
        ("/v1/responses", text_format, "text.format.schema"),
        ("/v1/messages", output_config, "output_config.format.schema"),
    ],
)
def test_a_schema_holds_the_answer(route: str, asked: Any, param: str) -> None:
    async def check(server: Server) -> None:
        response = await server.post(route, asked(SCHEMA))
        assert response.status_code == 200, response.text
        [request] = server.engine.requests
        assert request.constraint is not None and request.constraint.grammar is not None
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "structured_outputs": {"json": SCHEMA},
        }
        await server.post("/v1/chat/completions", {"model": MODEL, **body})
        assert server.engine.requests[1].constraint.grammar.text == request.constraint.grammar.text
        refused = await server.post(route, asked(BAD))
        assert refused.status_code == 400 and "not" in refused.json()["error"]["message"]
        assert refused.json()["error"]["message"].startswith(param)

    run(check, saying('{"a": 1}'), tokenizer=TOKENIZER)
