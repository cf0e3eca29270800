"""What a reply's readers read from: text that comes in pieces, with control tokens in it.

A control token is one lone surrogate (U+D800 and on) in the text. Decoded UTF-8 never holds one, so
nothing that a model spells by ordinary tokens can be taken for a control token, and readers work
with plain strings.

Readers are generators: they yield where they need text that has not come yet. So each reads like
the format that it is for, and where the text was cut into pieces makes no difference.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Yields for more text; returns what was read."""
Emit = Callable[[str], None]
"""Takes a piece of text that is certain."""
Spell = Callable[[Sequence[int]], str]
"""The text of token ids, in which control tokens are symbols."""

_FIRST_SYMBOL = 0xD800
SYMBOLS = "\ud800-\udfff"
"""All symbols, for a regular expression's class."""

WORD = re.compile(r"[\w./:-]*")


class NotACall(Exception):
    """What looked like a tool call is none."""


class Markers:
    """The control texts of a format: a symbol where the vocabulary has a token for one, which is
    then matched by its id; else the text itself."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        """tokens: the added tokens' ids by their texts."""
        self._tokens = tokens
        self.symbols: dict[int, str] = {}
        """The symbol of each control token's id."""
        self._spelled: dict[int, str] = {}

    def __call__(self, spelling: str) -> str:
        """What stands for this control text in a source."""
        token_id = self._tokens.get(spelling)
        if token_id is None:
            return spelling
        if token_id not in self.symbols:
            self.symbols[token_id] = chr(_FIRST_SYMBOL + len(self.symbols))
            self._spelled[ord(self.symbols[token_id])] = spelling
        return self.symbols[token_id]

    def id_of(self, marker: str) -> int | None:
        """The token of a marker; None for one that is text."""
        found = (id for id, symbol in self.symbols.items() if symbol == marker)
        return next(found, None)

    def spell(self, text: str) -> str:
        """The text with control tokens as they are spelled."""
        return text.translate(self._spelled)


class Source:
    """The text of a reply that was not read yet. `ended`: no more will come."""

    def __init__(self) -> None:
        self.text = ""
        self.ended = False
        self._kept: list[str] | None = None

    def take(self, length: int) -> str:
        """Read so many characters of what is there."""
        piece = self.text[:length]
        self.text = self.text[length:]
        if self._kept is not None:
            self._kept.append(piece)
        return piece

    def mark(self) -> None:
        """Remember this place, to come back to it."""
        self._kept = []

    def forget(self) -> None:
        """Nobody will come back."""
        self._kept = None

    @property
    def marked(self) -> bool:
        return self._kept is not None

    def rewind(self) -> None:
        """Come back to the marked place."""
        assert self._kept is not None
        self.text = "".join([*self._kept, self.text])
        self._kept = None

    def peek(self) -> Reading[str]:
        """The next character, not read; "" at the end."""
        while not self.text and not self.ended:
            yield
        return self.text[:1]

    def space(self) -> Reading[None]:
        """Read white space."""
        while True:
            self.take(len(self.text) - len(self.text.lstrip()))
            if self.text or self.ended:
                return
            yield

    def matching(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Read as far as a pattern of single characters goes."""
        pieces: list[str] = []
        while True:
            found = pattern.match(self.text)
            pieces.append(self.take(0 if found is None else len(found[0])))
            if self.text or self.ended:
                return "".join(pieces)
            yield

    def word(self) -> Reading[str]:
        """Read a name; "" where the text goes on with something else."""
        return (yield from self.matching(WORD))

    def sees(self, wanted: str) -> Reading[bool]:
        """Whether the text goes on with this; nothing is read."""
        while len(self.text) < len(wanted) and wanted.startswith(self.text) and not self.ended:
            yield
        return self.text.startswith(wanted)

    def accepts(self, *wanted: str) -> Reading[str]:
        """The first of these that the text goes on with, which is read; else ""."""
        for each in wanted:
            if (yield from self.sees(each)):
                return self.take(len(each))
        return ""

    def expect(self, *wanted: str) -> Reading[str]:
        """Read one of these. NotACall where the text goes on otherwise."""
        found = yield from self.accepts(*wanted)
        if not found:
            raise NotACall
        return found

    def closes(self, *closers: str) -> Reading[str]:
        """As `accepts`, with white space in front; a closer that the text's end cuts off is read,
        too."""
        outer = self._kept
        self.mark()
        yield from self.space()
        found = yield from self.accepts(*closers)
        if not found and self._is_cut(closers):
            self.take(len(self.text))
        elif not found:
            self.rewind()
        elif outer is not None and self._kept is not None:
            outer += self._kept
        self._kept = outer
        return found

    def _is_cut(self, closers: Sequence[str]) -> bool:
        return self.ended and any(closer.startswith(self.text) for closer in closers)

    def until(self, markers: Sequence[str], emit: Emit) -> Reading[str]:
        """Read up to the first of the markers and over it; "" where the text ends before.

        What is before it is emitted as soon as it is certain to be no part of a marker.
        """
        wanted = [marker for marker in markers if marker]
        while True:
            begun = 0 if self.ended else _begun(self.text, wanted)
            certain = len(self.text) - begun
            marker = _first(self.text, wanted)
            at = self.text.find(marker) if marker else -1
            # One that has only begun, further in front, comes first.
            if 0 <= at <= certain:
                _emit(emit, self.take(at))
                return self.take(len(marker))
            _emit(emit, self.take(certain))
            if self.ended:
                return ""
            yield

    def text_until(self, *markers: str) -> Reading[tuple[str, str]]:
        """What comes before the first of the markers, and which it is; "" where the text ends."""
        pieces: list[str] = []
        found = yield from self.until(markers, pieces.append)
        return "".join(pieces), found


def _emit(emit: Emit, piece: str) -> None:
    if piece:
        emit(piece)


def _first(text: str, markers: Sequence[str]) -> str:
    """The marker that comes first in the text, the longest of several; "" for none."""
    present = [marker for marker in markers if marker in text]
    return min(present, key=lambda marker: (text.find(marker), -len(marker)), default="")


def _begun(text: str, markers: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a marker."""
    longest = min(len(text), max((len(marker) for marker in markers), default=1) - 1)
    for length in range(longest, 0, -1):
        tail = text[len(text) - length :]
        if any(len(marker) > length and marker.startswith(tail) for marker in markers):
            return length
    return 0
