"""ReplyParser: one reply, from its first token to its end, as events."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moebius.text.replies.events import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    merged,
)
from moebius.text.replies.json_text import arguments_of, json_value, value_text
from moebius.text.replies.source import Markers, NotACall, Reading, Source

_NAME = re.compile(r"[^\s\ud800-\udfff\"'<>{}()\[\]]{1,256}")

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Expected:
    """What the request says of its reply.

    tools        the parameters' JSON Schema of each tool that may be called, by its name; None: no
                 call is looked for
    barred       those of them that this reply may not call
    parallel     whether a reply may make more than one call
    silent       the tools are shown to the model all the same where no call is looked for, so that
                 it has to be kept from beginning one
    held         calls are held to their schemas, and so there are none in the reasoning
    budget       most tokens of its reasoning
    """

    tools: Mapping[str, Schema] | None = None
    barred: frozenset[str] = frozenset()
    parallel: bool = True
    silent: bool = False
    held: bool = False
    budget: int | None = None


class _ReplyEnds(Exception):
    """No more of the reply is wanted."""


class Talk(Protocol):
    """A format's reader of a whole reply."""

    def __call__(self, reply: "ReplyParser", /) -> Reading[None]: ...


class ReplyParser:
    """Turns the text of a reply, in which control tokens are symbols, into events.

    symbols     the symbol of each control token's id: whoever feeds the parser writes them in the
                tokens' places
    thinks      whether what comes now is reasoning
    pushed      how many characters were pushed, symbols among them
    tokens_of   which tokens the characters from one place up to another are of, by these counts;
                whoever pushes them may say so
    malformed   calls that did not parse
    done        the reply may end here: it has made the one call that was allowed
    """

    def __init__(
        self,
        talk: Talk,
        markers: Markers,
        expected: Expected,
        *,
        call_id: Callable[[int], str],
        thinks: bool = False,
    ) -> None:
        """call_id: the id of a call, from its index; for formats that write none of their own."""
        self.symbols = markers.symbols
        self.expected = expected
        self.source = Source()
        self.thinks = thinks
        self.malformed = 0
        self.done = False
        self.pushed = 0
        self.tokens_of: Callable[[int, int], tuple[int, ...]] = lambda start, end: ()
        self._markers = markers
        self._call_id = call_id
        self._events: list[Event] = []
        self._calls = 0
        self._open: CallStart | None = None
        self._said = False
        # Of the run of content or reasoning at hand: white space that waits for what follows.
        self._waiting = ""
        self._waits_from = 0
        self._fresh = False
        self._blank = True
        self._reading = talk(self)
        self._advance()

    def push(self, text: str) -> list[Event]:
        """What the next piece of text, or a symbol, settles."""
        self.pushed += len(text)
        self.source.text += text
        self._advance()
        return self._out()

    def finish(self, *, cut: bool = False) -> list[Event]:
        """The end of the reply; `cut`: by its length."""
        before = self.malformed
        self.source.ended = True
        self._advance()
        if cut:
            self.malformed = before  # it might have become a call
        if not self._said and self._waiting and not self.thinks:
            self._tell(self._waiting, self._waits_from)
        return self._out()

    def _advance(self) -> None:
        if self.done:
            return
        try:
            next(self._reading, None)
        except _ReplyEnds:
            self.done = True

    def _out(self) -> list[Event]:
        found = merged(self._events)
        self._events = []
        return found

    # What formats' readers say.

    def say(self, text: str) -> None:
        """A piece of reasoning or content, whichever it is now."""
        (self.reason if self.thinks else self.content)(text)

    def content(self, text: str) -> None:
        """What was read last. White space alone is nothing; line breaks behind a marker are the
        format's."""
        end = self.pushed - len(self.source.text)
        if self._blank:
            self._waiting += text
            self._waits_from = end - len(self._waiting)
            if not self._waiting.strip():
                return
            text = self._waiting.lstrip("\r\n") if self._fresh else self._waiting
            self._blank = False
            self._waiting = ""
        self._said = True
        self._tell(text, end - len(text))

    def _tell(self, text: str, start: int) -> None:
        """Content that was read from this character on."""
        tokens = self.tokens_of(start, start + len(text))
        self._events.append(Content(self._markers.spell(text), tokens))

    def reason(self, text: str) -> None:
        """Line breaks at either end are the format's."""
        text = self._waiting + text
        if self._blank:
            text = text.lstrip("\r\n")
        kept = text.rstrip("\r\n")
        self._waiting = text[len(kept) :]
        if kept:
            self._blank = False
            self._said = True
            self._events.append(Reasoning(self._markers.spell(kept)))

    def turn(self, *, thinks: bool) -> None:
        """What comes from here on is reasoning, or no more."""
        self.thinks = thinks
        self._waiting = ""
        self._fresh = True
        self._blank = True

    @property
    def untold(self) -> bool:
        """Whether nothing was said yet."""
        return not self._said

    @property
    def blank(self) -> bool:
        """Whether nothing was said since the last turn."""
        return self._blank

    @property
    def called(self) -> bool:
        """Whether a call is open: what follows is of it."""
        return self._open is not None

    def spell(self, text: str) -> str:
        """The text with control tokens as they are spelled."""
        return self._markers.spell(text)

    def begin(self, name: str, id: str | None = None) -> None:
        """A call begins, unless it has.

        NotACall where this can be no function's name, or that of one that may not be called. One
        that does not exist may be: the client tells the model so.
        """
        if self._open is not None:
            return
        if _NAME.fullmatch(name) is None or name in self.expected.barred:
            raise NotACall
        self.source.forget()
        self.turn(thinks=False)
        self._said = True
        self._open = CallStart(self._calls, id or self._call_id(self._calls), name)
        self._calls += 1
        self._events.append(self._open)

    def argue(self, text: str) -> None:
        """A piece of the open call's arguments."""
        assert self._open is not None
        self._events.append(CallArguments(self._open.index, self._markers.spell(text)))

    def end(self) -> None:
        """No more of the open call comes."""
        assert self._open is not None
        self._events.append(CallEnd(self._open.index))
        self._open = None
        self.source.mark()
        if not self.expected.parallel:
            raise _ReplyEnds

    def arguments(self, name: str, *closers: str, id: str | None = None) -> Reading[None]:
        """Read a call's arguments, a JSON object, and pass their text on as it comes.

        Some write it as JSON in a string, or null where there are none. NotACall where it is none:
        from the beginning, or, once the call is under way, behind the text up to a closer. That is
        passed on as the model wrote it: the client can tell the model.
        """
        held: list[str] = []

        def emit(text: str) -> None:
            if self.called:
                self.argue(text)
            else:
                held.append(text)

        def begun() -> None:
            if not self.called:
                self.begin(name, id)
                self.argue("".join(held))

        yield from self.source.space()
        if (yield from self.source.peek()) != "{":
            written = arguments_of((yield from value_text(self.source)))
            self.begin(name, id)
            self.argue(written)
            return
        try:
            yield from json_value(self.source, emit, begun)
        except NotACall:
            if self.called:
                yield from self.broken(*closers)
            raise

    def broken(self, *closers: str) -> Reading[None]:
        """Pass on the rest of a call's arguments; the closer is left to be read."""
        found = yield from self.source.until(closers, self.argue)
        self.source.text = found + self.source.text

    def attempt(self, read: Reading[None], opener: str) -> Reading[bool]:
        """Read calls. False where it was none from the beginning: then its opener was said as it is
        spelled, and what is behind it is still to be read.

        The source must have been marked before the opener was read. It is marked again behind each
        call: what follows one and is no other is still to be read, too.
        """
        missed = False
        try:
            yield from read
        except NotACall:
            missed = self.source.marked
            self.malformed += not self.thinks
        if missed:
            self.source.rewind()
            if opener and self.source.text.startswith(opener):
                self.say(self.source.take(len(opener)))
        self.source.forget()
        if self._open is not None:
            if self.source.ended:  # in the middle of a marker
                self.source.take(len(self.source.text))
            self.end()
        return not missed
