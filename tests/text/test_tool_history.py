"""Tool calls of earlier turns, as clients send them back, through the families' templates."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template as compiled

from moebius.errors import RequestError
from moebius.text import ChatTemplate
from moebius.text.chat import normalise_messages
from moebius.text.probe import TemplateFacts
from text.family_templates import FAMILIES, Family
from text.tiny_tokenizers import byte_level

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]
ARGUMENTS = {"city": 'Köln "am" <Rhein>', "days": [1, 2.5, None], "deep": {"x": True}}


@pytest.fixture(scope="module")
def theirs() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), **SPECIALS)


@pytest.fixture(scope="module")
def probed() -> dict[str, tuple[ChatTemplate, TemplateFacts]]:
    templates = {name: ChatTemplate(family.source) for name, family in FAMILIES.items()}
    return {name: (template, template.probe(SPECIALS)) for name, template in templates.items()}


def render(probed: tuple[ChatTemplate, TemplateFacts], messages: list[dict[str, Any]]) -> str:
    template, facts = probed
    variables = {**SPECIALS, "tools": TOOLS, "documents": None, "add_generation_prompt": True}
    return template.render({**variables, "messages": normalise_messages(messages, facts)})


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": "abcdef123",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
        **more,
    }


def chat(first: dict[str, Any], content: Any = "warm") -> list[dict[str, Any]]:
    """A question, a call, its result, an answer, and the next question."""
    return [
        {"role": "user", "content": "What is it like?"},
        {"role": "assistant", **first},
        {"role": "tool", "tool_call_id": "abcdef123", "name": "weather", "content": content},
        {"role": "assistant", "content": "<think>so</think>\nIt is warm."},
        {"role": "user", "content": "And tomorrow?"},
    ]


def as_wanted(
    family: Family, content: str | None, arguments: dict[str, Any]
) -> list[dict[str, Any]]:
    """The same chat as the family's own documentation would write it for transformers."""
    given = arguments if family.objects else json.dumps(arguments, ensure_ascii=False)
    says = {"content": content}
    if content is None:
        says = {"absent": {}, "null": {"content": None}, "empty": {"content": ""}}[
            family.no_content
        ]
    messages = chat({**says, "tool_calls": [call(given)]})
    for message in messages:
        if message["role"] in family.parts and "content" in message:
            message["content"] = [{"type": "text", "text": message["content"]}]
    return messages


@pytest.mark.case("C2")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_probe_finds_what_a_template_takes(probed, name):
    family = FAMILIES[name]
    facts = TemplateFacts(
        family.no_content,
        family.objects,
        family.any_arguments,
        family.parts,
        family.developer,
        family.late_system,
    )
    assert probed[name][1] == facts


@pytest.mark.case("C2")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tool_call_renders_as_transformers_renders_it(theirs, probed, name):
    family = FAMILIES[name]
    options = {"tools": TOOLS, "add_generation_prompt": True}

    def expected(content: str | None) -> str:
        messages = as_wanted(family, content, ARGUMENTS)
        if (
            family.no_content == "null"
        ):  # apply_chat_template leaves null out; its environment does not
            return compiled(family.source).render(messages=messages, **options, **SPECIALS)
        return theirs.apply_chat_template(
            messages, chat_template=family.source, tokenize=False, **options
        )

    text = json.dumps(ARGUMENTS, ensure_ascii=False)
    for arguments in (text, ARGUMENTS):  # clients send the one, old ones the other
        for first in ({"content": None}, {}, {"content": ""}, {"content": "Let me see."}):
            content = first.get("content")
            assert render(
                probed[name], chat({**first, "tool_calls": [call(arguments)]})
            ) == expected(content)
    assert expected(None).count("None") == expected("Let me see.").count(
        "None"
    )  # it prints no null


@pytest.mark.case("C2")
@pytest.mark.parametrize("name", FAMILIES)
def test_contents_in_parts_are_contents(probed, name):
    parts = [{"type": "text", "text": "warm"}, {"type": "text", "text": "and dry"}]
    joined = "warmand dry" if FAMILIES[name].parts else "warm\nand dry"
    text = render(probed[name], chat({"content": [], "tool_calls": [call("{}")]}, parts))
    assert joined in text or json.dumps(joined)[1:-1] in text
    as_text = render(probed[name], chat({"content": "", "tool_calls": [call("{}")]}, joined))
    assert text == as_text
    system = [{"role": "system", "content": parts[:1]}, {"role": "user", "content": "x"}]
    if name not in ("deepseek", "mistral"):  # these leave it out, or refuse it
        assert "warm" in render(probed[name], system)


@pytest.mark.case("C2")
def test_reasoning_of_earlier_turns_goes_by_all_its_names(theirs):
    source = (
        "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning "
        "}}\n{% endfor %}"
    )
    thoughts = [
        {"reasoning": "a"},
        {"reasoning_content": "b"},
        {"thinking": "c", "reasoning": "d"},
        {"thinking": None},
    ]
    messages = [{"role": "assistant", "content": "x", **thought} for thought in thoughts]
    rendered = ChatTemplate(source).render(
        {"messages": normalise_messages(messages, TemplateFacts())}
    )
    assert rendered == theirs.apply_chat_template(messages, chat_template=source, tokenize=False)


