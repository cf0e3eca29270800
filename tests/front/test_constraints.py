"""What a reply is held to beside its parameters: where its grammar begins, and its budget of
reasoning."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import pytest

from moebius.engine.client import EngineInfo
from moebius.errors import RequestError
from moebius.front.choices import ChoiceOpener
from moebius.front.conversation import Conversation, ReasoningSettings
from moebius.front.tools import Tool, ToolChoice
from moebius.request.constraint import Constraint, Grammar, ReasoningBudget
from moebius.request.params import SamplingParams, ServingLimits
from moebius.request.structured import StructuredOutput
from moebius.text import EncodedPrompt, Tokenizer
from text.harmony import harmony_tokenizer
from text.replies import family

USER = {"role": "user", "content": "hello"}
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
QWEN = family(MARKERS, "<tool_call> <think> </think>")
HARMONY = harmony_tokenizer()


def ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, False))


def constraint(
    tokenizer: Tokenizer,
    conversation: Conversation,
    params: SamplingParams | None = None,
    prompt: EncodedPrompt | None = None,
) -> Constraint | None:
    """What the engine is given."""
    replies = tokenizer.replies
    info = EngineInfo(ServingLimits(tokenizer.vocab_size, 4096), frozenset({1}), 4, 64, "fp")
    (choice,) = ChoiceOpener(tokenizer, info).open(
        prompt or conversation.prompt(tokenizer, replies),
        conversation.params(params or SamplingParams(), replies),
        (f"r{i}" for i in count()),
        continues=False,
        arrival=0.0,
        expected=conversation.expected(replies),
    )
    return choice.request.constraint


def grammar(tokenizer: Tokenizer, behind: str | None = None, **structured: Any) -> Grammar:
    """That of a reply to a prompt that goes on like this."""
    chat = Conversation([USER])
    prompt = chat.prompt(tokenizer, tokenizer.replies)
    if behind is not None:
        prompt = EncodedPrompt([*prompt.ids, *ids(tokenizer, behind)], prompt.generation_start)
    params = SamplingParams(structured=StructuredOutput(**structured or {"regex": "a"}))
    found = constraint(tokenizer, chat, params, prompt)
    assert found is not None and found.grammar is not None
    return found.grammar


def test_a_grammar_begins_behind_the_reasoning() -> None:
    opens, closes = ids(QWEN, "<think>"), ids(QWEN, "</think>")
    calls = ids(QWEN, "<tool_call>")
    free = grammar(QWEN)
    assert (free.after, free.openers, free.banned) == ((closes,), opens, calls)
    begun = grammar(QWEN, "<think>\n")
    assert (begun.after, begun.openers, begun.banned) == ((closes,), (), calls)
    over = grammar(QWEN, "<think>\n\n</think>\n\n")
    assert (over.after, over.openers, over.banned) == ((), (), ())
    # Between them there may be line breaks, which nobody wants in front of an answer.
    assert len(json.loads(free.text)["grammars"]) == len(json.loads(begun.text)["grammars"]) == 2
    assert len(json.loads(over.text)["grammars"]) == 1


def test_a_grammar_of_harmonys_begins_behind_the_answers_head() -> None:
    heads = tuple(
        ids(HARMONY, f"<|channel|>final{kind}<|message|>")
        for kind in ("", " <|constrain|>json", "<|constrain|>json", " json")
    )
    for behind in (None, "<|channel|>analysis<|message|>Hm"):
        found = grammar(HARMONY, behind)
        assert (set(found.after), found.openers) == (set(heads), ())
    assert grammar(HARMONY, "<|channel|>final<|message|>To be").after == ()


def test_a_grammar_begins_at_once_where_no_token_tells_the_end_of_reasoning() -> None:
    for tokenizer in (family(), family((), "<think> </think>")):
        assert grammar(tokenizer).after == ()


def budgeted(tokenizer: Tokenizer, behind: str = "") -> ReasoningBudget:
    chat = Conversation([USER], reasoning=ReasoningSettings(budget=5))
    prompt = chat.prompt(tokenizer, tokenizer.replies)
    prompt = EncodedPrompt([*prompt.ids, *ids(tokenizer, behind)], prompt.generation_start)
    found = constraint(tokenizer, chat, prompt=prompt)
    assert found is not None and found.grammar is None and found.budget is not None
    assert found.budget.tokens == 5
    return found.budget


def test_a_budget_forces_what_the_model_itself_would_write() -> None:
    opens, closes = ids(QWEN, "<think>"), ids(QWEN, "</think>")
    for behind, begun in (("", False), ("<think>\n", True)):
        found = budgeted(QWEN, behind)
        assert (found.start, found.end, found.begun) == (opens, closes, begun)
        assert found.closing == ids(QWEN, "\n</think>")
    found = budgeted(HARMONY)
    assert found.start == ids(HARMONY, "<|channel|>analysis<|message|>")
    assert found.end == found.closing == ids(HARMONY, "<|end|>")


def test_a_budget_needs_reasoning_between_tokens() -> None:
    chat = Conversation([USER], reasoning=ReasoningSettings(budget=5))
    for tokenizer in (family(), family((), "<think> </think>")):
        with pytest.raises(RequestError, match="between tokens") as raised:
            constraint(tokenizer, chat)
        assert raised.value.param == "thinking_token_budget"


def test_a_marker_that_may_not_be_written_is_banned() -> None:
    tools = (Tool("now"),)
    silent = Conversation([USER], tools, ToolChoice("none"))
    assert constraint(QWEN, silent) == Constraint(bad_words=(ids(QWEN, "<tool_call>"),))
    # Where no one token begins a call, the tools are not shown at all.
    assert constraint(family((), "<function_calls>"), silent) is None
    assert constraint(QWEN, Conversation([USER], tools)) is None


def test_calls_that_must_be_made_are_held_to_behind_the_reasoning() -> None:
    tools = (Tool("now"), Tool("then", strict=True))
    closes = ids(QWEN, "</think>")
    for choice in (ToolChoice("required"), ToolChoice("required", frozenset(["now"]), one=True)):
        found = constraint(QWEN, Conversation([USER], tools, choice))
        assert found is not None and found.grammar is not None
        assert found.grammar.after == (closes,)
        assert ("then" in found.grammar.text) is not choice.one
    # Free text and calls of it, where one that may be called is strict.
    assert constraint(QWEN, Conversation([USER], tools)) is not None
    allowed = ToolChoice("auto", frozenset(["now"]))
    assert constraint(QWEN, Conversation([USER], tools, allowed)) is None
    # harmony's grammar is that of the whole reply.
    found = constraint(HARMONY, Conversation([USER], tools, ToolChoice("required")))
    assert found is not None and found.grammar is not None and found.grammar.after == ()


@pytest.mark.parametrize("tokenizer", [QWEN, HARMONY], ids=["qwen", "harmony"])
def test_a_keyword_that_is_not_held_to_is_refused_with_its_tools_name(tokenizer: Tokenizer) -> None:
    """llguidance tells a line of the grammar of all tools, which no client has seen."""
    wrong = {"type": "object", "properties": {"days": {"type": "array", "uniqueItems": True}}}
    right = {"type": "object", "properties": {"days": {"type": "array"}}}
    schemas = {"first": right, "second": wrong, "third": right}
    tools = tuple(Tool(name, parameters=each, strict=True) for name, each in schemas.items())
    for choice in (ToolChoice(), ToolChoice("required")):
        with pytest.raises(RequestError) as raised:
            constraint(tokenizer, Conversation([USER], tools, choice))
        assert str(raised.value) == 'tools: second: Unimplemented keys: ["uniqueItems"]'
        assert raised.value.param == "tools"


def test_what_cannot_be_held_to_is_refused_by_its_name() -> None:
    schema = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}}
    chat = Conversation([USER], (Tool("f", parameters=schema, strict=True),))
    tokenizer = family((), "<function= <parameter= <tool_call>")
    with pytest.raises(RequestError, match="f: 'format' of a string") as raised:
        constraint(tokenizer, chat)
    assert raised.value.param == "tools"
    lenient = Conversation([USER], (Tool("f", parameters=schema),), ToolChoice("required"))
    assert constraint(tokenizer, lenient) is not None
    with pytest.raises(RequestError, match="strict"):
        constraint(QWEN, chat, SamplingParams(structured=StructuredOutput(regex="a")))
