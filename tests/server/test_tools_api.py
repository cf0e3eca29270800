"""Tools and reasoning in chats: the official client against a server whose engine says given
tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from moebius.request.constraint import Constraint
from moebius.text import Tokenizer
from server.fake_engine import FakeEngine, constant
from server.serving import MODEL, Server, listening, run
from text.replies import family

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '' if loop.first else '\n' }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
TOKENIZER = family(MARKERS, template=TEMPLATE)
THOUGHT = "They ask for the weather. 🙂"
ARGUMENTS = '{"city": "Köln"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
REPLY = f"<think>\n{THOUGHT}\n</think>\n\n{CALL}\n{NOW}"
USER = {"role": "user", "content": "What is the weather in Köln?"}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def ids(text: str, tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    return tokenizer.encode(text, False)


def saying(reply: str, **options: Any) -> FakeEngine:
    ends = TOKENIZER.end_ids
    return FakeEngine(
        constant(ids(reply)),
        vocab_size=TOKENIZER.vocab_size,
        eos_ids=ends,
        max_model_len=4096,
        **options,
    )


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        listening(saying(REPLY), tokenizer=TOKENIZER) as (port, _),
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=20
        ) as client,
    ):
        yield client


FIELDS: dict[str, Any] = {"model": MODEL, "messages": [USER], "tools": TOOLS, "max_tokens": 500}


def test_an_answer_with_calls(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**FIELDS)
    (choice,) = answer.choices
    message = choice.message
    assert (message.content, choice.finish_reason) == (None, "tool_calls")
    called = [
        (call.type, call.function.name, call.function.arguments) for call in message.tool_calls
    ]
    assert called == [("function", "get_weather", ARGUMENTS), ("function", "now", "{}")]
    extra = message.model_extra
    assert extra["reasoning_content"] == extra["reasoning"] == THOUGHT
    usage = answer.usage
    assert usage.completion_tokens == len(ids(REPLY)) + 1
    # Its markers are not counted, the line breaks beside them are.
    thought = len(ids(f"\n{THOUGHT}\n"))
    assert usage.completion_tokens_details.reasoning_tokens == thought


def test_a_stream_comes_to_the_same(client: openai.OpenAI) -> None:
    """Concatenated as clients do it: an id and a name come once, arguments in pieces."""
    whole = client.chat.completions.create(**FIELDS).choices[0]
    reasoning = ""
    content = ""
    found: list[dict[str, str]] = []
    ends = []
    for chunk in client.chat.completions.create(**FIELDS, stream=True):
        (choice,) = chunk.choices
        delta = choice.delta.model_dump(exclude_unset=True)
        assert not ("reasoning" in delta and "content" in delta)
        reasoning += delta.get("reasoning_content", "")
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(found) and call["type"] == "function"
                assert call["function"]["arguments"] == ""
                found.append({"name": call["function"]["name"], "arguments": ""})
            else:
                assert call["index"] == len(found) - 1
                assert list(call["function"]) == ["arguments"]
                found[-1]["arguments"] += call["function"]["arguments"]
        ends += [choice.finish_reason] if choice.finish_reason else []
    assert (reasoning, content, ends) == (THOUGHT, "", ["tool_calls"])
    wanted = [
        {"name": call.function.name, "arguments": call.function.arguments}
        for call in whole.message.tool_calls
    ]
    assert found == wanted


def test_the_clients_own_accumulator(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**FIELDS) as stream:
        final = stream.get_final_completion()
    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather", "now"]
    assert choice.message.tool_calls[0].function.arguments == ARGUMENTS
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_a_second_turn_begins_with_the_first(client: openai.OpenAI) -> None:
    """What the client sends back renders to the very tokens that the model wrote."""

    async def check(server: Server) -> None:
        body = await server.chat(messages=[USER], tools=TOOLS, max_tokens=500)
        (choice,) = body["choices"]
        result = {
            "role": "tool",
            "tool_call_id": choice["message"]["tool_calls"][0]["id"],
            "content": [{"type": "text", "text": "Sunny"}, {"type": "text", "text": "20 °C"}],
        }
        await server.chat(messages=[USER, choice["message"], result], tools=TOOLS, max_tokens=5)
        first, second = (request.prompt_ids for request in server.engine.requests)
        said = (*first, *ids(REPLY))
        assert second[: len(said)] == said
        assert "Sunny\n20 °C" in TOKENIZER.decode(second)

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_one_call_where_only_one_is_wanted() -> None:
    """The reply ends with it, in the stream as in the whole; what else is drawn counts for
    nothing."""
    end = len(ids(f"<think>\n{THOUGHT}\n</think>\n\n{CALL}"[: -len("\n</tool_call>")]))

    async def check(server: Server) -> None:
        fields: dict[str, Any] = {"messages": [USER], "tools": TOOLS, "max_tokens": 500}
        fields["parallel_tool_calls"] = False
        body = await server.chat(**fields)
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "tool_calls"
        [call] = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
        assert body["usage"]["completion_tokens"] == end
        chunks = await server.stream("/v1/chat/completions", **fields)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert {call["index"] for call in calls} == {0}
        assert len(server.engine.aborted) == 2

    run(check, saying(REPLY), tokenizer=TOKENIZER)
    run(check, saying(REPLY, step_tokens=7), tokenizer=TOKENIZER)


def test_a_tool_that_is_named_is_called_once() -> None:
    """It ends with `stop`, as OpenAI's does, and its grammar has room for no other call."""
    named = {"type": "function", "function": {"name": "get_weather"}}

    async def check(server: Server) -> None:
        body = await server.chat(messages=[USER], tools=TOOLS, tool_choice=named, max_tokens=500)
        (choice,) = body["choices"]
        [call] = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
        assert choice["finish_reason"] == "stop"
        [request] = server.engine.requests
        alone = request.constraint.grammar.text
        await server.chat(
            messages=[USER],
            tools=TOOLS[:1],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=1,
        )
        assert TOOLS[0]["function"]["name"] == "get_weather"
        assert server.engine.requests[1].constraint.grammar.text == alone

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_tools_that_must_not_be_called_are_shown_and_their_marker_is_banned() -> None:
    """So that the prompt stays what it was, and its beginning in the cache."""

    async def check(server: Server) -> None:
        await server.chat(messages=[USER], tools=TOOLS, max_tokens=1)
        bias = {"5": 1.0}
        body = await server.chat(
            messages=[USER], tools=TOOLS, tool_choice="none", logit_bias=bias, max_tokens=500
        )
        auto, none = server.engine.requests
        assert none.prompt_ids == auto.prompt_ids
        [starter] = ids("<tool_call>")
        assert none.constraint == Constraint(bad_words=((starter,),))
        assert none.params.logit_bias == {5: 1.0} and auto.constraint is None
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_a_call_that_is_cut_off() -> None:
    cut = REPLY[: REPLY.index("ln")]

    async def check(server: Server) -> None:
        fields: dict[str, Any] = {"messages": [USER], "tools": TOOLS, "max_tokens": len(ids(cut))}
        (choice,) = (await server.chat(**fields))["choices"]
        assert choice["finish_reason"] == "length"
        [call] = choice["message"]["tool_calls"]
        assert ARGUMENTS.startswith(call["function"]["arguments"]) and call["function"]["arguments"]

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_what_is_no_call_is_content_and_counted() -> None:
    broken = "<tool_call>\n{'name': 'now'}\n</tool_call>"

    async def check(server: Server) -> None:
        fields: dict[str, Any] = {"messages": [USER], "tools": TOOLS, "max_tokens": 500}
        (choice,) = (await server.chat(**fields))["choices"]
        assert choice["message"]["content"] == broken + "\n"
        assert choice["finish_reason"] == "tool_calls"
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now"]
        scraped = (await server.http.get("/metrics")).text
        for result in ("parsed", "malformed"):
            [line] = [line for line in scraped.splitlines() if f'result="{result}"' in line]
            assert line.startswith("moebius_tool_calls_total") and line.endswith(" 1.0")

    run(check, saying(f"{broken}\n{NOW}"), tokenizer=TOKENIZER)


