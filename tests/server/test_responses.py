"""OpenAI's Responses API through the official client, and as raw events."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from moebius.errors import EngineError
from moebius.server.input_text import TextReader
from server.fake_engine import FakeEngine
from server.serving import MODEL, Server, listening, run, wait_until
from server.test_messages import named_events
from server.test_tools_api import ARGUMENTS, CALL, REPLY, THOUGHT, TOKENIZER, ids, saying

WEATHER: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "description": "Tells it.", "parameters": WEATHER},
    {"type": "function", "name": "now", "parameters": None},
]
FIELDS: dict[str, Any] = {
    "model": MODEL,
    "input": "What is the weather in Köln?",
    "tools": TOOLS,
    "max_output_tokens": 500,
}
ROUTE = "/v1/responses"


def client_of(port: int) -> openai.OpenAI:
    address = f"http://127.0.0.1:{port}/v1"
    return openai.OpenAI(base_url=address, api_key="x", max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[FakeEngine, int]]:
    fake = saying(REPLY)
    with listening(fake, tokenizer=TOKENIZER) as (port, _):
        yield fake, port


@pytest.fixture
def client(live: tuple[FakeEngine, int]) -> Iterator[openai.OpenAI]:
    with client_of(live[1]) as client:
        yield client


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a stream comes to, by OpenAI's documentation of its events; each is checked."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    created, progress, *middle, last = events
    assert (created["type"], progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == progress["response"]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert last["type"] == f"response.{last['response']['status']}"
    assert last["response"]["id"] == created["response"]["id"]
    done: list[dict[str, Any]] = []
    item: dict[str, Any] | None = None
    text = ""
    scores: list[dict[str, Any]] = []
    for event in middle:
        kind = event["type"].removeprefix("response.")
        assert event["output_index"] == len(done)
        if kind == "output_item.added":
            assert item is None
            item, text, scores = event["item"], "", []
            assert not (item.get("content") or item.get("arguments") or item.get("input"))
            continue
        assert item is not None
        if kind == "output_item.done":
            assert {name: event["item"].get(name) for name in ("id", "call_id", "name")} == {
                name: item.get(name) for name in ("id", "call_id", "name")
            }
            done.append(event["item"])
            item = None
            continue
        assert event["item_id"] == item["id"]
        if kind == "content_part.added":
            assert event["part"]["text"] == "" and item["content"] == []
            assert not event["part"].get("logprobs")
        elif kind.endswith(".delta"):
            text += event["delta"]
            assert ("logprobs" in event) == (kind == "output_text.delta")
            scores += event.get("logprobs", [])
        elif kind == "content_part.done":
            assert event["part"]["text"] == text
            assert event["part"].get("logprobs", []) == scores
        else:
            assert kind.endswith(".done")
            [written] = [event[name] for name in ("text", "arguments", "input") if name in event]
            assert written == text
            assert event.get("logprobs", []) == scores
            assert ("logprobs" in event) == (kind == "output_text.done")
    assert item is None and last["response"]["output"] == done
    return last["response"]


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """What two answers to one question have in common."""
    output = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")}
        for item in response["output"]
    ]
    times = ("id", "created_at", "completed_at")
    return {**{k: v for k, v in response.items() if k not in times}, "output": output}


def test_a_response_with_thought_and_calls(client: openai.OpenAI) -> None:
    response = client.responses.create(**FIELDS)
    thought, weather, now = response.output
    assert thought.type == "reasoning" and thought.summary == []
    assert [part.text for part in thought.content] == [THOUGHT]
    assert thought.encrypted_content is None
    called = [(call.type, call.name, call.arguments) for call in (weather, now)]
    assert called == [
        ("function_call", "get_weather", ARGUMENTS),
        ("function_call", "now", "{}"),
    ]
    assert len({item.id for item in response.output}) == 3
    assert (response.status, response.error, response.store) == ("completed", None, False)
    usage = response.usage
    assert usage.output_tokens == len(ids(REPLY)) + 1
    assert usage.output_tokens_details.reasoning_tokens == len(ids(f"\n{THOUGHT}\n"))
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_the_body_has_all_that_the_clients_types_ask_for(live: tuple[FakeEngine, int]) -> None:
    """The client builds its types without looking; here they look."""
    raw = httpx.post(f"http://127.0.0.1:{live[1]}{ROUTE}", json=FIELDS).json()
    parsed = Response.model_validate(raw)
    assert parsed.output_text == "" and parsed.tools[0].type == "function"


def test_a_stream_comes_to_the_same(client: openai.OpenAI, live: tuple[FakeEngine, int]) -> None:
    """By the client's own accumulator, and by hand."""
    address = f"http://127.0.0.1:{live[1]}{ROUTE}"
    whole = httpx.post(address, json=FIELDS).json()
    raw = httpx.post(address, json={**FIELDS, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in raw.text
    assert without_ids(folded(named_events(raw.text))) == without_ids(whole)
    with client.responses.stream(**FIELDS) as stream:
        final = stream.get_final_response()
    found = final.model_dump(mode="json", exclude_unset=True)
    for item in found["output"]:
        item.pop("parsed_arguments", None)
    assert without_ids(found)["output"] == without_ids(whole)["output"]
    assert found["usage"] == whole["usage"]


@pytest.mark.parametrize("step_tokens", [1, 5])
def test_text_and_its_end_by_length(step_tokens: int) -> None:
    async def check(server: Server) -> None:
        fields = {"input": [{"role": "user", "content": "x"}]}
        body = (await server.post(ROUTE, fields)).json()
        [item] = body["output"]
        [part] = item["content"]
        assert (item["type"], item["status"]) == ("message", "completed")
        assert (part["type"], part["text"]) == ("output_text", "one two three")
        cut = {**fields, "max_output_tokens": 2}
        body = (await server.post(ROUTE, cut)).json()
        assert (body["status"], body["output"][0]["status"]) == ("incomplete", "incomplete")
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
        for asked in (fields, cut):
            streamed = named_events((await server.post(ROUTE, asked | {"stream": True})).text)
            body = (await server.post(ROUTE, asked)).json()
            assert without_ids(folded(streamed)) == without_ids(body)

    run(check, saying("one two three", step_tokens=step_tokens), tokenizer=TOKENIZER)


def test_a_call_that_is_cut_off_is_incomplete() -> None:
    cut = REPLY[: REPLY.index("ln")]

    async def check(server: Server) -> None:
        fields = {**FIELDS, "max_output_tokens": len(ids(cut))}
        body = (await server.post(ROUTE, fields)).json()
        call = body["output"][-1]
        assert (call["type"], call["status"]) == ("function_call", "incomplete")
        assert ARGUMENTS.startswith(call["arguments"])
        events = named_events((await server.post(ROUTE, fields | {"stream": True})).text)
        assert without_ids(folded(events)) == without_ids(body)

    run(check, saying(REPLY), tokenizer=TOKENIZER)


PATCH = '*** Begin Patch\n+ "quoted" \\ back 🙂 日本\n*** End Patch\n'
APPLY: dict[str, Any] = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files. This takes text, no JSON.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'},
}
SERVER_TOOLS: dict[str, Any] = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "Files.",
    "tools": [{"type": "function", "name": "read", "parameters": WEATHER}],
}


