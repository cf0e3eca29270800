"""A call as a JSON object that names its function: {"name": "f", "arguments": {...}}."""

import json

from moebius.text.replies.json_text import arguments_of, loaded, value_text
from moebius.text.replies.lark import Lark
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import NotACall, Reading

_ARGUMENTS = ("arguments", "parameters")


def named_call(reply: ReplyParser, *closers: str, whole: bool = False) -> Reading[None]:
    """Read one call, from its opening bracket to its closing one; it is still open then.

    Its keys may come in any order: arguments that come before the name wait for it. `whole`:
    without arguments it is no call. NotACall as ReplyParser.attempt wants it.
    """
    source = reply.source
    name = ""
    held: str | None = None
    yield from source.expect("{")
    yield from source.space()
    more = not (yield from source.accepts("}"))
    while more:
        yield from source.space()
        key = yield from _string(reply)
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        if key == "name":
            name = yield from _string(reply)
        elif key in _ARGUMENTS and name and not reply.called:
            yield from reply.arguments(name, *closers)
        else:
            value = yield from value_text(source)
            held = value if key in _ARGUMENTS else held
        yield from source.space()
        more = (yield from source.expect(",", "}")) == ","
    if not reply.called:
        if whole and held is None:
            raise NotACall
        arguments = arguments_of(held or "{}")
        reply.begin(name)
        reply.argue(arguments)


def held_call(lark: Lark, name: str, key: str, arguments: str) -> str:
    """The expression, in a grammar, of a call whose arguments have this key and this rule."""
    head = f'{{"name": {json.dumps(name)}, "{key}": '
    return f'{lark.text(head)} {arguments} "}}"'


def _string(reply: ReplyParser) -> Reading[str]:
    found = loaded((yield from value_text(reply.source)))
    if not isinstance(found, str):
        raise NotACall
    return found
