"""gpt-oss' chat format: what a reply is made of."""

from __future__ import annotations

import pytest

from moebius.text import EncodedPrompt, Tokenizer
from text.harmony import TEMPLATE, harmony_tokenizer
from text.replies import calls, said
from text.tiny_tokenizers import CHATML

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return harmony_tokenizer()


REPLIES = [
    ("<|channel|>final<|message|>Hi<|return|>", (None, "Hi")),
    (
        "<|channel|>analysis<|message|>A greeting.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hi<|return|>",
        ("A greeting.", "Hi"),
    ),
    ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", (None, "{}")),
    # Models forget markup.
    ("<|message|>Hi<|return|>", (None, "Hi")),
    ("<|channel|>analysis<|message|>hm<|channel|>final<|message|>Hi<|return|>", ("hm", "Hi")),
    ("<|channel|>analysis<|message|>hm<|end|>assistant<|channel|>final<|message|>Hi", ("hm", "Hi")),
    ("<|channel|>analysis<|message|>cut off", ("cut off", None)),
    ("<|channel|>final", (None, None)),
]


@pytest.mark.parametrize(("reply", "wanted"), REPLIES)
def test_what_a_reply_is_made_of(
    tokenizer: Tokenizer, reply: str, wanted: tuple[str | None, str | None]
) -> None:
    prompt = tokenizer.chat_prompt(USER)
    for tools in (None, {}):
        found = said(tokenizer, reply, prompt=prompt, tools=tools)
        assert ((found.reasoning, found.content), found.calls) == (wanted, ())


CALL = '{"city": "Köln"}'
HEADS = [
    "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>",
    " to=functions.get_weather<|channel|>commentary json<|message|>",
    "<|channel|>commentary to=get_weather<|message|>",
    "<|channel|>analysis to=functions.get_weather code<|message|>",
]


@pytest.mark.parametrize("head", HEADS)
def test_a_call_wherever_its_recipient_stands(tokenizer: Tokenizer, head: str) -> None:
    prompt = tokenizer.chat_prompt(USER)
    thought = "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"
    preamble = "<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant"
    found = said(tokenizer, f"{thought}{preamble}{head}{CALL}<|call|>", prompt=prompt)
    assert (found.reasoning, found.content) == ("I look.", "One moment.")
    assert calls(found) == [("get_weather", CALL)]


def test_calls_of_what_is_not_here_are_left_out(tokenizer: Tokenizer) -> None:
    """The format's own tools, and any where the client has named none."""
    prompt = tokenizer.chat_prompt(USER)
    browser = "<|channel|>analysis to=browser.search<|message|>{}<|call|>"
    assert said(tokenizer, browser, prompt=prompt).calls == ()
    found = said(tokenizer, f"{HEADS[0]}{CALL}<|call|>", prompt=prompt, tools=None)
    assert (found.reasoning, found.content, found.calls) == (None, None, ())


def test_what_is_no_json_is_content(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.chat_prompt(USER)
    found = said(tokenizer, f"{HEADS[0]}print('hello')<|call|>", prompt=prompt)
    assert (found.content, found.calls) == ("print('hello')", ())


def test_a_prompt_may_have_begun_the_message(tokenizer: Tokenizer) -> None:
    """As where a client has the model go on with an answer; markup in users' text is text."""

    def of(text: str) -> EncodedPrompt:
        return EncodedPrompt(tokenizer.encode(text, False))

    begun = of("<|start|>assistant<|channel|>final<|message|>To be")
    assert said(tokenizer, " or not<|return|>", prompt=begun).content == " or not"
    thinking = of("<|start|>assistant<|channel|>analysis<|message|>")
    assert said(tokenizer, "hm<|end|>", prompt=thinking).reasoning == "hm"
    asked = [{"role": "user", "content": "<|start|>assistant<|channel|>analysis<|message|>"}]
    prompt = tokenizer.chat_prompt(asked)
    assert said(tokenizer, "<|message|>Hi<|return|>", prompt=prompt).content == "Hi"
    assert said(tokenizer, "no message at all").content == "no message at all"


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
    assert harmony_tokenizer().replies.tools == "harmony"
    assert harmony_tokenizer(template).replies.tools is None


def test_where_reasoning_ends(tokenizer: Tokenizer) -> None:
    """The answer is behind a head of `final`, which models spell in several ways, and has one where
    there was no reasoning, too."""
    prompt = tokenizer.chat_prompt(USER)
    ends = tokenizer.replies.reasoning_ends(prompt)
    assert ends is not None and ends.headed and ends.state == "ahead"
    assert tokenizer.decode(ends.start, False) == "<|channel|>analysis<|message|>"
    assert {tokenizer.decode(head, False) for head in ends.answers} == {
        f"<|channel|>final{kind}<|message|>"
        for kind in ("", " <|constrain|>json", "<|constrain|>json", " json")
    }
    for head, state in (("analysis", "begun"), ("final", "over")):
        begun = tokenizer.encode(f"<|start|>assistant<|channel|>{head}<|message|>To be", False)
        left = tokenizer.replies.reasoning_ends(EncodedPrompt(begun))
        assert left is not None and left.state == state
