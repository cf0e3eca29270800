"""Origins: which tokens the characters of a text come from."""

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class Place:
    """Where a token stands in a text: from character `start` up to `end`, which is None while the
    token's last bytes are part of an unfinished character. The tokens of one character share it.

    token   which of the reply's tokens it is, counted from 0
    symbol  what a parser has for it in its text's place; "" for what is no control token
    """

    token: int
    start: int
    end: int | None = None
    symbol: str = ""

    def is_out(self, released: int) -> bool:
        """Whether `released` characters are all of its text and what is before it."""
        return self.end is not None and self.end <= released


class Origins:
    """Tells of each stretch of what is read which tokens it comes from, and of each token once:
    with the first stretch that has a character of it.

    What is read is the text, in which symbols may stand for tokens. Stretches are asked for in
    their order; what lies between them is no part of what is said, nor are its tokens.
    """

    def __init__(self) -> None:
        self._expected: deque[Place] = deque()
        # With where a place's characters begin in what is read.
        self._read: deque[tuple[int, Place]] = deque()

    def expect(self, place: Place) -> None:
        """A token whose characters are yet to be read. Its end may be set later, but before what is
        behind it is read."""
        self._expected.append(place)

    def reads(self, end: int, shift: int = 0) -> None:
        """The text is read up to character `end`; what is read of it stands so much further on
        there."""
        while self._expected and self._expected[0].start < end:
            place = self._expected.popleft()
            self._read.append((place.start + shift, place))

    def reads_symbol(self, place: Place, at: int) -> None:
        """A symbol is read, in the place of this token."""
        while self._expected and self._expected.popleft() is not place:
            pass  # a token without any text
        self._read.append((at, place))

    def of(self, start: int, end: int) -> tuple[int, ...]:
        """The tokens of the characters from `start` up to `end` in what is read."""
        found: list[int] = []
        while self._read and self._read[0][0] < end:
            begin, place = self._read.popleft()
            length = _length(place)
            if length is None or begin + length > max(start, begin):
                found.append(place.token)
        return tuple(found)


def _length(place: Place) -> int | None:
    """How many characters a token has in what is read; None: some, and more will come."""
    if place.symbol:
        return 1
    return None if place.end is None else place.end - place.start
