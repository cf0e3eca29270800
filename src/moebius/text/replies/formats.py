"""ReplyFormat: how a model's replies are read, found by its vocabulary and its chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from moebius.errors import ConfigError
from moebius.text.prompts import EncodedPrompt
from moebius.text.replies import harmony
from moebius.text.replies.detect import KINDS, Vocabulary, detect
from moebius.text.replies.harmony import HarmonyReply
from moebius.text.replies.held_calls import held_calls
from moebius.text.replies.lark import HeldTool, Lark
from moebius.text.replies.marked import MarkedReply
from moebius.text.replies.parser import Expected, ReplyParser
from moebius.text.replies.source import Markers, Spell
from moebius.text.replies.thinking import ReasoningEnds, Thinking
from moebius.text.replies.tools import ToolFormat

FORMATS = ("auto", "none", *KINDS, harmony.NAME)
"""What --tool-format may be."""

# From none to as much as there is.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class _Reader:
    """A reader of whole replies, and the markers that it knows."""

    markers: Markers
    talk: MarkedReply | HarmonyReply


class ReplyFormat:
    """How a model writes reasoning and tool calls, if it does.

    tools       the name of its format of tool calls; None: it has none that is known
    reasoning   how the beginning of its reasoning is spelled; None: it has none that is known
    end_ids     tokens that end a reply in this format
    efforts     the levels of reasoning that its template knows
    starter_id  the one token that every call begins with; None where there is no such
    """

    def __init__(self, vocabulary: Vocabulary, tools: str = "auto") -> None:
        """tools: one of FORMATS; ConfigError for another."""
        if tools not in FORMATS:
            raise ConfigError(f"tool_format is {tools!r}; it must be one of {', '.join(FORMATS)}")
        self._vocabulary = vocabulary
        found = detect(vocabulary) if tools == "auto" else tools
        self.tools = None if found == "none" else found
        self._is_harmony = harmony.NAME in (found, detect(vocabulary))
        self._calling = self._reader(calls=True)
        self._plain = self._reader(calls=False)
        self.reasoning = self._plain.talk.reasoning
        self.efforts = harmony.EFFORTS if self._is_harmony else EFFORTS
        self.starter_id = self._starter()
        self.end_ids: frozenset[int] = frozenset()
        if self._is_harmony:
            stops = (vocabulary.tokens.get(stop) for stop in harmony.STOPS)
            self.end_ids = frozenset(stop for stop in stops if stop is not None)

    def with_tools(self, tools: str) -> "ReplyFormat":
        """The same with calls in the format that FORMATS calls so. ConfigError for no such."""
        return ReplyFormat(self._vocabulary, tools)

    def _reader(self, *, calls: bool) -> _Reader:
        markers = Markers(self._vocabulary.tokens)
        if self._is_harmony:
            return _Reader(markers, HarmonyReply(markers))
        tools: ToolFormat | None = None
        if calls and self.tools is not None:
            tools = KINDS[self.tools](markers)
        thinking = Thinking.of(self._vocabulary.tokens, self._vocabulary.template, markers)
        return _Reader(markers, MarkedReply(thinking, tools))

    @property
    def bounds_reasoning(self) -> bool:
        """Whether the model has reasoning whose markers are tokens."""
        reader = self._plain
        symbols = reader.markers.symbols.values()
        return reader.talk.border is not None and all(
            marker in symbols for marker in reader.talk.border_markers
        )

    def reasoning_ends(self, prompt: EncodedPrompt) -> ReasoningEnds | None:
        """Where the reasoning of a reply to this prompt begins and ends; None where the model has
        none, or its markers are no tokens, which it may spell in several ways."""
        reader = self._plain
        border = reader.talk.border
        if border is None or not self.bounds_reasoning:
            return None
        return ReasoningEnds(
            start=self._ids(border.start),
            end=self._ids(border.end),
            forced=self._ids(border.forced),
            answers=tuple(map(self._ids, border.answers)),
            headed=border.headed,
            state=reader.talk.state(prompt, self._spell(reader)),
        )

    @property
    def starter_ids(self) -> tuple[int, ...]:
        """Tokens that begin calls."""
        ids = map(self._calling.markers.id_of, self._calling.talk.starters)
        return tuple(token_id for token_id in ids if token_id is not None)

    def held(self, tools: Sequence[HeldTool], *, must: bool, several: bool) -> tuple[str, bool]:
        """The grammar, in Lark, of a reply that may call these: at once (`must`), or somewhere in
        what it says. And whether it is that of the whole reply, its reasoning included.

        several   it may make more than one call
        RequestError for what cannot be held to in the model's format, which must be known.
        """
        lark = Lark(self._token_of)
        talk = self._calling.talk
        if isinstance(talk, HarmonyReply):
            talk.held(lark, tools, must=must)
            return str(lark), True
        assert talk.tools is not None, "tools need a format"
        held_calls(lark, talk.tools, tools, must=must, several=several)
        return str(lark), False

    def _token_of(self, marker: str) -> int | None:
        return self._calling.markers.id_of(marker)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._vocabulary.encode(text))

    def _spell(self, reader: _Reader) -> Spell:
        symbols = reader.markers.symbols
        text_of = self._vocabulary.text_of
        return lambda ids: "".join(symbols.get(i) or text_of(i) for i in ids)

    def _starter(self) -> int | None:
        kind = None if self.tools is None or self._is_harmony else KINDS[self.tools]
        if kind is None or kind.bare or kind.num_starters > 1:
            return None
        return self._vocabulary.tokens.get(kind.spellings[0])

    def parser(self, prompt: EncodedPrompt, expected: Expected, key: str) -> ReplyParser:
        """Of the reply to this prompt, whose end may have begun the reasoning or a message.

        key: names the request; the ids of its calls are made of it.
        """
        reader = self._plain if expected.tools is None else self._calling
        thinks, begun = reader.talk.start(prompt, self._spell(reader))
        named = partial(reader.talk.call_id, key)
        parser = ReplyParser(reader.talk, reader.markers, expected, call_id=named, thinks=thinks)
        parser.push(begun)
        return parser