@pytest.mark.case("C2")
def test_a_developer_is_a_system_where_nobody_knows_it(probed):
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert "<|start|>developer<|message|>Be brief." in render(probed["developer"], messages)
    assert "<|im_start|>system\nBe brief." in render(probed["chatml"], messages)


BROKEN = ['{"a": ', "no JSON", '{"a": 1}}', "[1]", "3", '"text"', [1], 3, True, "[" * 100_000]
NOTHING = ["", None, "null", "{}", {}, " "]


@pytest.mark.case("C3")
@pytest.mark.parametrize("name", FAMILIES)
def test_broken_arguments_of_an_earlier_turn_do_not_end_the_conversation(probed, name, caplog):
    empty = render(probed[name], chat({"content": None, "tool_calls": [call({})]}))
    for arguments in BROKEN:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="moebius"):
            text = render(probed[name], chat({"content": None, "tool_calls": [call(arguments)]}))
        if FAMILIES[name].any_arguments:
            raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
            assert raw in text and not caplog.records
        else:
            assert text == empty
            (record,) = caplog.records
            assert (
                "messages[1].tool_calls[0]: function.arguments is no JSON object"
                in record.getMessage()
            )


@pytest.mark.case("C3")
@pytest.mark.parametrize("name", FAMILIES)
def test_no_arguments_are_an_empty_object(probed, name, caplog):
    empty = render(probed[name], chat({"content": None, "tool_calls": [call({})]}))
    for arguments in NOTHING:
        assert (
            render(probed[name], chat({"content": None, "tool_calls": [call(arguments)]})) == empty
        )
    missing = call({})
    del missing["function"]["arguments"]
    assert render(probed[name], chat({"content": None, "tool_calls": [missing]})) == empty
    assert not caplog.records


@pytest.mark.case("C3")
def test_what_else_clients_leave_out_or_repeat(probed):
    complete = render(probed["deepseek"], chat({"content": None, "tool_calls": [call("{}")]}))
    assert complete == render(
        probed["deepseek"], chat({"content": None, "tool_calls": [call("{}", type=None)]})
    )
    for name in ("hermes", "qwen3", "deepseek"):
        twice = chat({"content": None, "tool_calls": [call("{}"), call("{}")]})  # of one id
        assert render(probed[name], twice).count("weather") >= 2
        without = [
            {**message} for message in chat({"content": None, "tool_calls": [call("{}", id=None)]})
        ]
        del without[2]["tool_call_id"]
        assert "warm" in render(probed[name], without)
    for calls in ([], None):
        answer = render(probed["mistral"], chat({"content": "Hm.", "tool_calls": calls})[:2])
        assert answer.endswith("Hm.</s>")  # an empty list of calls is none


@pytest.mark.case("C3")
@pytest.mark.parametrize(
    "function", [{}, {"name": None}, {"name": ""}, {"name": 3, "arguments": "{}"}]
)
def test_a_call_without_a_name_is_refused(function):
    with pytest.raises(RequestError, match="must name its function") as caught:
        normalise_messages(
            chat({"tool_calls": [{"id": "1", "function": function}]}), TemplateFacts()
        )
    assert caught.value.param == "messages[1].tool_calls[0].function.name"


def test_a_probe_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr("moebius.text.probe._SECONDS", 0.1)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
    assert ChatTemplate(endless).probe({}) == TemplateFacts()
    assert ChatTemplate("{{ raise_exception('no') }}").probe({}) == TemplateFacts()


@pytest.mark.case("C3")
@pytest.mark.parametrize("name", FAMILIES)
def test_half_a_character_in_earlier_arguments_does_not_end_the_conversation(probed, name):
    facts = probed[name][1]
    given = '{"city": "K\\ud83dln", "whole": "\\ud83d\\ude00"}'
    text = render(probed[name], chat({"content": None, "tool_calls": [call(given)]}))
    text.encode()
    arguments = normalise_messages(chat({"content": None, "tool_calls": [call(given)]}), facts)[1][
        "tool_calls"
    ]
    found = arguments[0]["function"]["arguments"]
    assert found == (
        {"city": "K\ufffdln", "whole": "\U0001f600"} if facts.object_arguments else given
    )


@pytest.mark.case("C2")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_refusal_is_what_an_assistant_said(probed, name):
    question = {"role": "user", "content": "Hello"}
    said = [{"type": "text", "text": "Well. "}, {"type": "refusal", "refusal": "I cannot."}]
    joined = [question, {"role": "assistant", "content": "Well. \nI cannot."}, question]
    parts = [question, {"role": "assistant", "content": said}, question]
    if "assistant" not in probed[name][1].parts:
        assert render(probed[name], parts) == render(probed[name], joined)
    assert "I cannot." in render(probed[name], parts)
