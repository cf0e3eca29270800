"""Tool calls that are held to a grammar: whatever a model says in it, the format's own parser reads
as calls of the tools whose arguments their schemas describe; and what models write is in it."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from itertools import islice
from typing import Any

import pytest
from transformers.utils.chat_parsing import parse_response

from covering import each_value
from moebius.errors import RequestError
from moebius.text import Tokenizer
from moebius.text.masks import Vocabulary
from moebius.text.replies.detect import KINDS
from random_schemas import random_schema
from text.harmony import harmony_tokenizer
from text.held import Held
from text.replies import TOOLS, family
from text.test_reply_formats import FAMILIES
from text.test_reply_harmony import HEADS
from text.test_reply_hermes import CALL as HERMES
from text.test_reply_parity import described

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
NAMES = (*KINDS, "harmony")

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


@pytest.mark.parametrize(("name", "kind"), each_value(NAMES, SPELT))
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


@pytest.mark.parametrize(("name", "kind"), each_value(NAMES, SPELT))
def test_a_reply_that_may_call_is_free_text_and_such_calls(name: str, kind: str) -> None:
    for several in (True, False):
        wanted = held(name, kind, RICH, must=False, several=several)
        for ids in drawn(wanted, 3):
            wanted.check(ids)
        for text in ("", "Hello there!", "I look it up:\n\nif a < b: x"):
            if name != "harmony":
                assert wanted.takes(wanted.tokenizer.encode_ordinary(text)), text


@pytest.mark.parametrize("kind", SPELT)
@pytest.mark.parametrize("case", FAMILIES, ids=lambda each: each.name)
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


def test_gemmas_notation_is_held_to_random_schemas() -> None:
    """Whose objects, arrays, alternatives and references lie in each other."""
    called = 0
    for seed in range(16):
        rng = random.Random(seed)
        wanted = held("gemma4", rng.choice(SPELT), {"f": random_schema(rng)}, strict=False)
        for _ in range(3):
            ids = wanted.draw(rng)
            called += ids is not None and len(wanted.check(ids).calls)
    assert called > 16


def arguments(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


NOTATION: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (arguments(a={"type": "string"}), ['{a:<|"|><|"|>}', '{a:<|"|>x, {y}<|"|>}'], ["{}", "{a:1}"]),
    (
        arguments(a={"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}),
        ["{a:[1,2]}", "{a:[1,-2,3]}"],
        ["{a:[]}", "{a:[1]}", "{a:[1,2,3,4]}", '{a:[1,<|"|>x<|"|>]}'],
    ),
    (
        arguments(**{"a b": {"type": "boolean"}, "größe": {"type": ["number", "null"]}}),
        ['{<|"|>a b<|"|>:true,größe:1.5e3}', '{<|"|>a b<|"|>:false,größe:null}'],
        ["{a b:true,größe:1}", '{größe:1,<|"|>a b<|"|>:true}'],
    ),
    (
        arguments(a={"type": "object", "additionalProperties": {"type": "integer"}}),
        ["{a:{}}", "{a:{x:1,y_2:2}}"],
        ['{a:{x:<|"|>1<|"|>}}', "{a:{x:1,}}"],
    ),
    (
        arguments(a={"enum": ["x", 1, None, [1, "y"], {"k": True}]}),
        ['{a:<|"|>x<|"|>}', "{a:1}", "{a:null}", '{a:[1,<|"|>y<|"|>]}', "{a:{k:true}}"],
        ["{a:x}", "{a:2}", "{a:[1]}"],
    ),
    (arguments(a={"type": "string", "enum": ["x", 1]}), ['{a:<|"|>x<|"|>}'], ["{a:1}"]),
    (
        {"type": "object", "properties": {"n": {"$ref": "#"}}, "additionalProperties": False},
        ["{}", "{n:{n:{n:{}}}}"],
        ["{n:1}", "{m:{}}"],
    ),
    (arguments(a={}), ["{a:1}", '{a:[<|"|>x<|"|>,{b:null}]}', "{a:{}}"], ["{a:}", "{a:x}"]),
    (
        {"type": "object"} | arguments(a={"type": "integer"}) | {"required": []},
        ["{}", "{a:7}"],
        ["{a:7,b:1}"],
    ),
]


@pytest.mark.parametrize("kind", SPELT)
def test_what_gemmas_notation_takes_of_a_schema(kind: str) -> None:
    for schema, taken, others in NOTATION:
        wanted = held("gemma4", kind, {"f": schema})
        for text in (*taken, *others):
            ids = wanted.tokenizer._encode_marked(f"<|tool_call>call:f{text}<tool_call|>")
            assert wanted.takes(ids) is (text in taken), text
            if text in taken:
                assert len(wanted.check(ids).calls) == 1


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (arguments(a={"oneOf": [{"type": "integer"}, {"type": "number"}]}), "'oneOf' of schemas"),
        (arguments(a={"allOf": [{"minLength": 1}, {"maxLength": 2}]}), "'allOf' of several"),
        (arguments(a={"type": "array", "uniqueItems": True}), "'uniqueItems'"),
        (arguments(a={"type": "string", "format": "date"}), "'format' of a string"),
        (arguments(a={"type": "object", "minProperties": 1}), "'minProperties'"),
        (arguments(a={"anyOf": [{"type": "null"}], "not": {}}), "'not'"),
        (arguments(a=False), "can have no value"),
        (arguments(a={"$ref": "#/$defs/b"}), "names nothing"),
        (arguments(a={"type": "array", "minItems": "2"}), "must be a whole number"),
        (arguments(a={"type": "array", "maxItems": 0, "minItems": 1}), "can have no items"),
        (arguments(a={"type": "string", "enum": [1]}), "none of the values"),
        (arguments(a={"const": 'a<|"|>b'}), "holds this model's quote"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "that is not among"),
    ],
)
def test_what_gemmas_notation_cannot_hold_is_refused_by_its_name(
    schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as raised:
        held("gemma4", "text", {"f": schema})
    assert raised.value.param == "tools" and "f: " in str(raised.value)


def test_transformers_reads_what_gemmas_model_is_held_to() -> None:
    spec = described("gemma4")
    prefix = spec["start_anchor"][0]
    tools = [
        {"type": "function", "function": {"name": n, "parameters": p}} for n, p in RICH.items()
    ]
    wanted = held("gemma4", "tokens", RICH)
    for ids in drawn(wanted, 12):
        text = wanted.tokenizer.decode(ids, False)
        theirs = parse_response(text, spec, prefix=prefix, tools=tools)
        called = [each["function"] for each in theirs["tool_calls"]]
        ours = [(each.name, json.loads(each.arguments)) for each in wanted.check(ids).calls]
        assert ours == [(each["name"], each["arguments"]) for each in called], text
