"""ReplyFeed: hands a reply's text to its parser, with symbols where its control tokens are."""

from collections import deque
from dataclasses import dataclass

from moebius.text.replies import Event, ReplyParser


@dataclass(slots=True)
class Place:
    """Where a token stands in a text: from character `start` up to `end`, which is None while the
    token's last bytes are part of an unfinished character.

    symbol: what a parser has for it in its text's place; "" for what is no control token.
    """

    start: int
    end: int | None = None
    symbol: str = ""

    def is_out(self, released: int) -> bool:
        """Whether `released` characters are all of its text and what is before it."""
        return self.end is not None and self.end <= released


class ReplyFeed:
    """Feeds one parser. The text that it gets may lag behind the tokens, and be cut before them."""

    def __init__(self, parser: ReplyParser) -> None:
        self._parser = parser
        self.symbols = parser.symbols
        self.reasoning_tokens = 0
        """Tokens of the reasoning, without its markers."""
        self._places: deque[Place] = deque()
        # What was released and not fed yet, and where in the whole text it begins.
        self._text = ""
        self._fed = 0

    @property
    def done(self) -> bool:
        """Whether nothing more of the reply is wanted."""
        return self._parser.done

    @property
    def malformed(self) -> int:
        """Tool calls that did not parse."""
        return self._parser.malformed

    def expect(self, place: Place) -> None:
        """A token that is yet to be fed."""
        self._places.append(place)

    def feed(self, text: str) -> list[Event]:
        """The next text that is certain to be the reply's."""
        self._text += text
        events: list[Event] = []
        while self._places and not self.done:
            place = self._places[0]
            events += self._push(place.start if place.symbol else place.end)
            if not place.is_out(self._fed + len(self._text)):
                break
            self._places.popleft()
            if place.symbol:
                self._drop(place.end)
                events += self._parser.push(place.symbol)
            else:
                self.reasoning_tokens += self._parser.thinks
        return events

    def finish(self, *, cut: bool) -> list[Event]:
        """The end of the reply; `cut`: by its length."""
        return [*self._push(None), *self._parser.finish(cut=cut)]

    def _push(self, end: int | None) -> list[Event]:
        """Feed what is there up to character `end`; all of it for None."""
        piece = self._drop(end)
        return self._parser.push(piece) if piece else []

    def _drop(self, end: int | None) -> str:
        length = len(self._text) if end is None else max(0, end - self._fed)
        piece = self._text[:length]
        self._text = self._text[length:]
        self._fed += len(piece)
        return piece
