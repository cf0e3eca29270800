"""Anthropic's Messages API through its official client, and as raw events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from moebius.errors import EngineError
from moebius.models.hub import resolve_model
from server.fake_engine import FakeEngine
from server.serving import Server, listening, run, wait_until
from server.test_tools_api import REPLY, THOUGHT, TOKENIZER, ids, saying
from serving import serving
from text.replies import family

WEATHER: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: list[Any] = [
    {"name": "get_weather", "description": "Tells the weather.", "input_schema": WEATHER},
    {"name": "now", "input_schema": {"type": "object", "properties": {}}},
]
USER: dict[str, Any] = {"role": "user", "content": "What is the weather in Köln?"}
FIELDS: dict[str, Any] = {
    "model": "claude-something-else",
    "max_tokens": 16_000,
    "messages": [USER],
    "thinking": {"type": "adaptive"},
    "tools": TOOLS,
}


def client_of(port: int, **options: Any) -> anthropic.Anthropic:
    address = f"http://127.0.0.1:{port}"
    return anthropic.Anthropic(base_url=address, max_retries=0, timeout=20, **options)


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[FakeEngine, int]]:
    fake = saying(REPLY)
    with listening(fake, tokenizer=TOKENIZER) as (port, _):
        yield fake, port


@pytest.fixture
def client(live: tuple[FakeEngine, int]) -> Iterator[anthropic.Anthropic]:
    with client_of(live[1], api_key="x") as client:
        yield client


def named_events(raw: str) -> list[dict[str, Any]]:
    """The data of each event, whose name must be its type."""
    blocks = raw.split("\n\n")
    assert blocks.pop() == ""
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a stream comes to, by the rules of Anthropic's documentation; each is checked."""
    events = [event for event in events if event["type"] != "ping"]
    first, *middle, delta, last = events
    message = first["message"]
    assert (first["type"], delta["type"], last) == (
        "message_start",
        "message_delta",
        {"type": "message_stop"},
    )
    assert message["content"] == [] and message["stop_reason"] is None
    opened = None
    written = ""
    for event in middle:
        kind = event["type"].removeprefix("content_block_")
        if kind == "start":
            assert opened is None and event["index"] == len(message["content"])
            opened = event["index"]
            message["content"].append(event["content_block"])
            written = ""
            continue
        assert event["index"] == opened
        block = message["content"][opened]
        if kind == "stop":
            if block["type"] == "tool_use":
                block["input"] = json.loads(written or "{}")
            opened = None
            continue
        match event["delta"]:
            case {"type": "input_json_delta", "partial_json": text}:
                assert block["type"] == "tool_use"
                written += text
            case {"type": "text_delta", "text": text}:
                block["text"] += text
            case {"type": "thinking_delta", "thinking": text}:
                block["thinking"] += text
            case {"type": "signature_delta", "signature": text}:
                block["signature"] = text
    assert opened is None
    return {**message, **delta["delta"], "usage": {**message["usage"], **delta["usage"]}}


def test_a_message_with_thought_and_calls(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**FIELDS)
    thought, weather, now = message.content
    assert (thought.type, thought.thinking) == ("thinking", THOUGHT) and thought.signature
    assert (weather.type, weather.name, weather.input) == (
        "tool_use",
        "get_weather",
        {"city": "Köln"},
    )
    assert (now.name, now.input) == ("now", {}) and now.id != weather.id
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    assert (message.role, message.type, message.model) == ("assistant", "message", FIELDS["model"])
    usage = message.usage
    assert usage.output_tokens == len(ids(REPLY)) + 1
    assert usage.output_tokens_details.thinking_tokens == len(ids(f"\n{THOUGHT}\n"))