def call_text(name: str, arguments: object, *, ascii: bool = False) -> str:
    written = json.dumps(arguments, ensure_ascii=ascii)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {written}}}\n</tool_call>'


@pytest.mark.parametrize("ascii", [False, True])
def test_custom_tools_and_namespaces(ascii: bool) -> None:
    """To the model both are functions; the client gets back what it knows."""
    reply = "\n".join(
        [
            call_text("apply_patch", {"input": PATCH}, ascii=ascii),
            call_text("mcp__files__read", {"city": "x"}),
        ]
    )
    fields = {"input": "x", "tools": [APPLY, SERVER_TOOLS, {"type": "web_search"}]}

    async def check(server: Server) -> None:
        body = (await server.post(ROUTE, fields)).json()
        patch, read = body["output"]
        assert (patch["type"], patch["name"], patch["input"]) == (
            "custom_tool_call",
            "apply_patch",
            PATCH,
        )
        assert (read["type"], read["name"], read["namespace"]) == (
            "function_call",
            "read",
            "mcp__files",
        )
        assert [tool["type"] for tool in body["tools"]] == ["custom", "namespace"]
        events = named_events((await server.post(ROUTE, fields | {"stream": True})).text)
        assert without_ids(folded(events)) == without_ids(body)
        deltas = [event for event in events if event["type"].endswith("call_input.delta")]
        assert len(deltas) > 5
        prompt = TOKENIZER.decode(server.engine.requests[0].prompt_ids, False)
        assert "mcp__files__read" in prompt and "lark" in prompt and "web_search" not in prompt

    run(check, saying(reply), tokenizer=TOKENIZER)


