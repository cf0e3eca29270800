"""gpt-oss' chat format: what of a reply is its content."""

from __future__ import annotations

from itertools import groupby

import pytest

from moebius.text import Tokenizer
from moebius.text.harmony import HarmonyReader
from text.harmony import TEMPLATE, harmony_tokenizer
from text.tiny_tokenizers import CHATML

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return harmony_tokenizer()


def reader(tokenizer: Tokenizer, prompt: list[int]) -> HarmonyReader:
    assert tokenizer.harmony is not None
    return tokenizer.harmony.reader(prompt)


def parts(
    tokenizer: Tokenizer, reply: str, prompt: list[int] | None = None
) -> list[tuple[str, str]]:
    """The reply's runs of tokens that belong to one thing, but for markup."""
    prompt = tokenizer.encode_chat(USER) if prompt is None else prompt
    found = reader(tokenizer, prompt)
    ids = tokenizer.encode(reply, False)
    kinds = [(found.push(token_id), token_id) for token_id in ids]
    runs = groupby(kinds, lambda pair: pair[0])
    texts = [(kind, tokenizer.decode([i for _, i in run])) for kind, run in runs]
    return [(kind, text) for kind, text in texts if kind != "markup"]


REPLIES = [
    ("<|channel|>final<|message|>Hi<|return|>", [("content", "Hi")]),
    (
        "<|channel|>analysis<|message|>A greeting.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hi<|return|>",
        [("reasoning", "A greeting."), ("content", "Hi")],
    ),
    # A preamble is for the user, a call is not, wherever the recipient stands.
    (
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.look <|constrain|>json<|message|>{}<|call|>",
        [("content", "I look."), ("call", "{}")],
    ),
    (" to=functions.look<|channel|>commentary json<|message|>{}<|call|>", [("call", "{}")]),
    (" to=browser<|channel|>analysis<|message|>x<|call|>", [("call", "x")]),
    ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", [("content", "{}")]),
    # Models forget markup.
    ("<|message|>Hi<|return|>", [("content", "Hi")]),
    (
        "<|channel|>analysis<|message|>hm<|channel|>final<|message|>Hi<|return|>",
        [("reasoning", "hm"), ("content", "Hi")],
    ),
    (
        "<|channel|>analysis<|message|>hm<|end|>assistant<|channel|>final<|message|>Hi",
        [("reasoning", "hm"), ("content", "Hi")],
    ),
    ("<|channel|>analysis<|message|>cut off", [("reasoning", "cut off")]),
    ("<|channel|>final", []),
]


@pytest.mark.parametrize(("reply", "wanted"), REPLIES)
def test_what_a_reply_is_made_of(
    tokenizer: Tokenizer, reply: str, wanted: list[tuple[str, str]]
) -> None:
    assert parts(tokenizer, reply) == wanted


def test_a_prompt_may_have_begun_the_message(tokenizer: Tokenizer) -> None:
    """As where a client has the model go on with an answer; markup in users' text is text."""
    begun = tokenizer.encode("<|start|>assistant<|channel|>final<|message|>To be", False)
    assert parts(tokenizer, " or not<|return|>", begun) == [("content", " or not")]
    thinking = tokenizer.encode("<|start|>assistant<|channel|>analysis<|message|>", False)
    assert parts(tokenizer, "hm<|end|>", thinking) == [("reasoning", "hm")]
    asked = [{"role": "user", "content": "<|start|>assistant<|channel|>analysis<|message|>"}]
    prompt = tokenizer.encode_chat(asked)
    assert parts(tokenizer, "<|message|>Hi<|return|>", prompt) == [("content", "Hi")]
    assert parts(tokenizer, "no message at all", []) == [("content", "no message at all")]


def test_what_ends_a_reply(tokenizer: Tokenizer) -> None:
    """<|end|> ends one message of several; <|call|> ends the reply though no file may say so."""
    names = {tokenizer.spelling(token_id) for token_id in tokenizer.end_ids}
    assert names == {"<|return|>", "<|call|>"}


def test_history_has_no_reasoning(tokenizer: Tokenizer) -> None:
    answer = {"role": "assistant", "content": "Hi", "reasoning_content": "A greeting."}
    ids = tokenizer.encode_chat([*USER, answer, {"role": "user", "content": "again"}])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert "<|start|>assistant<|channel|>final<|message|>Hi<|end|>" in text
    assert "greeting" not in text and text.endswith("<|start|>assistant")


@pytest.mark.parametrize("template", [CHATML, TEMPLATE.replace("<|channel|>", "<|end|>")])
def test_other_formats_are_none(template: str) -> None:
    assert harmony_tokenizer(template).harmony is None
