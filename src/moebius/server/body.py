"""A request's body: bytes that become one JSON object, or an error, at a price that is known before
it is paid.

The parser holds the interpreter's lock from a body's first byte to its last, and what it costs
depends on how many objects it makes. So these are counted first, over the raw bytes, in pieces that
let others run.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from moebius.errors import RequestError
from moebius.server.limits import HTTP_LIMITS

_PIECE = 2**18
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode_body(body: bytes) -> dict[str, Any]:
    """A body as one JSON object. RequestError on anything else, NaN and Infinity, and beyond the
    limits on JSON."""
    body = body.removeprefix(codecs.BOM_UTF8)
    _check_encoding(body)
    _check_size(body)
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        # Half of a pair such as \ud83d\ude00 reads to the parser like an end that comes too soon.
        halved = "; is a \\u escape half of a surrogate pair?" if b"\\ud" in body.lower() else ""
        raise RequestError(f"the body is not valid JSON: {error}{halved}") from error
    if not isinstance(found, dict):
        raise RequestError("the body must be a JSON object")
    return found


def _check_encoding(body: bytes) -> None:
    """RequestError on UTF-16 and UTF-32: JSON begins with ASCII, so an early zero shows them where
    no mark does."""
    marked = next((name for mark, name in _WIDE.items() if body.startswith(mark)), None)
    if marked is None and b"\0" in body[:2]:
        marked = "UTF-16 or UTF-32"
    if marked is not None:
        raise RequestError(f"the body is {marked}; JSON must be sent as UTF-8")


@dataclass(slots=True)
class _Contents:
    """What a JSON text holds, strings not looked into; true up to where it stops being JSON, if it
    does."""

    values: int = 1
    parts: int = 0
    depth: int = 0


def _check_size(body: bytes) -> None:
    if (
        len(body) <= HTTP_LIMITS.json_parts
        and body.count(b"[") + body.count(b"{") <= HTTP_LIMITS.json_depth
    ):
        return  # too short to hold too much: every part takes a byte
    contents = _contents(body)
    for what, found, most in (
        ("nests deeper than {} levels", contents.depth, HTTP_LIMITS.json_depth),
        ("holds more than {} values", contents.values, HTTP_LIMITS.json_values),
        ("holds more than {} strings, lists and objects", contents.parts, HTTP_LIMITS.json_parts),
    ):
        if found > most:
            raise RequestError(f"the body {what.format(most)}")


def _contents(body: bytes) -> _Contents:
    found = _Contents()
    in_string = level = 0
    for piece in _without_escapes(body):
        codes = np.frombuffer(piece, np.uint8)
        quotes = codes == ord('"')
        # Odd where a string has begun and not ended. Sums wrap at 256, which keeps them even or
        # odd.
        inside = np.add.accumulate(quotes, dtype=np.uint8) + np.uint8(in_string)
        inside &= 1
        outside = codes[inside == 0]
        in_string = int(inside[-1])
        # ASCII has [ and ] where { and } are, less 32.
        opened = (outside | 32) == ord("{")
        closed = (outside | 32) == ord("}")
        levels = np.add.accumulate(opened.astype(np.int32) - closed, dtype=np.int32)
        found.depth = max(found.depth, level + int(levels.max(initial=0)))
        level += int(levels[-1]) if len(levels) else 0
        found.values += int(np.count_nonzero(outside == ord(","))) + int(np.count_nonzero(opened))
        found.parts += int(np.count_nonzero(opened)) + int(np.count_nonzero(quotes & (inside == 1)))
    return found


def _without_escapes(body: bytes) -> Iterator[bytes]:
    """The body in pieces, without the escapes that end in a backslash or a quote."""
    carried = b""
    for start in range(0, len(body), _PIECE):
        piece = carried + body[start : start + _PIECE]
        carried = b""
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"")
            if piece.endswith(b"\\"):
                piece = piece[:-1]
                carried = b"\\"
            piece = piece.replace(b'\\"', b"")
        if piece:
            yield piece
