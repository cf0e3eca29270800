"""From what a client wants of an answer's text to a grammar that llguidance reads, checked.

Checking compiles the grammar once, without a vocabulary, and throws the result away: an engine
compiles it with its own. How large, how deep and how costly one may be is bounded here; how long
checking may take is for the caller to bound.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, grammar_from

from moebius.errors import RequestError
from moebius.request.params import LIMITS
from moebius.request.structured import StructuredOutput

# Between two tokens of JSON at most one line break, with an indent behind it, or one blank. What
# json.dumps writes in any of its styles passes; blanks without an end do not.
JSON_WHITESPACE = r"\n[ \t]{0,32}|[ ]"
TOOL = "// tool "
"""Begins a comment in a grammar of calls: the rules behind it are those of the tool it names."""
# Some models write line breaks between their reasoning and the answer.
_LINE_BREAKS = r"start: /\n{0,2}/ @body"
_MOST_DEPTH = 64
_LONGEST_MESSAGE = 500
_MOST_DIVISOR = 10_000
# How llguidance says where in a grammar of Lark it failed.
_PLACE = re.compile(r"at (?P<line>\d+)\(\d+\): (failed to compile JSON schema: )?")
# Of JSON text: strings, in which brackets mean nothing, and brackets.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{\]}]', re.DOTALL)


def parser_limits() -> LLParserLimits:
    """What one grammar may cost, where it is checked and where it is followed."""
    return LLParserLimits(
        max_lexer_states=20_000,
        max_grammar_size=200_000,
        initial_lexer_fuel=200_000,
        step_lexer_fuel=20_000,
    )


@dataclass(frozen=True, slots=True)
class CheckedGrammar:
    """body: one grammar of llguidance's list; ignored: what a lenient check says it leaves out."""

    body: str
    ignored: tuple[str, ...] = ()

    def text(self, *, behind_reasoning: bool = False) -> str:
        """What an engine is given. behind_reasoning: line breaks may come before it."""
        body = json.loads(self.body)
        if not behind_reasoning:
            return _grammars(body)
        return _grammars({"lark_grammar": _LINE_BREAKS}, {**body, "name": "body"})


@lru_cache(maxsize=128)
def checked_grammar(wanted: StructuredOutput) -> CheckedGrammar:
    """The grammar of what is wanted. RequestError where there is none, in llguidance's words.

    May take a second or more; what was checked before is at hand.
    """
    _check_size(wanted)
    body = _body(wanted)
    failed, messages = LLMatcher.validate_grammar_with_warnings(
        _grammars(body), None, limits=parser_limits()
    )
    if failed:
        raise wanted.error(f"{wanted.param}: {_of_its_tool(wanted, first_line(messages[0]))}")
    ignored = tuple(first_line(each) for each in messages if "no tokenizer" not in each)
    return CheckedGrammar(json.dumps(body), ignored)


def first_line(message: str) -> str:
    """What a client is told of llguidance's message: the rest is its parser's state."""
    lines = message.strip().splitlines() or ["it cannot be compiled"]
    told = [lines[0], *(line for line in lines[1:] if line.startswith("error:"))]
    return " ".join(told)[:_LONGEST_MESSAGE]


def _of_its_tool(wanted: StructuredOutput, message: str) -> str:
    """In a grammar of calls, a message says in which line it failed: its client knows tools."""
    found = _PLACE.match(message)
    if wanted.calls is None or found is None:
        return message
    before = wanted.calls.splitlines()[: int(found["line"])]
    names = [line.removeprefix(TOOL) for line in before if line.startswith(TOOL)]
    return ": ".join([*names[-1:], message[found.end() :]])


def _check_size(wanted: StructuredOutput) -> None:
    texts = (
        wanted.schema,
        wanted.regex,
        wanted.grammar,
        wanted.calls,
        wanted.whitespace_pattern,
    )
    for text in (*texts, *wanted.choice):
        try:
            text = "" if text is None else text
            text.encode()
        except UnicodeEncodeError as error:
            raise wanted.error(f"{wanted.param} holds a lone surrogate") from error
        if "\0" in text:
            raise wanted.error(f"{wanted.param} holds a NUL character")
    size = sum(len(text.encode()) for text in (*texts, *wanted.choice) if text)
    if size > LIMITS.structured_bytes:
        raise wanted.error(f"{wanted.param} has {size} bytes; at most {LIMITS.structured_bytes}")
    # Before it is parsed, which would recurse.
    if wanted.schema is not None and _depth(wanted.schema) > _MOST_DEPTH:
        raise wanted.error(f"{wanted.param}: the schema is nested over {_MOST_DEPTH} deep")


def _depth(text: str) -> int:
    deepest = depth = 0
    for match in _BRACKETS.finditer(text):
        if match[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in "]}":
            depth -= 1
    return deepest


def _body(wanted: StructuredOutput) -> dict[str, Any]:
    """One grammar of llguidance's list."""
    if wanted.schema is not None:
        return {"json_schema": _schema(wanted, wanted.schema)}
    try:
        if wanted.regex is not None:
            text = grammar_from("regex", wanted.regex)
            found: dict[str, Any] = json.loads(text)["grammars"][0]
            return {"lark_grammar": found["lark_grammar"]}
        if wanted.choice:
            return {"lark_grammar": grammar_from("choice", json.dumps(wanted.choice))}
        if wanted.calls is not None:
            return {"lark_grammar": wanted.calls}
        assert wanted.grammar is not None, "one of the kinds is given"
        if "::=" in wanted.grammar:
            return {"lark_grammar": grammar_from("gbnf", wanted.grammar)}
        return {"lark_grammar": wanted.grammar}
    except ValueError as error:
        raise wanted.error(f"{wanted.param}: {first_line(str(error))}") from error


def _schema(wanted: StructuredOutput, text: str) -> dict[str, Any]:
    """The schema with what llguidance is to make of it, which it may not say itself."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise wanted.error(f"{wanted.param}: the schema is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise wanted.error(f"{wanted.param}: the schema must be a JSON object")
    check_schema(schema, lambda message: wanted.error(f"{wanted.param}: {message}"))
    options: dict[str, Any] = {"lenient": not wanted.strict}
    if wanted.disable_any_whitespace:
        options |= {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    else:
        options["whitespace_pattern"] = wanted.whitespace_pattern or JSON_WHITESPACE
    return {**schema, "x-guidance": options}


def check_schema(schema: Mapping[str, Any], error: Callable[[str], RequestError]) -> None:
    """Raises the error of a message where a schema says what would cost too much, or is not its to
    say."""
    if "x-guidance" in schema:
        raise error("x-guidance is not supported in a schema")
    if _depth(json.dumps(schema)) > _MOST_DEPTH:
        raise error(f"the schema is nested over {_MOST_DEPTH} deep")
    for divisor in _values_of("multipleOf", schema):
        if _digits(divisor) > _MOST_DIVISOR:
            raise error(
                f"multipleOf is {divisor}; it may have a value of up to {_MOST_DIVISOR}, not "
                "counting its point"
            )


def _values_of(key: str, value: Any) -> Iterator[Any]:
    """What stands under a key anywhere in a JSON value."""
    if isinstance(value, dict):
        if key in value:
            yield value[key]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _values_of(key, each)


def _digits(number: object) -> int:
    """A number's digits as an integer: 25 of 2.5. llguidance's states grow with it."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return 0  # which llguidance refuses
    return abs(int("".join(map(str, Decimal(str(number)).as_tuple().digits))))


def _grammars(*bodies: dict[str, Any]) -> str:
    return json.dumps({"grammars": list(bodies)})
