"""Replies as transformers' own parser reads them, where it has a description of the format."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.cli.serving import utils as serving
from transformers.utils.chat_parsing import parse_response

from moebius.text.replies.detect import KINDS
from text.replies import TOOLS, family, said

THINK = ("<think>", "</think>")
WANTED = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in TOOLS.items()]


def described(model_type: str) -> dict[str, Any]:
    """transformers' description of a model type's replies."""
    templates: dict[tuple[str, ...], dict[str, Any]] = serving._RESPONSE_TEMPLATE_FALLBACKS
    return next(spec for types, spec in templates.items() if model_type in types)


HERMES = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
)
XML = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\nYork\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)
GEMMA = '<|tool_call>call:get_weather{city:<|"|>Köln, "am" Rhein<|"|>,days:2}<tool_call|>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
CASES = [
    ("qwen3", "hermes", "Hello there!"),
    ("qwen3", "hermes", "<think>\nHm.\n</think>\n\nHello there!"),
    ("qwen3", "hermes", HERMES),
    ("qwen3", "hermes", f"<think>\nHm.\n</think>\n\nI look.\n{HERMES}\n{NOW}"),
    ("qwen3_5", "qwen-xml", XML),
    ("qwen3_5", "qwen-xml", f"<think>\nHm.\n</think>\n\n{XML}\n{XML}"),
    ("gemma4", "gemma4", GEMMA),
    ("gemma4", "gemma4", f"<|channel>thought\nHm.<channel|>{GEMMA}{GEMMA}"),
    ("gemma4", "gemma4", "<|channel>thought\nHm.\n<channel|>Hello there!"),
]


@pytest.mark.parametrize(("model_type", "name", "reply"), CASES)
def test_replies_as_transformers_reads_them(model_type: str, name: str, reply: str) -> None:
    thinking = ("<|channel>", "<channel|>") if model_type == "gemma4" else THINK
    tokenizer = family((*KINDS[name].spellings, *thinking), " ".join(thinking))
    found = said(tokenizer, reply, replies=tokenizer.replies.with_tools(name))
    spec = described(model_type)
    anchor = spec["start_anchor"]
    prefix = anchor if isinstance(anchor, str) else anchor[0]
    theirs = parse_response(reply, spec, prefix=prefix, tools=WANTED)
    # White space round a part is the format's, and they keep or drop more of it.
    assert (found.content or "").strip() == (theirs.get("content") or "").strip()
    assert (found.reasoning or "").strip() == (theirs.get("reasoning_content") or "").strip()
    called = [call["function"] for call in theirs.get("tool_calls") or []]
    ours = [(call.name, json.loads(call.arguments)) for call in found.calls]
    assert ours == [(call["name"], call["arguments"]) for call in called]
