"""Hermes' tool calls and reasoning between <think> and </think>, as Qwen's models write them."""

from __future__ import annotations

import json

import pytest

from moebius.text import EncodedPrompt, Tokenizer
from moebius.text.replies import CallArguments
from text.replies import calls, events, family, said

MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
SAYS = "<tool_call> </tool_call> <think> </think>"


@pytest.fixture(scope="module", params=["tokens", "text"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """With a token for each marker, and with some that are spelled."""
    return family(MARKERS if request.param == "tokens" else (), SAYS)


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln 🙂"}}\n</tool_call>'
ARGUMENTS = '{"city": "Köln 🙂"}'


def test_a_call(tokenizer: Tokenizer) -> None:
    found = said(tokenizer, CALL)
    assert calls(found) == [("get_weather", ARGUMENTS)]
    assert (found.content, found.reasoning) == (None, None)
    (call,) = found.calls
    assert call.id.startswith("call_") and len(call.id) == 29


def test_content_and_several_calls(tokenizer: Tokenizer) -> None:
    """White space between calls is nothing; what was said before the first is content."""
    second = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    found = said(tokenizer, f"Let me look.\n{CALL}\n{second}\n")
    assert found.content == "Let me look.\n"
    assert calls(found) == [("get_weather", ARGUMENTS), ("now", "{}")]
    assert len({call.id for call in found.calls}) == 2
    assert said(tokenizer, f"{CALL}\nThat was it.").content == "That was it."


FORMS = [
    '{"arguments": {"city": "A"}, "name": "get_weather"}',
    '{"name": "get_weather", "parameters": {"city": "A"}}',
    '{"type": "function", "name": "get_weather", "arguments": {"city": "A"}, "id": [1, {"x": 2}]}',
    '{"name": "get_weather", "arguments": "{\\"city\\": \\"A\\"}"}',
    ' { "name" : "get_weather" , "arguments" : {"city": "A"} } ',
]


@pytest.mark.parametrize("form", FORMS)
def test_a_call_may_be_written_in_several_ways(tokenizer: Tokenizer, form: str) -> None:
    found = said(tokenizer, f"<tool_call>{form}</tool_call>")
    [(name, arguments)] = calls(found)
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "A"})
    assert found.content is None


@pytest.mark.parametrize("form", ['{"name": "now"}', '{"name": "now", "arguments": null}'])
def test_no_arguments_are_an_empty_object(tokenizer: Tokenizer, form: str) -> None:
    assert calls(said(tokenizer, f"<tool_call>{form}</tool_call>")) == [("now", "{}")]


WRONG = [
    "<tool_call>\n{'name': 'now'}\n</tool_call>",
    '<tool_call>\n{"name": "now", "arguments": {city}}\n</tool_call>',
    '<tool_call>\n{"name": "now", "arguments": {\'city\': 1}}\n</tool_call>',
    '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    "<tool_call>I would call something here.</tool_call>",
    '<tool_call>{"name": "now", "argum',
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_call_is_content_as_it_was_written(tokenizer: Tokenizer, wrong: str) -> None:
    found = said(tokenizer, wrong)
    assert (found.content, found.calls) == (wrong, ())


def test_a_good_call_behind_a_broken_one(tokenizer: Tokenizer) -> None:
    found = said(tokenizer, f"<tool_call>{{oh</tool_call>\n{CALL}")
    assert calls(found) == [("get_weather", ARGUMENTS)]
    assert found.content == "<tool_call>{oh</tool_call>\n"


def test_arguments_that_break_later_stay_as_they_are_written(tokenizer: Tokenizer) -> None:
    """The call is under way: its client hears what the model wrote, and can tell it."""
    found = said(
        tokenizer,
        '<tool_call>{"name": "get_weather", "arguments": {"city": nowhere}}</tool_call>Sorry.',
    )
    assert calls(found) == [("get_weather", '{"city": nowhere}}')]
    assert found.content == "Sorry."


def test_an_unclosed_call(tokenizer: Tokenizer) -> None:
    """Is one where its JSON is complete; one that is cut off has the arguments that it has."""
    whole = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "A"}'
    assert calls(said(tokenizer, whole + "}")) == [("get_weather", '{"city": "A"}')]
    assert calls(said(tokenizer, whole)) == [("get_weather", '{"city": "A"}')]
    cut = said(tokenizer, whole[:-3], cut=True)
    assert calls(cut) == [("get_weather", '{"city": "')]


def test_line_breaks_in_strings_are_escaped(tokenizer: Tokenizer) -> None:
    """JSON has no raw ones, models do."""
    found = said(tokenizer, '<tool_call>{"name": "now", "arguments": {"a": "x\ny\tz"}}</tool_call>')
    [(_, arguments)] = calls(found)
    assert json.loads(arguments) == {"a": "x\ny\tz"}


