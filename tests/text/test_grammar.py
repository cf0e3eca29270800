"""Grammars, checked: what is refused and in which words, what JSON may look like, and each of the
traps that llguidance sets."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher

from moebius.errors import ConstraintError, RequestError
from moebius.request.params import LIMITS
from moebius.request.structured import StructuredOutput
from moebius.text import Tokenizer
from moebius.text.grammar import checked_grammar
from moebius.text.masks import Vocabulary
from text import tiny_tokenizers

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "null"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
VALUE = {"a": [1, 2], "b": None}


def vocabulary(family: str = "byte_level") -> tuple[Tokenizer, Vocabulary]:
    tokenizer = Tokenizer(getattr(tiny_tokenizers, family)(), {"eos_token": "</s>"})
    return tokenizer, Vocabulary(tokenizer, tokenizer.vocab_size + 5, tokenizer.end_ids)


TOKENIZER, VOCABULARY = vocabulary()


def takes(wanted: StructuredOutput, text: str, *, behind_reasoning: bool = False) -> bool:
    """Whether the whole text is in the grammar."""
    grammar = checked_grammar(wanted).text(behind_reasoning=behind_reasoning)
    matcher = VOCABULARY.matcher(grammar)
    ids = TOKENIZER.encode(text, False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"json": {"not": {}}}, 'Unimplemented keys: ["not"]'),
        (
            {"json": {"type": "object", "properties": {"a": {"contains": {}, "type": "array"}}}},
            '["contains"]',
        ),
        ({"json": {"type": "nope"}}, "Invalid type: nope"),
        ({"json": {"$ref": "https://example.org/x"}}, "example.org"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "nsatisfiable"),
        ({"json": {"anyOf": [{"type": "integer", "multipleOf": 123456}]}}, "multipleOf is 123456"),
        ({"json": {"type": "number", "multipleOf": 0.12345}}, "multipleOf is 0.12345"),
        ({"json": "[]"}, "must be a JSON object"),
        ({"json": "{"}, "no JSON"),
        ({"json": {"x-guidance": {}}}, "x-guidance"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": "a\0"}, "NUL"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "root ::= ===="}, "GBNF"),
        ({"grammar": "\ud800"}, "surrogate"),
        ({"regex": "a" * (LIMITS.structured_bytes + 1)}, "at most"),
        ({"json": "[" * 65 + "]" * 65}, "64 deep"),
    ],
)
def test_what_is_no_grammar_is_refused_in_one_line(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError) as raised:
        checked_grammar(StructuredOutput(**fields, param="response_format"))
    message = str(raised.value)
    assert says in message and raised.value.param == "response_format"
    assert "\n" not in message and len(message) < 600


def test_a_lenient_schema_names_what_it_leaves_out() -> None:
    wanted = StructuredOutput(json={"type": "array", "uniqueItems": True}, strict=False)
    assert checked_grammar(wanted).ignored == ('Unimplemented keys: ["uniqueItems"]',)
    assert takes(wanted, "[1,1]")


@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"indent": 1}, {"separators": (",", ":")}])
def test_what_json_writes_is_taken(style: dict[str, object]) -> None:
    assert takes(StructuredOutput(json=SCHEMA), json.dumps(VALUE, **style))


@pytest.mark.parametrize("text", ['{"a":  [1]', '{\n\n"a"', '{"a":\n' + " " * 33 + "[", ' {"a"'])
def test_blanks_without_an_end_are_not(text: str) -> None:
    """Trap c: between two tokens of JSON there may be any number of blanks by default."""
    ids = TOKENIZER.encode(text, False)
    strict = VOCABULARY.matcher(checked_grammar(StructuredOutput(json=SCHEMA)).text())
    assert strict.try_consume_tokens(ids) < len(ids)
    if not text.startswith(" "):
        loose = VOCABULARY.matcher(LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA)))
        assert loose.try_consume_tokens(ids) == len(ids), "or else there is nothing to bound"


def test_clients_say_what_blanks_there_may_be() -> None:
    none = StructuredOutput(json=SCHEMA, disable_any_whitespace=True)
    assert takes(none, json.dumps(VALUE, separators=(",", ":"))) and not takes(
        none, json.dumps(VALUE)
    )
    wide = StructuredOutput(json=SCHEMA, whitespace_pattern="[ ]{0,3}")
    assert takes(wide, '{"a":   [1],"b":null}') and not takes(wide, '{\n"a":[1],"b":null}')


def test_properties_come_in_the_order_of_the_schema() -> None:
    """Trap e."""
    assert not takes(StructuredOutput(json=SCHEMA), '{"b":null,"a":[]}')


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"regex": "[0-9]{2}x?"}, "12x", "1"),
        ({"choice": ('a"b\\n', "ü\n")}, "ü\n", "ü"),
        ({"grammar": 'start: "a" | "b" start'}, "bba", "bb"),
        ({"grammar": 'root ::= "yes" | [0-9]+\n'}, "007", "no"),
        ({"json_object": True}, '{"x": [1.5e3, "ü"]}', "[1]"),
        ({"json": {"$defs": {"t": {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]}}, "required": ["n"], "additionalProperties": False}}, "$ref": "#/$defs/t"}}, '{"n":{"n":null}}', '{"n":1}'),
    ],
)  # fmt: skip
def test_every_kind_takes_what_it_says(fields: dict[str, object], good: str, bad: str) -> None:
    wanted = StructuredOutput(**fields)
    assert takes(wanted, good) and not takes(wanted, bad)
    assert takes(wanted, "\n\n" + good, behind_reasoning=True)
    assert takes(wanted, good, behind_reasoning=True)
    assert not takes(wanted, "\n\n\n" + good, behind_reasoning=True)


@pytest.mark.parametrize("family", ["byte_level", "llama", "mistral", "metaspace", "prefix_space"])
def test_masks_speak_of_the_bytes_that_the_text_is_made_of(family: str) -> None:
    """By llguidance's own reading of byte-level and byte-fallback tokenizers, and by ours of the
    others: each id that a mask allows leaves a text that the grammar's own words can go on from."""
    tokenizer, known = vocabulary(family)
    choices = ("left;", "right;", "ünder;")
    matcher = known.matcher(checked_grammar(StructuredOutput(choice=choices)).text())
    text = ""
    ids: list[int] = []
    while not matcher.is_stopped():
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [i for i in range(tokenizer.vocab_size) if mask >> i & 1 and i not in known.ends]
        assert allowed and mask >> tokenizer.vocab_size == 0
        for token in allowed:
            piece = tokenizer.detokenizer.join([*ids, token], skip_special=False)
            assert any(choice.encode().startswith(piece) for choice in choices), token
        ids.append(allowed[-1])
        assert matcher.consume_token(ids[-1])
        text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text in choices


