"""TextReader: the text in a call's arguments, where these are an object that holds one string."""

import json
import re

# Whatever the model has called the one string.
_HEAD = re.compile(r'\s*\{\s*"(?:[^"\\]|\\.)*"\s*:\s*"')
_BODY = re.compile(r'(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*')
# Half of a pair, or what may become one.
_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}$")


class TextReader:
    """Reads JSON text in pieces, and tells the string's text as soon as it is certain.

    Arguments that are no such object are the text themselves.
    """

    def __init__(self) -> None:
        self._json = ""
        self._inside = False
        self._done = False
        self._given = ""

    def push(self, piece: str) -> str:
        """What the next piece of JSON adds to the text."""
        self._given += piece
        if self._done:
            return ""
        self._json += piece
        if not self._inside:
            head = _HEAD.match(self._json)
            if head is None:
                return ""
            self._inside = True
            self._json = self._json[head.end() :]
        return self._read()

    def finish(self) -> str:
        """What is left where there is no more."""
        return "" if self._inside else self._given

    def _read(self) -> str:
        found = _BODY.match(self._json)
        assert found is not None
        end = found.end()
        half = _HALF.search(self._json[:end])
        if half is not None and not self._json[end:].startswith('"'):
            end = half.start()
        text = self._json[:end]
        self._json = self._json[end:]
        self._done = self._json.startswith('"')
        try:
            decoded: str = json.loads(f'"{text}"', strict=False)
        except ValueError:
            return text
        return decoded.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
