"""JSON text that comes in pieces: checked, and passed on as it comes (RFC 8259)."""

import json
import re
from collections.abc import Callable

from moebius.text.replies.source import SYMBOLS, Emit, NotACall, Reading, Source

_PLAIN = re.compile(rf'[^"\\\x00-\x1f{SYMBOLS}]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4})')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9A-Fa-f]{0,3})?\Z")
# As far as a number or a word may go; what it is, is looked at when it is complete.
_WORD = re.compile(r"[-+.0-9A-Za-z]*")
SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
"""A number, true, false or null."""
_SPACE = re.compile(r"[ \t\n\r]*")
_CLOSERS = {"{": "}", "[": "]"}


def _nothing() -> None:
    pass


def json_value(source: Source, emit: Emit, begun: Callable[[], None] = _nothing) -> Reading[None]:
    """Read one value and emit its text, as it is written.

    `begun` is called wherever it is plain that this is JSON: behind each key, and at the value's
    end. A control character in a string, which models write and JSON does not have, is escaped.
    NotACall at the first character that is not JSON's, which is not read.
    """
    open: list[str] = []
    while True:
        yield from _space(source, emit)
        opening = yield from source.accepts(*_CLOSERS)
        if opening:
            emit(opening)
            open.append(_CLOSERS[opening])
        else:
            yield from _scalar(source, emit)
        more = yield from _closed(source, emit, open, fresh=bool(opening))
        if not more:
            begun()
            return
        if open[-1] == "}":
            yield from _space(source, emit)
            yield from json_string(source, emit)
            yield from _space(source, emit)
            emit((yield from source.expect(":")))
            begun()


def _closed(source: Source, emit: Emit, open: list[str], *, fresh: bool) -> Reading[bool]:
    """Read what may follow a value, or an opening bracket (`fresh`): closing brackets and a comma.

    Whether something else of what is open must follow.
    """
    while open:
        yield from _space(source, emit)
        closing = yield from source.accepts(open[-1])
        if not closing:
            if not fresh:
                emit((yield from source.expect(",")))
            return True
        emit(closing)
        open.pop()
        fresh = False
    return False


def _space(source: Source, emit: Emit) -> Reading[None]:
    while True:
        found = _SPACE.match(source.text)
        if found is not None and found[0]:
            emit(source.take(len(found[0])))
        if source.text or source.ended:
            return
        yield


def _scalar(source: Source, emit: Emit) -> Reading[None]:
    if (yield from source.peek()) == '"':
        yield from json_string(source, emit)
        return
    while True:
        found = _WORD.match(source.text)
        word = "" if found is None else found[0]
        if len(word) < len(source.text) or source.ended:
            break
        yield
    if SCALAR.fullmatch(word) is None:
        raise NotACall
    emit(source.take(len(word)))


def json_string(source: Source, emit: Emit) -> Reading[None]:
    """Read a string, quotes included; its text is emitted as it comes."""
    emit((yield from source.expect('"')))
    while True:
        found = _PLAIN.match(source.text)
        if found is not None and found[0]:
            emit(source.take(len(found[0])))
        if not source.text:
            if source.ended:
                raise NotACall
            yield
        elif source.text[0] == '"':
            emit(source.take(1))
            return
        elif source.text[0] == "\\":
            yield from _escape(source, emit)
        elif source.text[0] < " ":
            emit(json.dumps(source.take(1))[1:-1])
        else:
            raise NotACall


def _escape(source: Source, emit: Emit) -> Reading[None]:
    while _ESCAPE_BEGUN.match(source.text) and not source.ended:
        yield
    found = _ESCAPE.match(source.text)
    if found is None:
        raise NotACall
    emit(source.take(len(found[0])))


def value_text(source: Source) -> Reading[str]:
    """Read one value: its text."""
    pieces: list[str] = []
    yield from json_value(source, pieces.append)
    return "".join(pieces)


def loaded(text: str) -> object:
    """The value of a JSON text. NotACall where it is none, or cannot be held."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        raise NotACall from None
    return found


def arguments_of(text: str) -> str:
    """The text of a call's arguments, an object.

    Some models write it as JSON in a string, or null where there are none. NotACall for others.
    """
    value = loaded(text)
    if value is None:
        return "{}"
    if isinstance(value, str):
        text = value
        value = loaded(text)
    if not isinstance(value, dict):
        raise NotACall
    return text