def test_special_tokens_are_no_text_inside_json() -> None:
    ids = TOKENIZER.encode('{"x": "', False)
    matcher = VOCABULARY.matcher(checked_grammar(StructuredOutput(json_object=True)).text())
    assert matcher.consume_tokens(ids)
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    assert not any(mask >> token & 1 for token in TOKENIZER.special_ids)


def test_a_model_without_end_tokens_has_grammars_all_the_same() -> None:
    tokenizer = Tokenizer(tiny_tokenizers.byte_level())
    known = Vocabulary(tokenizer, tokenizer.vocab_size, frozenset())
    assert known.end_ids == () and len(known.ends) == 1
    assert not known.matcher('start: "a"').is_error()


def test_what_cannot_be_compiled_with_a_vocabulary_is_an_error_of_its_own() -> None:
    with pytest.raises(ConstraintError, match="nosuch"):
        VOCABULARY.matcher("start: <nosuch>")


def test_an_end_token_that_a_stopped_matcher_takes_is_not_counted() -> None:
    """Trap b, which is why a follower never feeds one."""
    matcher = VOCABULARY.matcher(checked_grammar(StructuredOutput(regex="ab")).text())
    for token in TOKENIZER.encode("ab", False):
        assert matcher.consume_token(token)
    assert matcher.stop_reason() == "NoExtension"
    assert matcher.consume_token(VOCABULARY.ends[0]) and matcher.rollback(1)
    assert not matcher.is_stopped(), "the last token of the text was taken back instead"
