"""ReplyFeed: hands a reply's text to its parser, with symbols where its control tokens are."""

from collections import deque
from collections.abc import Mapping
from typing import Protocol

from moebius.front.origins import Origins, Place
from moebius.text.replies import Content, Event, ReplyParser


class Feed(Protocol):
    """Makes events of a text that may lag behind its tokens, and be cut before them.

    symbols           what is pushed in the places of control tokens, by their ids
    reasoning_tokens  tokens of the reasoning, without its markers
    """

    symbols: Mapping[int, str]
    reasoning_tokens: int

    @property
    def done(self) -> bool:
        """Whether nothing more of the reply is wanted."""

    @property
    def malformed(self) -> int:
        """Tool calls that did not parse."""

    def expect(self, place: Place, /) -> None:
        """A token that is yet to be fed."""

    def feed(self, text: str, /) -> list[Event]:
        """The next text that is certain to be the reply's."""

    def finish(self, *, cut: bool) -> list[Event]:
        """The end of the reply; `cut`: by its length."""


class PlainFeed:
    """Of a text that is no reply to a chat, or not to be read as one: all of it is content.

    origins: tells which tokens that is made of; None: nobody asks.
    """

    symbols: Mapping[int, str] = {}
    reasoning_tokens = 0
    done = False
    malformed = 0

    def __init__(self, origins: Origins | None = None) -> None:
        self._origins = origins
        self._fed = 0

    def expect(self, place: Place) -> None:
        if self._origins is not None:
            self._origins.expect(place)

    def feed(self, text: str) -> list[Event]:
        if not text:
            return []
        begin = self._fed
        self._fed += len(text)
        if self._origins is None:
            return [Content(text)]
        self._origins.reads(self._fed)
        return [Content(text, self._origins.of(begin, self._fed))]

    def finish(self, *, cut: bool) -> list[Event]:
        return []


class ReplyFeed:
    """Feeds one parser.

    origins: tells which tokens the reply's content is made of; None: nobody asks.
    """

    def __init__(self, parser: ReplyParser, origins: Origins | None = None) -> None:
        self._parser = parser
        self._origins = origins
        if origins is not None:
            parser.tokens_of = origins.of
        self.symbols: Mapping[int, str] = parser.symbols
        self.reasoning_tokens = 0
        self._places: deque[Place] = deque()
        # What was released and not fed yet, and where in the whole text it begins.
        self._text = ""
        self._fed = 0

    @property
    def done(self) -> bool:
        return self._parser.done

    @property
    def malformed(self) -> int:
        return self._parser.malformed

    def expect(self, place: Place) -> None:
        self._places.append(place)
        if self._origins is not None:
            self._origins.expect(place)

    def feed(self, text: str) -> list[Event]:
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
                if self._origins is not None:
                    self._origins.reads_symbol(place, self._parser.pushed)
                events += self._parser.push(place.symbol)
            else:
                self.reasoning_tokens += self._parser.thinks
        return events

    def finish(self, *, cut: bool) -> list[Event]:
        return [*self._push(None), *self._parser.finish(cut=cut)]

    def _push(self, end: int | None) -> list[Event]:
        """Feed what is there up to character `end`; all of it for None."""
        shift = self._parser.pushed - self._fed
        piece = self._drop(end)
        if not piece:
            return []
        if self._origins is not None:
            self._origins.reads(self._fed, shift)
        return self._parser.push(piece)

    def _drop(self, end: int | None) -> str:
        length = len(self._text) if end is None else max(0, end - self._fed)
        piece = self._text[:length]
        self._text = self._text[length:]
        self._fed += len(piece)
        return piece
