"""Arguments that are written parameter by parameter, as the JSON object that they are."""

import json

from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import NotACall, Reading
from moebius.text.replies.values import as_json, types_of

_STRING = frozenset(("string",))


class Parameters:
    """Writes the arguments of a reply's open call."""

    def __init__(self, reply: ReplyParser, name: str) -> None:
        self._reply = reply
        self._schema = (reply.expected.tools or {}).get(name, {})
        self._separator = "{"

    def types(self, key: str) -> frozenset[str]:
        """What the tool's schema says of this parameter."""
        return types_of(self._schema, key)

    def read(
        self, key: str, closer: str, types: frozenset[str], *, line: bool = False
    ) -> Reading[None]:
        """Read a parameter's value and the closer behind it.

        A string is passed on as it comes, anything else when it is complete. `line`: one line break
        at either end belongs to the format. NotACall where the text ends before.
        """
        reply = self._reply
        if line:
            yield from reply.source.accepts("\n")
        closers = (f"\n{closer}", closer) if line else (closer,)
        reply.argue(f"{self._separator}{json.dumps(key, ensure_ascii=False)}: ")
        self._separator = ", "
        if types == _STRING:
            reply.argue('"')
            found = yield from reply.source.until(closers, self._string)
            end = '"'
        else:
            text, found = yield from reply.source.text_until(*closers)
            end = as_json(reply.spell(text), types)
        if not found:
            raise NotACall
        reply.argue(end)

    def _string(self, text: str) -> None:
        self._reply.argue(json.dumps(self._reply.spell(text), ensure_ascii=False)[1:-1])

    def close(self) -> None:
        """There are no more."""
        self._reply.argue("{}" if self._separator == "{" else "}")
