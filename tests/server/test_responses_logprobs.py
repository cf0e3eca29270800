"""Log-probabilities of what a response says, beside those of the same tokens in a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai
import pytest
from openai.types.responses import (
    Response,
    ResponseOutputMessage,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
)
from openai.types.responses.response_output_text import Logprob

from covering import rest
from moebius.text import Tokenizer
from server.fake_engine import FakeEngine, constant
from server.serving import MODEL, Server, listening, run
from server.test_messages import named_events
from server.test_responses import ROUTE, TOOLS, client_of, folded, without_ids
from server.test_tools_api import CALL, NOW, TEMPLATE, THOUGHT, TOKENIZER
from text.harmony import harmony_tokenizer
from text.replies import family

CHAT = "/v1/chat/completions"
INCLUDE = ["message.output_text.logprobs"]
FIELDS: dict[str, Any] = {
    "model": MODEL,
    "input": "What is the weather in Köln?",
    "tools": TOOLS,
    "include": INCLUDE,
    "top_logprobs": 2,
    "max_output_tokens": 500,
}
SAME_CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": FIELDS["input"]}],
    "tools": [
        {"type": "function", "function": {"name": "get_weather"}},
        {"type": "function", "function": {"name": "now"}},
    ],
    "logprobs": True,
    "top_logprobs": 2,
    "max_tokens": 500,
}
BEFORE = "Grüße 🦉, I look. <b\n"
BEHIND = "That was it 🦉"
REPLY = f"<think>\n{THOUGHT}\n</think>\n\n{BEFORE}{CALL}\n{NOW}\n{BEHIND}"
KINDS = ["reasoning", "message", "function_call", "function_call", "message"]


def saying(reply: str, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> FakeEngine:
    return FakeEngine(
        constant(tokenizer.encode(reply, False)),
        vocab_size=tokenizer.vocab_size,
        eos_ids=tokenizer.end_ids,
        max_model_len=4096,
        **options,
    )


def of_texts(entries: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Of a reply's tokens, by their bytes, those of each of its texts; a character at the reply's
    end may be unfinished."""
    whole = b"".join(bytes(entry["bytes"]) for entry in entries)
    found = []
    at = 0
    for text in texts:
        finished = text.removesuffix("�").encode()
        begin = whole.index(finished, at)
        at = len(whole) if text.endswith("�") else begin + len(finished)
        found.append(_overlapping(entries, begin, at))
    return found


def _overlapping(entries: Sequence[dict[str, Any]], begin: int, end: int) -> list[dict[str, Any]]:
    found = []
    at = 0
    for entry in entries:
        if at < end and at + len(entry["bytes"]) > begin:
            found.append(entry)
        at += len(entry["bytes"])
    return found


