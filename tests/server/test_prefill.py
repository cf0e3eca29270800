"""An answer that goes on with the last message: through the official client, against a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from moebius.text import Tokenizer
from server.fake_engine import FakeEngine, constant
from server.serving import MODEL, Server, engine, listening, run, tokenizer

PREFILL = "def f(x):\n    "
MESSAGES: list[Any] = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": PREFILL},
]
OPEN = {"add_generation_prompt": False, "continue_final_message": True}
SAID = " world 😀"


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[FakeEngine, openai.OpenAI]]:
    fake = engine(SAID)
    with (
        listening(fake) as (port, _),
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client,
    ):
        yield fake, client


def ask(client: openai.OpenAI, stream: bool, **extra: Any) -> str:
    fields: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "extra_body": {**OPEN, **extra}}
    if not stream:
        return client.chat.completions.create(**fields).choices[0].message.content or ""
    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_the_reply_holds_the_new_text_and_echo_the_prefill_first(
    live: tuple[FakeEngine, openai.OpenAI], stream: bool
) -> None:
    fake, client = live
    assert ask(client, stream) == SAID
    assert ask(client, stream, echo=True) == PREFILL + SAID
    text = tokenizer().decode(fake.requests[-1].prompt_ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n" + PREFILL


def test_without_a_word_the_last_message_is_closed_and_another_begun(
    live: tuple[FakeEngine, openai.OpenAI],
) -> None:
    fake, client = live
    client.chat.completions.create(model=MODEL, messages=MESSAGES)
    text = tokenizer().decode(fake.requests[-1].prompt_ids, skip_special_tokens=False)
    assert text.endswith(PREFILL + "<|im_end|>\n<|im_start|>assistant\n")
    extra = {"add_generation_prompt": False}
    client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=extra)
    text = tokenizer().decode(fake.requests[-1].prompt_ids, skip_special_tokens=False)
    assert text.endswith(PREFILL + "<|im_end|>\n")
    extra = {"continue_final_message": True}  # which says by itself that no other is begun
    client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=extra)
    text = tokenizer().decode(fake.requests[-1].prompt_ids, skip_special_tokens=False)
    assert text.endswith(PREFILL)


@pytest.mark.parametrize(
    "extra, param",
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"echo": True}, "echo"),
        ({**OPEN, "messages": MESSAGES[:1]}, "continue_final_message"),
    ],
)
def test_what_makes_no_sense_is_refused(
    live: tuple[FakeEngine, openai.OpenAI], extra: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        live[1].chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=extra)
    assert bad.value.param == param


def test_tokenize_counts_the_same_prompt() -> None:
    async def check(server: Server) -> None:
        await server.chat(messages=MESSAGES, **OPEN)
        counted = await server.post("/tokenize", {"messages": MESSAGES, **OPEN})
        assert counted.json()["tokens"] == list(server.engine.requests[0].prompt_ids)
        wrong = {"messages": MESSAGES, **OPEN, "add_generation_prompt": True}
        refused = await server.post("/tokenize", wrong)
        assert refused.json()["error"]["param"] == "continue_final_message"

    run(check, engine(SAID))


def test_a_word_that_follows_the_prefill_keeps_its_space() -> None:
    """Sentencepiece's vocabularies write it into the word; a text that stands alone loses it."""
    llama: Tokenizer = tokenizer("llama")
    said = llama.encode("hello world", False)
    assert llama.decode(said) == "hello world"

    async def check(server: Server) -> None:
        messages = [MESSAGES[0], {"role": "assistant", "content": "hello"}]
        choice = (await server.chat(messages=messages, **OPEN))["choices"][0]
        assert choice["message"]["content"] == " hello world"
        choice = (await server.chat(messages=messages))["choices"][0]
        assert choice["message"]["content"] == "hello world"

    fake = FakeEngine(constant(said), vocab_size=llama.vocab_size)
    run(check, fake, tokenizer=llama)