def test_a_tool_that_is_not_allowed_is_not_called() -> None:
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [TOOLS[1]]},
    }

    async def check(server: Server) -> None:
        fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 500}
        message = (await server.chat(messages=[USER], **fields))["choices"][0]["message"]
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["now"]
        assert message["content"] == CALL + "\n"

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_a_client_may_leave_reasoning_out_or_parse_by_itself() -> None:
    async def check(server: Server) -> None:
        fields: dict[str, Any] = {"messages": [USER], "tools": TOOLS, "max_tokens": 500}
        body = await server.chat(**fields, include_reasoning=False)
        message = body["choices"][0]["message"]
        assert "reasoning" not in message and "reasoning_content" not in message
        assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        chunks = await server.stream("/v1/chat/completions", **fields, include_reasoning=False)
        assert THOUGHT.split()[0] not in json.dumps(chunks)
        body = await server.chat(**fields, skip_special_tokens=False)
        assert body["choices"][0]["message"]["content"] == REPLY

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_the_models_formats_are_told() -> None:
    async def check(server: Server) -> None:
        card = (await server.http.get(f"/v1/models/{MODEL}")).json()
        assert (card["tool_format"], card["reasoning_format"]) == ("hermes", "<think>")

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_logprobs_are_those_of_all_tokens() -> None:
    """Of a reply's markers, too, in the stream as in the whole."""

    async def check(server: Server) -> None:
        fields: dict[str, Any] = {"messages": [USER], "tools": TOOLS, "max_tokens": 500}
        fields["logprobs"] = True
        (choice,) = (await server.chat(**fields))["choices"]
        tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
        assert len(tokens) == len(ids(REPLY)) + 1
        chunks = await server.stream("/v1/chat/completions", **fields)
        entries = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        streamed = [each["token"] for entry in entries if entry for each in entry["content"]]
        assert streamed == tokens

    run(check, saying(REPLY), tokenizer=TOKENIZER)