@pytest.mark.parametrize("ascii", [False, True])
def test_the_text_of_a_call_is_the_same_however_it_is_cut(ascii: bool) -> None:
    written = json.dumps({"input": PATCH}, ensure_ascii=ascii)
    for step in (1, 2, 3, 7, len(written)):
        reader = TextReader()
        told = [reader.push(written[at : at + step]) for at in range(0, len(written), step)]
        assert "".join([*told, reader.finish()]) == PATCH
    for other in ("{}", '{"input": 5}', "[1]", ""):
        reader = TextReader()
        assert reader.push(other) + reader.finish() == other


# As Codex sends a turn in the middle of its work; names and texts are made up.
CODEX: dict[str, Any] = {
    "model": MODEL,
    "instructions": "You are an agent.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "Be brief."}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "I look."}],
            "encrypted_content": "from another server",
        },
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "content": [{"type": "output_text", "text": "I look it up.", "annotations": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "call_1",
            "name": "read",
            "namespace": "mcp__files",
            "arguments": '{"city": "x"}',
        },
        {"type": "custom_tool_call", "call_id": "call_2", "name": "apply_patch", "input": PATCH},
        {"type": "function_call_output", "call_id": "call_1", "output": "text of x"},
        {
            "type": "custom_tool_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_text", "text": "Done"}],
        },
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "reasoning", "summary": [], "encrypted_content": "?"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Go on."}]},
    ],
    "tools": [*TOOLS, APPLY, SERVER_TOOLS, {"type": "web_search"}, {"type": "local_shell"}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199",
    "text": {"verbosity": "low"},
    "client_metadata": {"x": "y"},
}
SAME_IN_A_CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "You are an agent."},
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {
        "role": "assistant",
        "content": "I look it up.",
        "reasoning_content": "I look.",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "mcp__files__read", "arguments": '{"city": "x"}'},
            },
            {
                "id": "call_2",
                "type": "function",
                "function": {"name": "apply_patch", "arguments": json.dumps({"input": PATCH})},
            },
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "text of x"},
    {"role": "tool", "tool_call_id": "call_2", "content": "Done"},
    {"role": "user", "content": "Go on."},
]


