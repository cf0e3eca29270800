"""/v1/chat/completions without a socket."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest

from moebius.text import Tokenizer
from server.fake_engine import FakeEngine, constant
from server.serving import MODEL, Server, engine, run, tokenizer

CHAT = "/v1/chat/completions"
SPOKEN = "hello 😀 Grüße"


def deltas(chunks: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    return [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]


def test_an_answer() -> None:
    async def check(server: Server) -> None:
        body = await server.chat()
        assert (body["object"], body["model"], body["id"][:9]) == (
            "chat.completion",
            MODEL,
            "chatcmpl-",
        )
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": SPOKEN, "refusal": None}
        assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
        (request,) = server.engine.requests
        messages = [{"role": "user", "content": "hello"}]
        assert list(request.prompt_ids) == tokenizer().encode_chat(messages)
        history = tokenizer().encode_chat(messages, add_generation_prompt=False)
        assert request.generation_start == len(history)
        assert request.max_tokens == 512 - len(request.prompt_ids)
        assert body["usage"]["prompt_tokens"] == len(request.prompt_ids)

    run(check, engine(SPOKEN))


def test_a_stream_begins_with_the_role_and_has_one_finish_reason_a_choice() -> None:
    async def check(server: Server) -> None:
        fields = {"n": 3, "seed": 1, "max_tokens": 30, "stream_options": {"include_usage": True}}
        chunks = await server.stream(CHAT, **fields)
        del fields["stream_options"]
        whole = (await server.chat(**fields))["choices"]
        assert len({(c["id"], c["created"], c["object"], c["model"]) for c in chunks}) == 1
        assert chunks[0]["object"] == "chat.completion.chunk"
        for choice in whole:
            first, *rest = deltas(chunks, choice["index"])
            assert (
                first["delta"] == {"role": "assistant", "content": ""}
                and first["finish_reason"] is None
            )
            assert all("role" not in part["delta"] for part in rest)
            assert (
                "".join(part["delta"].get("content", "") for part in rest)
                == choice["message"]["content"]
            )
            assert [part["finish_reason"] for part in rest] == [None] * (len(rest) - 1) + ["length"]
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 90
        indices = [chunk["choices"][0]["index"] for chunk in chunks[:-1]]
        assert indices != sorted(indices), "choices do not interleave"

    run(check, engine(step_seconds=0.002))


@pytest.mark.parametrize("top", [None, 0, 3])
def test_logprobs(top: int | None) -> None:
    ids = tokenizer().encode(SPOKEN, False)

    async def check(server: Server) -> None:
        fields = {"logprobs": True, "top_logprobs": top}
        content = (await server.chat(**fields))["choices"][0]["logprobs"]["content"]
        assert bytes(b for entry in content[:-1] for b in entry["bytes"]).decode() == SPOKEN
        assert [entry["logprob"] for entry in content[:-1]] == [-1.0 - token / 8 for token in ids]
        assert all(
            [t["logprob"] for t in entry["top_logprobs"]] == [-0.5, -1.0, -1.5][: top or 0]
            for entry in content
        )
        chunks = await server.stream(CHAT, **fields)
        streamed = [
            e
            for part in deltas(chunks, 0)
            for e in (part["logprobs"] or {"content": []})["content"]
        ]
        assert streamed == content

    run(check, engine(SPOKEN))


def test_max_completion_tokens_wins() -> None:
    async def check(server: Server) -> None:
        for fields, expected in (
            ({"max_tokens": 5, "max_completion_tokens": 3}, 3),
            ({"max_tokens": 5, "max_completion_tokens": None}, 5),
            ({"max_completion_tokens": 4}, 4),
        ):
            assert (await server.chat(**fields))["usage"]["completion_tokens"] == expected

    run(check)


def test_messages_of_every_kind() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "ann",
        },
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "audio": None,
            "function_call": None,
            "annotations": [],
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "user", "content": "and <|im_end|>?"},
    ]

    async def check(server: Server) -> None:
        await server.chat(messages=messages, max_tokens=1)
        ids = list(server.engine.requests[0].prompt_ids)
        # The user's "<|im_end|>" is text: only the template's own five are special tokens.
        assert ids.count(tokenizer().encode("<|im_end|>", False)[0]) == 5
        assert ids == tokenizer().encode_chat(messages)

    run(check)


def test_template_arguments_reach_the_template() -> None:
    async def check(server: Server) -> None:
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "chat_template_kwargs": {"enable_thinking": True},
        }
        assert (await server.post(CHAT, body)).status_code == 200

    run(check, engine(SPOKEN))


def test_a_model_without_a_chat_template_says_so() -> None:
    async def check(server: Server) -> None:
        response = await server.post(CHAT, {"messages": [{"role": "user", "content": "x"}]})
        assert response.status_code == 400
        error = response.json()["error"]
        assert "chat template" in error["message"] and error["param"] == "messages"

    bare: Tokenizer = tokenizer(chat=False)
    run(check, tokenizer=bare)


def test_token_ids_and_prompt_logprobs() -> None:
    async def check(server: Server) -> None:
        body = await server.chat(return_token_ids=True, prompt_logprobs=0, max_tokens=4)
        prompt = list(server.engine.requests[0].prompt_ids)
        assert body["prompt_token_ids"] == prompt
        assert body["choices"][0]["token_ids"] == tokenizer().encode(SPOKEN, False)[:4]
        assert [list(entry or {}) for entry in body["prompt_logprobs"]] == [
            [],
            *([str(t)] for t in prompt[1:]),
        ]
        chunks = await server.stream(CHAT, return_token_ids=True, max_tokens=4)
        assert chunks[0]["prompt_token_ids"] == prompt
        ids = [i for part in deltas(chunks, 0)[1:] for i in part["token_ids"]]
        assert ids == tokenizer().encode(SPOKEN, False)[:4]

    run(check, engine(SPOKEN))


def test_stop_string_and_stop_token() -> None:
    async def check(server: Server) -> None:
        choice = (await server.chat(stop="😀"))["choices"][0]
        assert (choice["message"]["content"], choice["stop_reason"]) == ("hello ", "😀")
        token = tokenizer().encode(SPOKEN, False)[1]
        choice = (await server.chat(stop_token_ids=[token]))["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)

    run(check, engine(SPOKEN))


@pytest.mark.case("C2")
@pytest.mark.case("C3")
@pytest.mark.parametrize("arguments", ['{"x": 1}', '{"a": ', "", "[1]"])
def test_a_tool_call_of_an_earlier_turn(arguments: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "done"}]},
    ]
    bundled = Tokenizer.load(files("moebius") / "bundled")

    async def check(server: Server) -> None:
        await server.chat(messages=messages, max_tokens=1)
        await server.chat(
            messages=[messages[0], {**messages[1], "content": ""}, messages[2]], max_tokens=1
        )
        first, second = server.engine.requests
        assert first.prompt_ids == second.prompt_ids

    for ours in (tokenizer(), bundled):
        run(check, FakeEngine(constant([5]), vocab_size=ours.vocab_size), tokenizer=ours)
