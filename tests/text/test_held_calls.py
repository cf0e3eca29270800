"""Tool calls that are held to a grammar: whatever a model says in it, the format's own parser reads
as calls of the tools whose arguments their schemas describe; and what models write is in it."""

from __future__ import annotations

import random
from functools import cache
from itertools import islice
from typing import Any

import pytest

from moebius.text import Tokenizer
from moebius.text.masks import Vocabulary
from moebius.text.replies.detect import KINDS
from text.harmony import harmony_tokenizer
from text.held import Held
from text.replies import TOOLS, family
from text.test_reply_formats import FAMILIES
from text.test_reply_harmony import HEADS
from text.test_reply_hermes import CALL as HERMES

RICH: dict[str, Any] = {
    "search": {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "What to look for."},
            "limit": {"type": "integer", "minimum": 1, "maximum": 50},
            "exact": {"type": "boolean"},
            "unit": {"enum": ["day", "week", None, 7]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
            "code": {"type": "string", "pattern": "^[a-c]{2}-[0-9]$"},
            "note": {"anyOf": [{"type": "string", "maxLength": 6}, {"type": "null"}]},
            "either": {"type": ["string", "integer", "array"], "items": {"type": "boolean"}},
            "where": {"$ref": "#/$defs/place"},
        },
        "required": ["query", "code", "where"],
        "additionalProperties": False,
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "in": {"$ref": "#/$defs/maybe"}},
                "required": ["x"],
                "additionalProperties": False,
            },
            "maybe": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
        },
    },
    "stop": {"type": "object", "properties": {}, "additionalProperties": False},
    "maybe": {
        "type": "object",
        "properties": {"a": {"type": "string", "minLength": 2}, "b": {"type": "number"}},
        "additionalProperties": False,
    },
}
NAMES = (*(name for name in KINDS if name != "gemma4"), "harmony")
HELD = [case for case in FAMILIES if case.name != "gemma4"]
SPELT = ("tokens", "special", "text")


@cache
def made(name: str, kind: str) -> tuple[Tokenizer, Vocabulary]:
    if name == "harmony":
        tokenizer = harmony_tokenizer()
    elif kind == "text":
        tokenizer = family()
    else:
        more = ("｜DSML｜",) if name.startswith("dsml") else ()
        tokenizer = family((*KINDS[name].spellings, *more), special=kind == "special")
    return tokenizer, Vocabulary(tokenizer, tokenizer.vocab_size + 5, tokenizer.end_ids)


def held(name: str, kind: str, tools: Any, **options: Any) -> Held:
    tokenizer, vocabulary = made(name, kind)
    return Held(tokenizer, vocabulary, tokenizer.replies.with_tools(name), tools, **options)


def drawn(held: Held, count: int) -> list[list[int]]:
    """So many whole replies."""
    found = (held.draw(random.Random(seed)) for seed in range(5 * count))
    whole = list(islice((each for each in found if each is not None), count))
    assert len(whole) == count
    return whole


@pytest.mark.parametrize("kind", SPELT)
@pytest.mark.parametrize("name", NAMES)
def test_a_reply_that_must_call_calls_as_the_schemas_say(name: str, kind: str) -> None:
    called = set()
    for several in (True, False):
        wanted = held(name, kind, RICH, several=several)
        for ids in drawn(wanted, 6):
            found = wanted.check(ids)
            assert found.calls, wanted.tokenizer.decode(ids, False)
            assert found.content is None or name == "harmony"  # which may say what it is about
            assert several or len(found.calls) == 1
            called |= {call.name for call in found.calls}
    assert len(called) > 1


@pytest.mark.parametrize("kind", SPELT)
@pytest.mark.parametrize("name", NAMES)
def test_a_reply_that_may_call_is_free_text_and_such_calls(name: str, kind: str) -> None:
    for several in (True, False):
        wanted = held(name, kind, RICH, must=False, several=several)
        for ids in drawn(wanted, 6):
            wanted.check(ids)
        for text in ("", "Hello there!", "I look it up:\n\nif a < b: x"):
            if name != "harmony":
                assert wanted.takes(wanted.tokenizer.encode_ordinary(text)), text


@pytest.mark.parametrize("kind", SPELT)
@pytest.mark.parametrize("case", HELD, ids=lambda each: each.name)
def test_what_models_write_is_taken(case: Any, kind: str) -> None:
    for must in (True, False):
        wanted = held(case.name, kind, TOOLS, must=must)
        for reply in (case.one, case.two, case.bare):
            assert wanted.takes(wanted.tokenizer._encode_marked(reply)), reply
        if not must and case.name not in ("llama3", "pythonic"):
            text = f"I look.\n\n{case.one}\nDone."
            assert wanted.takes(wanted.tokenizer._encode_marked(text))


def test_what_hermes_and_harmonys_models_write_is_taken() -> None:
    hermes = held("hermes", "tokens", TOOLS)
    assert hermes.takes(hermes.tokenizer._encode_marked(f"{HERMES}\n{HERMES}"))
    for must in (True, False):
        harmony = held("harmony", "", TOOLS, must=must)
        thought = "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"
        for head in (HEADS[0], HEADS[1], f"{thought}{HEADS[0]}"):
            reply = f'{head}{{"city": "Köln"}}<|call|>'
            assert harmony.takes(harmony.tokenizer._encode_marked(reply)), reply
    final = f"{thought}<|channel|>final<|message|>Hi<|return|>"
    assert harmony.takes(harmony.tokenizer._encode_marked(final))