def test_arguments_come_as_they_are_written(tokenizer: Tokenizer) -> None:
    """Not at the call's end, but for what may be the beginning of its closer."""
    found = events(tokenizer, CALL, range(len(CALL)))
    pieces = [event.text for event in found if isinstance(event, CallArguments)]
    assert "".join(pieces) == ARGUMENTS and len(pieces) > len(ARGUMENTS) // 2


def test_reasoning(tokenizer: Tokenizer) -> None:
    found = said(tokenizer, "<think>\nThey greet me.\n\n</think>\n\nHello!\n")
    assert (found.reasoning, found.content) == ("They greet me.", "Hello!\n")
    found = said(tokenizer, "<think>\n\n</think>\n\nHello!")
    assert (found.reasoning, found.content) == (None, "Hello!")
    found = said(tokenizer, "<think>I never end", cut=True)
    assert (found.reasoning, found.content) == ("I never end", None)
    found = said(tokenizer, f"<think>a</think>b<think>c</think>\n{CALL}")
    assert (found.reasoning, found.content, len(found.calls)) == ("ac", "b", 1)


def test_the_prompt_may_have_begun_the_reasoning(tokenizer: Tokenizer) -> None:
    begun = tokenizer.encode("<|im_start|>assistant\n<think>\n", False)
    for start in (0, None):
        prompt = EncodedPrompt(begun, start)
        found = said(tokenizer, "Hm.\n</think>\n\nHello!", prompt=prompt)
        assert (found.reasoning, found.content) == ("Hm.", "Hello!")
        found = said(tokenizer, "<think>\nHm.</think>Hello!", prompt=prompt)
        assert (found.reasoning, found.content) == ("Hm.", "Hello!"), "some open it again"
    ended = tokenizer.encode("<|im_start|>assistant\n<think>\n\n</think>\n\n", False)
    for start in (0, None):
        found = said(tokenizer, "Hello!", prompt=EncodedPrompt(ended, start))
        assert (found.reasoning, found.content) == (None, "Hello!")


def test_a_users_marker_begins_nothing(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "What does <think> mean?\n<think>"}]
    prompt = tokenizer.chat_prompt(messages)
    assert said(tokenizer, "Hello!", prompt=prompt).content == "Hello!"
    unknown = EncodedPrompt(prompt.ids, None)
    assert said(tokenizer, "Hello!", prompt=unknown).content == "Hello!"


def test_a_closer_without_an_opener(tokenizer: Tokenizer) -> None:
    """Is nothing where nothing was said; what was said stays what it was."""
    assert said(tokenizer, "</think>\n\nHello!").content == "Hello!"
    found = said(tokenizer, "So be it.</think>Hello!")
    assert (found.reasoning, found.content) == (None, "So be it.</think>Hello!")


def test_a_call_may_end_the_reasoning(tokenizer: Tokenizer) -> None:
    found = said(tokenizer, f"<think>\nI look it up.\n{CALL}")
    assert (found.reasoning, calls(found)) == ("I look it up.", [("get_weather", ARGUMENTS)])
    found = said(tokenizer, "<think>A <tool_call> would do.</think>Yes.")
    assert (found.reasoning, found.content) == ("A <tool_call> would do.", "Yes.")


def test_without_tools_nothing_is_a_call(tokenizer: Tokenizer) -> None:
    found = said(tokenizer, f"<think>Hm.</think>{CALL}", tools=None)
    assert (found.reasoning, found.content, found.calls) == ("Hm.", CALL, ())


def test_markers_are_tokens_where_the_vocabulary_has_them() -> None:
    """What is spelled by other tokens is text."""
    tokenizer = family(MARKERS, SAYS)
    reply = f"<think>Hm.</think>{CALL}"
    assert said(tokenizer, reply, spelled=True).content == reply
    assert said(family((), SAYS), reply, spelled=True).reasoning == "Hm."


@pytest.mark.parametrize("text", ["", " ", "\n\n", "  Hello", "<", "<tool", "a < b <think"])
def test_ordinary_text_is_content(tokenizer: Tokenizer, text: str) -> None:
    assert (said(tokenizer, text).content or "") == text


def test_where_reasoning_ends() -> None:
    """As token ids, for what is to begin behind it or to end it."""
    tokenizer = family(MARKERS, SAYS)
    prompt = tokenizer.chat_prompt([{"role": "user", "content": "hello"}])
    ends = tokenizer.replies.reasoning_ends(prompt)
    [opens], [closes] = (tokenizer.encode(marker, False) for marker in MARKERS[2:])
    assert ends is not None
    assert (ends.start, ends.end, ends.answers) == ((opens,), (closes,), ((closes,),))
    assert ends.forced == tuple(tokenizer.encode("\n</think>", False))
    assert (ends.state, ends.begun, ends.headed) == ("ahead", False, False)
    for behind, state in (([opens], "begun"), ([opens, closes], "over")):
        for start in (len(prompt.ids), None):
            left = tokenizer.replies.reasoning_ends(EncodedPrompt([*prompt.ids, *behind], start))
            assert left is not None and left.state == state
    assert family((), SAYS).replies.reasoning_ends(prompt) is None
    assert family().replies.reasoning_ends(prompt) is None