def test_a_stream_comes_to_the_same(
    client: anthropic.Anthropic, live: tuple[FakeEngine, int]
) -> None:
    """By the client's own accumulator, and by hand."""
    whole = client.messages.create(**FIELDS).to_dict()
    with client.messages.stream(**FIELDS) as stream:
        final = stream.get_final_message().to_dict()
    address = f"http://127.0.0.1:{live[1]}/v1/messages?beta=true"
    raw = httpx.post(address, json={**FIELDS, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    by_hand = folded(named_events(raw.text))
    for found in (final, by_hand):
        for message in (whole, found):
            message.pop("id", None)
            for block in message["content"]:
                block.pop("id", None)  # those of calls are made of the call's
        assert {name: found[name] for name in whole} == whole


def test_text_between_calls_stays_there() -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

    async def check(server: Server) -> None:
        fields = {**FIELDS, "messages": [USER]}
        body = (await server.post("/v1/messages", fields)).json()
        kinds = [block["type"] for block in body["content"]]
        assert kinds == ["text", "tool_use", "text", "tool_use"]
        assert body["content"][0]["text"].strip() == "First"
        assert body["content"][2]["text"].strip() == "then"
        events = named_events((await server.post("/v1/messages", fields | {"stream": True})).text)
        assert [block["type"] for block in folded(events)["content"]] == kinds

    run(check, saying(f"First\n{call}\nthen\n{call}"), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "reply, fields, reason, sequence, text",
    [
        ("one two", {}, "end_turn", None, "one two"),
        ("one two three", {"stop_sequences": ["two", "x"]}, "stop_sequence", "two", "one "),
        ("one two", {"max_tokens": 1}, "max_tokens", None, None),
        ("", {}, "end_turn", None, ""),
    ],
)
def test_why_a_message_ends(
    reply: str, fields: dict[str, Any], reason: str, sequence: str | None, text: str | None
) -> None:
    async def check(server: Server) -> None:
        asked = {"model": "x", "max_tokens": 50, "messages": [USER], **fields}
        body = (await server.post("/v1/messages", asked)).json()
        assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)
        [block] = body["content"]
        assert block["type"] == "text" and (text is None or block["text"] == text)
        events = named_events((await server.post("/v1/messages", asked | {"stream": True})).text)
        streamed = folded(events)
        assert {**streamed, "id": ""} == {**body, "id": ""}

    run(check, saying(reply), tokenizer=TOKENIZER)


def test_a_call_that_is_cut_off_keeps_what_is_whole() -> None:
    """As Anthropic's client reads a stream that ends there."""
    reply = '<tool_call>\n{"name": "now", "arguments": {"city": "Köln", "days": [1, 2, 3]}}'
    cut = ids(reply[: reply.index(", 3")])
    with (
        listening(saying(reply), tokenizer=TOKENIZER) as (port, _),
        client_of(port, api_key="x") as client,
    ):
        fields = {**FIELDS, "max_tokens": len(cut)}
        whole = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            final = stream.get_final_message()
    assert whole.stop_reason == final.stop_reason == "max_tokens"
    assert whole.content[-1].input == final.content[-1].input
    assert whole.content[-1].input["city"] == "Köln"


# As Claude Code sends a turn in the middle of its work; names and texts are made up.
CLAUDE_CODE: dict[str, Any] = {
    "model": "claude-haiku-9-9",
    "max_tokens": 64_000,
    "stream": True,
    "temperature": 1,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.9; cch=0a1b2;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Tell me.", "cache_control": {}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "abc"},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "I look it up."},
                {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {}, "caller": {}},
                {
                    "type": "tool_use",
                    "id": "toolu_2",
                    "name": "get_weather",
                    "input": {"city": "Bonn"},
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "noon"},
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "content": [{"type": "text", "text": "rain"}, {"type": "text", "text": "5 °C"}],
                    "is_error": True,
                },
                {"type": "text", "text": "Go on."},
            ],
        },
        {"role": "system", "content": "<total_tokens>1000 tokens left</total_tokens>"},
    ],
    "tools": [*TOOLS, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
    "thinking": {"type": "enabled", "budget_tokens": 31_999, "display": "summarized"},
    "output_config": {"effort": "high"},
    "metadata": {"user_id": "user_1"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "a_field_of_next_week": {"x": 1},
}
SAME_IN_OPENAIS_WORDS: list[dict[str, Any]] = [
    {"role": "system", "content": "You are an agent.\nBe brief."},
    {"role": "user", "content": "Tell me."},
    {
        "role": "assistant",
        "content": "I look it up.",
        "reasoning_content": "I look.",
        "tool_calls": [
            {"id": "toolu_1", "type": "function", "function": {"name": "now", "arguments": "{}"}},
            {
                "id": "toolu_2",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'},
            },
        ],
    },
    {"role": "tool", "tool_call_id": "toolu_1", "content": "noon"},
    {"role": "tool", "tool_call_id": "toolu_2", "content": "rain\n5 °C"},
    {"role": "user", "content": "Go on."},
    {"role": "system", "content": "<total_tokens>1000 tokens left</total_tokens>"},
]


def test_what_claude_code_sends() -> None:
    """It is answered, and the model reads what it would read in a chat; count_tokens counts that."""
    shown = [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                **({"description": tool["description"]} if "description" in tool else {}),
                "parameters": tool["input_schema"],
            },
        }
        for tool in TOOLS
    ]
    wanted = TOKENIZER.encode_chat(SAME_IN_OPENAIS_WORDS, tools=shown)

    async def check(server: Server) -> None:
        headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}
        response = await server.post("/v1/messages?beta=true", CLAUDE_CODE, headers=headers)
        assert response.status_code == 200
        [asked] = server.engine.requests
        assert list(asked.prompt_ids) == list(wanted)
        assert asked.max_tokens == 4096 - len(wanted), "what there is room for"
        message = folded(named_events(response.text))
        assert message["model"] == "claude-haiku-9-9"
        usage = message["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(wanted)
        counted = {
            name: value
            for name, value in CLAUDE_CODE.items()
            if name not in ("max_tokens", "stream", "temperature")
        }
        response = await server.post("/v1/messages/count_tokens", counted, headers=headers)
        assert response.json() == {"input_tokens": len(wanted)}

    run(check, saying("Well."), tokenizer=TOKENIZER)


def test_usage_tells_the_cached_part_apart() -> None:
    async def check(server: Server) -> None:
        response = await server.post("/v1/messages", {**FIELDS, "stream": True})
        events = named_events(response.text)
        prompt = len(server.engine.requests[0].prompt_ids)
        for usage in (events[0]["message"]["usage"], events[-2]["usage"]):
            assert usage["cache_read_input_tokens"] == 7
            assert usage["input_tokens"] == prompt - 7

    run(check, saying(REPLY, cached_tokens=7), tokenizer=TOKENIZER)


def test_what_the_assistant_has_begun_is_gone_on_with() -> None:
    async def check(server: Server) -> None:
        begun = {"role": "assistant", "content": "The answer is ("}
        fields = {"model": "x", "max_tokens": 9, "messages": [USER, begun]}
        body = (await server.post("/v1/messages", fields)).json()
        assert body["content"] == [{"type": "text", "text": "B)"}]
        prompt = TOKENIZER.decode(server.engine.requests[0].prompt_ids, False)
        assert prompt.endswith("assistant\nThe answer is (")

    run(check, saying("B)"), tokenizer=TOKENIZER)


def test_thought_that_nobody_reads_is_left_out() -> None:
    async def check(server: Server) -> None:
        thinking = {"type": "enabled", "budget_tokens": 2000, "display": "omitted"}
        fields = {**FIELDS, "thinking": thinking}
        body = (await server.post("/v1/messages", fields)).json()
        block = body["content"][0]
        assert (block["type"], block["thinking"]) == ("thinking", "") and block["signature"]
        stream = (await server.post("/v1/messages", fields | {"stream": True})).text
        assert "thinking_delta" not in stream and folded(named_events(stream))

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_a_budget_of_thought_reaches_the_engine() -> None:
    async def check(server: Server) -> None:
        for thinking, budget in (
            ({"type": "enabled", "budget_tokens": 2000}, 2000),
            ({"type": "adaptive"}, None),
            ({"type": "disabled", "budget_tokens": 2000}, None),
        ):
            answer = await server.post("/v1/messages", {**FIELDS, "thinking": thinking})
            assert answer.status_code == 200
            held = server.engine.requests[-1].constraint
            assert (None if held is None or held.budget is None else held.budget.tokens) == budget
        wrong = {**FIELDS, "thinking": {"type": "enabled", "budget_tokens": -1}}
        answer = await server.post("/v1/messages", wrong)
        assert answer.status_code == 400 and "thinking.budget_tokens" in answer.text

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_a_budget_is_left_out_where_no_tokens_tell_the_end_of_thought() -> None:
    """Agents send one to every model. One of a chat's is refused: see test_bad_requests."""

    async def check(server: Server) -> None:
        thinking = {"type": "enabled", "budget_tokens": 2000}
        fields = {"model": "x", "max_tokens": 9, "messages": [USER], "thinking": thinking}
        answer = await server.post("/v1/messages", fields)
        assert answer.status_code == 200, answer.text
        assert server.engine.requests[-1].constraint is None

    run(check, saying("x"), tokenizer=family())


def test_either_kind_of_key_opens(live: tuple[FakeEngine, int]) -> None:
    with listening(saying("x"), tokenizer=TOKENIZER, api_keys=("secret",)) as (port, _):
        for options in ({"api_key": "secret"}, {"auth_token": "secret"}):
            with client_of(port, **options) as client:
                assert client.messages.create(**FIELDS).content
        address = f"http://127.0.0.1:{port}/v1/messages"
        shown = httpx.post(address, json=FIELDS, headers={"x-api-key": "secret"})
        assert shown.status_code == 200
        with (
            client_of(port, api_key="wrong") as client,
            pytest.raises(anthropic.AuthenticationError) as caught,
        ):
            client.messages.create(**FIELDS)
        assert caught.value.body["error"]["type"] == "authentication_error"
        wrong = httpx.post(address, json=FIELDS, headers={"x-api-key": "wrong"})
        assert wrong.status_code == 401


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "elf", "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": []}]}, r"messages\[0\].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            r"messages\[0\].content\[0\]: .*image.*only text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            r"messages\[0\].content\[0\].tool_use_id",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]},
            "id",
        ),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"output_config": {"effort": "heroic"}}, "output_config.effort"),
        ({"tool_choice": {"type": "all"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tools": [{"name": "bad name", "input_schema": {}}]}, r"tools\[0\].name"),
        ({"tools": [{"name": "f", "input_schema": 5}]}, r"tools\[0\].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"stop_sequences": ["x"] * 99}, "stop_sequences"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, r"prompt is too long: \d+ tokens > 4096 maximum"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    client: anthropic.Anthropic, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=says) as caught:
        client.messages.create(**{**FIELDS, **changes})
    body = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["request_id"] == caught.value.request_id


def test_other_errors_have_the_shape_too(live: tuple[FakeEngine, int]) -> None:
    address = f"http://127.0.0.1:{live[1]}/v1/messages"
    for method, path, kind in (
        ("GET", "", "invalid_request_error"),
        ("POST", "/batches", "not_found_error"),
    ):
        response = httpx.request(method, address + path, json={} if method == "POST" else None)
        assert response.json()["error"]["type"] == kind
        assert response.headers["request-id"] == response.headers["x-request-id"]
    response = httpx.post(address, content=b"{", headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["type"]) == (400, "error")


def test_an_error_in_the_middle_of_a_stream() -> None:
    fake = saying(REPLY, step_seconds=0.005)  # or it may have failed before anything was sent
    fake.fault = lambda request, step: EngineError("a secret") if step == 30 else None
    with listening(fake, tokenizer=TOKENIZER) as (port, _), client_of(port, api_key="x") as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.stream(**FIELDS).__enter__().get_final_message()
        assert caught.value.body["error"]["type"] == "api_error"
        with pytest.raises(anthropic.InternalServerError, match="error id") as whole:
            client.messages.create(**FIELDS)
        assert "secret" not in str(caught.value) + str(whole.value)


def test_a_client_that_waits_hears_a_ping_and_one_that_leaves_is_noticed() -> None:
    fake = saying(REPLY)
    fake.gate.clear()
    with listening(fake, tokenizer=TOKENIZER, keep_alive=0.05) as (port, door):
        address = f"http://127.0.0.1:{port}/v1/messages"
        with httpx.stream("POST", address, json={**FIELDS, "stream": True}) as response:
            heard = ""
            for text in response.iter_text():
                heard += text
                if heard.count("event: ping") == 2:
                    break
        first, *others = named_events(heard)
        assert first["type"] == "message_start"
        assert {event["type"] for event in others} == {"ping"}
        wait_until(lambda: door.in_flight == 0)
        wait_until(lambda: set(fake.aborted) == {fake.requests[0].id})


def test_an_agents_second_turn_finds_the_first_in_the_cache() -> None:
    """Though the line that Claude Code bills by is another one, and a system message comes later."""
    with (
        serving(resolve_model("bundled"), "bundled") as address,
        anthropic.Anthropic(base_url=address, api_key="x", max_retries=0) as client,
    ):

        def ask(billing: str, messages: list[Any]) -> anthropic.types.Message:
            header = f"x-anthropic-billing-header: cc_version=2.1; cch={billing};"
            system: list[Any] = [
                {"type": "text", "text": header},
                {"type": "text", "text": "def helper(x):\n    return x + 1\n" * 60},
            ]
            return client.messages.create(
                model="claude-x", max_tokens=16, system=system, messages=messages
            )

        first = ask("11111", [USER])
        turns: list[Any] = [
            USER,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": "And tomorrow?"},
            {"role": "system", "content": "<total_tokens>500 tokens left</total_tokens>"},
        ]
        second = ask("22222", turns)
    prompt = first.usage.input_tokens + first.usage.cache_read_input_tokens
    assert prompt > 500 and first.usage.cache_read_input_tokens == 0
    assert second.usage.cache_read_input_tokens >= 0.95 * prompt
