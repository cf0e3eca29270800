"""Chats with a model of gpt-oss' format, without a socket."""

from __future__ import annotations

from server.fake_engine import FakeEngine, constant
from server.serving import Server, run
from text.harmony import harmony_tokenizer

CHAT = "/v1/chat/completions"
REPLY = (
    "<|channel|>analysis<|message|>The user greets me.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Hello there!<|return|>"
)
TOKENIZER = harmony_tokenizer()
IDS = TOKENIZER.encode(REPLY, False)


def engine() -> FakeEngine:
    size = TOKENIZER.vocab_size
    return FakeEngine(constant(IDS), vocab_size=size, eos_ids=TOKENIZER.end_ids)


def test_an_answer_is_the_final_channel() -> None:
    async def check(server: Server) -> None:
        body = await server.chat()
        (choice,) = body["choices"]
        assert choice["message"]["content"] == "Hello there!"
        assert choice["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == len(IDS)

    run(check, engine(), tokenizer=TOKENIZER)


def test_a_stream_is_too() -> None:
    async def check(server: Server) -> None:
        chunks = await server.stream(CHAT)
        said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(said) == "Hello there!" and len([text for text in said if text]) > 1
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    run(check, engine(), tokenizer=TOKENIZER)


def test_whoever_wants_special_tokens_gets_the_whole_reply() -> None:
    async def check(server: Server) -> None:
        (choice,) = (await server.chat(skip_special_tokens=False))["choices"]
        assert choice["message"]["content"] == REPLY.removesuffix("<|return|>")
        (choice,) = (await server.complete(max_tokens=99))["choices"]
        assert "The user greets me." in choice["text"], "completions have no channels"

    run(check, engine(), tokenizer=TOKENIZER)
