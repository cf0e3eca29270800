"""A reply's events as blocks, one behind the other: for protocols whose answers are lists of such.

A stream tells how each block begins, its pieces and its end; an answer that is not streamed is made
of the very same.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from moebius.text.replies import CallArguments, CallEnd, CallStart, Content, Event, Reasoning

Kind = Literal["reasoning", "content", "call"]


@dataclass(frozen=True, slots=True)
class Begin:
    """A block begins; call: how it began, of a call."""

    kind: Kind
    call: CallStart | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the block that is open: text, or of a call's arguments. tokens: as Content has
    them."""

    text: str
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """No more of the block that is open comes."""


Step = Begin | Piece | End


class Blocks:
    """Splits one reply; at most one block is open."""

    def __init__(self) -> None:
        self._open: Kind | None = None

    def feed(self, events: Iterable[Event]) -> Iterator[Step]:
        """The reply's next events."""
        for event in events:
            match event:
                case Reasoning(text):
                    yield from self._run("reasoning")
                    yield Piece(text)
                case Content(text, tokens):
                    yield from self._run("content")
                    yield Piece(text, tokens)
                case CallStart():
                    yield from self.close()
                    yield self._begin("call", event)
                case CallArguments(_, text):
                    yield Piece(text)
                case CallEnd():
                    yield from self.close()

    def close(self) -> Iterator[Step]:
        """The end of the reply, or of what is open."""
        if self._open is not None:
            self._open = None
            yield End()

    def _run(self, kind: Kind) -> Iterator[Step]:
        if self._open != kind:
            yield from self.close()
            yield self._begin(kind)

    def _begin(self, kind: Kind, call: CallStart | None = None) -> Begin:
        self._open = kind
        return Begin(kind, call)