def test_what_codex_sends() -> None:
    """The model reads what it would read in a chat; input_tokens counts that."""

    async def check(server: Server) -> None:
        response = await server.post(ROUTE, CODEX)
        assert response.status_code == 200, response.text
        [asked] = server.engine.requests
        prompt = TOKENIZER.decode(asked.prompt_ids, False)
        wanted = TOKENIZER.decode(TOKENIZER.encode_chat(SAME_IN_A_CHAT), False)
        assert prompt.partition("\n<|im_start|>")[2] == wanted.removeprefix("<|im_start|>")
        events = named_events(response.text)
        body = folded(events)
        assert events[-1]["type"] == "response.completed"
        [thought, *_] = body["output"]
        assert base64.b64decode(thought["encrypted_content"]).decode() == THOUGHT
        counted = {name: value for name, value in CODEX.items() if name != "stream"}
        response = await server.post(f"{ROUTE}/input_tokens", counted)
        assert response.json() == {
            "object": "response.input_tokens",
            "input_tokens": len(asked.prompt_ids),
        }

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_an_answer_that_comes_back_is_what_the_model_wrote() -> None:
    """So that the next turn finds it in the prefix cache, with its reasoning sealed or not."""

    async def check(server: Server) -> None:
        for sealed in (False, True):
            server.engine.requests.clear()
            fields = {**FIELDS, "include": ["reasoning.encrypted_content"] if sealed else []}
            body = (await server.post(ROUTE, fields)).json()
            output = body["output"]
            if sealed:
                output[0].pop("content")
            results = [
                {"type": "function_call_output", "call_id": item["call_id"], "output": "Sunny"}
                for item in output[1:]
            ]
            again = [{"role": "user", "content": FIELDS["input"]}, *output, *results]
            await server.post(ROUTE, {**fields, "input": again})
            first, second = (request.prompt_ids for request in server.engine.requests)
            said = (*first, *ids(REPLY))
            assert second[: len(said)] == said

    run(check, saying(REPLY), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "changes, param, code",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs", None),
        ({"top_logprobs": -1, "include": ["message.output_text.logprobs"]}, "top_logprobs", None),
        ({"top_logprobs": "2"}, "top_logprobs", None),
        ({"input": []}, "input", None),
        ({"input": None}, "input", None),
        ({"input": 3}, "input", None),
        ({"tool_choice": 3}, "tool_choice", None),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", None),
        ({"input": [{"role": "elf", "content": "x"}]}, "input[0].role", None),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", None),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id", None),
        ({"input": "word " * 9000}, "input", "context_length_exceeded"),
        ({"max_output_tokens": 0}, "max_output_tokens", None),
        ({"max_output_tokens": 5000}, "input", "context_length_exceeded"),
        ({"reasoning": {"effort": "heroic"}}, "reasoning.effort", None),
        ({"tools": [{"type": "function", "name": "bad name"}]}, "tools[0].name", None),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", None),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice", None),
        ({"messages": []}, "messages", None),
        ({"max_tokens": 5}, "max_tokens", None),
        ({"nonsense": 5}, "nonsense", None),
        ({"truncation": "some"}, "truncation", None),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    client: openai.OpenAI, changes: dict[str, Any], param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(ROUTE.removeprefix("/v1"), body={**FIELDS, **changes}, cast_to=object)
    assert caught.value.param is not None and caught.value.param == param, caught.value
    assert caught.value.code == code


def test_nothing_is_kept(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.responses.retrieve("resp_1"),
        lambda: client.responses.delete("resp_1"),
        lambda: client.responses.cancel("resp_1"),
        lambda: client.responses.input_items.list("resp_1"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "response_not_found"


def test_an_error_in_the_middle_of_a_stream() -> None:
    fake = saying(REPLY, step_seconds=0.005)  # or it may have failed before anything was sent
    fake.fault = lambda request, step: EngineError("a secret") if step == 30 else None
    with listening(fake, tokenizer=TOKENIZER) as (port, _), client_of(port) as client:
        events = list(client.responses.create(**FIELDS, stream=True))
        last = events[-1]
        assert last.type == "response.failed" and last.response.status == "failed"
        assert last.response.error.code == "server_error"
        assert "error id" in last.response.error.message
        assert last.response.id == events[0].response.id
        with pytest.raises(openai.InternalServerError, match="error id"):
            client.responses.create(**FIELDS)


def test_a_client_that_leaves_is_noticed() -> None:
    fake = saying(REPLY, step_seconds=0.01)
    with listening(fake, tokenizer=TOKENIZER) as (port, door):
        with client_of(port) as client:
            stream = client.responses.create(**FIELDS, stream=True)
            for _, event in zip(range(5), stream, strict=False):
                assert event.type
            stream.close()
        wait_until(lambda: door.in_flight == 0)
        assert set(fake.aborted) == {fake.requests[0].id}
        assert fake.drawn[fake.requests[0].id] < len(ids(REPLY))


def test_where_tools_may_not_be_called() -> None:
    async def check(server: Server) -> None:
        now = {"type": "function", "name": "now"}
        allowed = {"type": "allowed_tools", "mode": "auto", "tools": [now]}
        body = (await server.post(ROUTE, {**FIELDS, "tool_choice": allowed})).json()
        kinds = [item["type"] for item in body["output"]]
        assert kinds == ["reasoning", "message", "function_call"]
        assert body["output"][1]["content"][0]["text"].strip() == CALL
        assert body["tool_choice"] == allowed

    run(check, saying(REPLY), tokenizer=TOKENIZER)