def told(response: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The log-probabilities of each text."""
    return [
        part["logprobs"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    ]


async def chat_entries(server: Server, **fields: Any) -> list[dict[str, Any]]:
    body = (await server.post(CHAT, {**SAME_CHAT, **fields})).json()
    found: list[dict[str, Any]] = body["choices"][0]["logprobs"]["content"]
    return found


async def both(server: Server, **fields: Any) -> dict[str, Any]:
    """The response, whose stream comes to the same."""
    asked = {**FIELDS, **fields}
    response = await server.post(ROUTE, asked)
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()
    streamed = named_events((await server.post(ROUTE, {**asked, "stream": True})).text)
    assert without_ids(folded(streamed)) == without_ids(whole)
    return whole


@pytest.mark.parametrize("step_tokens", [1, 2, 3, 7, 1000])
def test_those_of_a_chat_that_are_the_texts(step_tokens: int) -> None:
    """Thought, calls, markers, the end and the line breaks round them are left out."""

    async def check(server: Server) -> None:
        whole = await both(server)
        assert [item["type"] for item in whole["output"]] == KINDS
        wanted = of_texts(await chat_entries(server), [BEFORE, BEHIND])
        assert all(wanted) and told(whole) == wanted
        assert whole["top_logprobs"] == 2

    run(check, saying(REPLY, step_tokens=step_tokens), tokenizer=TOKENIZER)


@pytest.mark.parametrize("step", [3, rest(1)])
def test_a_reply_that_is_cut_at_any_token(step: int) -> None:
    """In the middle of a character, too."""

    async def check(server: Server) -> None:
        entries = await chat_entries(server)
        broken = 0
        for length in range(1, len(entries), step):
            whole = await both(server, max_output_tokens=length)
            assert whole["status"] == "incomplete"
            texts = [
                part["text"]
                for item in whole["output"]
                if item["type"] == "message"
                for part in item["content"]
            ]
            assert told(whole) == of_texts(entries[:length], texts)
            broken += any(text.endswith("�") for text in texts)
        assert broken >= 2

    run(check, saying(REPLY, step_tokens=2), tokenizer=TOKENIZER)


@pytest.mark.parametrize("stream", [False, True])
def test_through_the_client(stream: bool) -> None:
    with listening(saying(REPLY), tokenizer=TOKENIZER) as (port, _), client_of(port) as client:
        if stream:
            with client.responses.stream(**FIELDS) as events:
                response = events.get_final_response()
        else:
            response = client.responses.create(**FIELDS)
        chat = client.chat.completions.create(**SAME_CHAT)
        entries = [entry.model_dump() for entry in chat.choices[0].logprobs.content]
        wanted = of_texts(entries, [BEFORE, BEHIND])
        found = []
        for item in response.output:
            if isinstance(item, ResponseOutputMessage):
                [part] = item.content
                assert all(isinstance(entry, Logprob) for entry in part.logprobs)
                found.append([entry.model_dump() for entry in part.logprobs])
        assert found == wanted
        assert response.top_logprobs == 2
        raw = response.model_dump(mode="json", exclude_unset=True)
        assert Response.model_validate(raw).output_text == BEFORE + BEHIND


def test_the_events_of_a_stream_are_the_clients() -> None:
    """What a delta tells is what its text begins, and of the types that the client has."""
    with listening(saying(REPLY), tokenizer=TOKENIZER) as (port, _), client_of(port) as client:
        deltas = []
        for event in client.responses.create(**FIELDS, stream=True):
            if isinstance(event, ResponseTextDeltaEvent):
                ResponseTextDeltaEvent.model_validate(event.model_dump())
                deltas.append(event)
                assert len(event.logprobs) > 0 or not event.delta.isascii()
                for entry in event.logprobs:
                    assert len(entry.top_logprobs) == 2
                    assert entry.token.strip("�") in event.delta or "<" in entry.token
            elif isinstance(event, ResponseTextDoneEvent):
                ResponseTextDoneEvent.model_validate(event.model_dump())
                assert event.logprobs
        assert len(deltas) > 10


@pytest.mark.parametrize("top", [None, 0, 1, 20])
def test_how_many_others_are_told(top: int | None) -> None:
    async def check(server: Server) -> None:
        whole = await both(server, top_logprobs=top)
        entries = [entry for text in told(whole) for entry in text]
        assert {len(entry["top_logprobs"]) for entry in entries} == {top or 0}
        assert whole["top_logprobs"] == (top or 0)
        assert server.engine.requests[0].params.logprobs == (top or 0)

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_nothing_is_told_that_was_not_asked_for() -> None:
    async def check(server: Server) -> None:
        whole = await both(server, include=["reasoning.encrypted_content"], top_logprobs=0)
        assert told(whole) == [[], []]
        assert {request.params.logprobs for request in server.engine.requests} == {None}

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_markers_that_are_spelled() -> None:
    """What may begin one is held back. A token that ends one and begins the text is the text's; the
    next delta of a text has no token twice."""
    tokenizer = family(("k>Hi", "e.<"), "<seed:think> </seed:think>", template=TEMPLATE)
    text = "Hi 🦉 there.<seed:x> </seed 🦉"
    reply = f"<seed:think>Hm.</seed:think>{text}"

    async def check(server: Server) -> None:
        fields: dict[str, Any] = {"tools": []}
        whole = await both(server, **fields)
        [wanted] = of_texts(await chat_entries(server, **fields), [text])
        tokens = [entry["token"] for entry in wanted]
        assert (tokens[0], tokens.count("e.<")) == ("k>Hi", 1)
        assert told(whole) == [wanted]

    for step_tokens in (1, 2, 1000):
        run(check, saying(reply, tokenizer, step_tokens=step_tokens), tokenizer=tokenizer)


def test_channels_of_harmony() -> None:
    tokenizer = harmony_tokenizer()
    texts = ["Well 🦉, ", "Grüße!"]
    reply = (
        "<|channel|>analysis<|message|>Hm 🦉?<|end|><|start|>assistant<|channel|>commentary"
        f"<|message|>{texts[0]}<|end|><|start|>assistant<|channel|>final<|message|>{texts[1]}"
    )

    async def check(server: Server) -> None:
        fields: dict[str, Any] = {"tools": []}
        whole = await both(server, **fields)
        first, second = of_texts(await chat_entries(server, **fields), texts)
        assert [entry for text in told(whole) for entry in text] == first + second

    for step_tokens in (1, 5, 1000):
        run(check, saying(reply, tokenizer, step_tokens=step_tokens), tokenizer=tokenizer)


def test_whoever_wants_special_tokens_gets_those_of_all() -> None:
    async def check(server: Server) -> None:
        whole = await both(server, skip_special_tokens=False)
        entries = await chat_entries(server)
        assert told(whole) == of_texts(entries, [REPLY])

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_an_answer_with_logprobs_may_be_sent_back() -> None:
    async def check(server: Server) -> None:
        prompts = []
        for include in (INCLUDE, []):
            top = 2 if include else 0
            body = await both(server, include=include, top_logprobs=top)
            output = [item for item in body["output"] if item["type"] == "message"]
            again = [{"role": "user", "content": "x"}, *output, {"role": "user", "content": "y"}]
            server.engine.requests.clear()
            response = await server.post(ROUTE, {"input": again})
            assert response.status_code == 200, response.text
            prompts.append(server.engine.requests[0].prompt_ids)
        assert prompts[0] == prompts[1]

    run(check, saying(REPLY), tokenizer=TOKENIZER)


def test_top_logprobs_alone_say_what_they_need() -> None:
    with listening(saying(REPLY), tokenizer=TOKENIZER) as (port, _), client_of(port) as client:
        with pytest.raises(openai.BadRequestError, match="needs include") as caught:
            client.responses.create(model=MODEL, input="x", top_logprobs=2)
        assert caught.value.param == "top_logprobs"
