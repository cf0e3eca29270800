"""Replies that are one text with markers in it: reasoning between two of them, calls between
others, and all else content."""

from moebius.text.prompts import EncodedPrompt
from moebius.text.replies.call_ids import call_id
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import Reading, Spell
from moebius.text.replies.thinking import Border, State, Thinking
from moebius.text.replies.tools import ToolFormat

# Of a prompt's tokens, a marker that begins the answer, and line breaks behind it, are among the
# last ones.
_TAIL = 32


class MarkedReply:
    """Reads such a reply. Either of its two parts may be none."""

    def __init__(self, thinking: Thinking | None, tools: ToolFormat | None) -> None:
        self._thinking = thinking
        self.tools = tools
        self.call_id = call_id if tools is None else tools.call_id
        self.reasoning = None if thinking is None else thinking.spelling

    @property
    def border(self) -> Border | None:
        """What it writes round its reasoning."""
        return None if self._thinking is None else self._thinking.border

    @property
    def border_markers(self) -> tuple[str, ...]:
        """The markers of these, as a source has them."""
        return () if self._thinking is None else (self._thinking.open, self._thinking.close)

    @property
    def starters(self) -> tuple[str, ...]:
        """The markers that begin calls."""
        return () if self.tools is None else self.tools.starters

    def start(self, prompt: EncodedPrompt, spell: Spell) -> tuple[bool, str]:
        """Whether the reply begins with reasoning, and the part of it that its prompt has begun."""
        return self.state(prompt, spell) == "begun", ""

    def state(self, prompt: EncodedPrompt, spell: Spell) -> State:
        """Where the prompt leaves the reasoning.

        What counts is the last marker in what the template has added for the answer. Where that is
        not known, it is one that the prompt ends with: what is before it may be a user's.
        """
        thinking = self._thinking
        if thinking is None:
            return "ahead"
        if prompt.generation_start is not None:
            return thinking.left_by(spell(prompt.ids[prompt.generation_start :]))
        tail = spell(prompt.ids[-_TAIL:]).rstrip()
        if tail.endswith((thinking.open, thinking.close)):
            return thinking.left_by(tail)
        return "ahead"

    def __call__(self, reply: ReplyParser) -> Reading[None]:
        tools = self.tools
        answered = False
        while True:
            if tools is not None and tools.bare and not reply.thinks and not answered:
                answered = yield from _bare(reply, tools)
            found = yield from reply.source.until(self._markers(reply), reply.say)
            answered = answered or not (reply.thinks or reply.blank)
            if not found:
                return
            if tools is not None and found in tools.starters:
                yield from _calls(reply, tools, found)
            else:
                yield from self._turn(reply, found)

    def _markers(self, reply: ReplyParser) -> tuple[str, ...]:
        """What may come next."""
        ends = () if self._thinking is None else (self._thinking.open, self._thinking.close)
        tools = self.tools
        in_reasoning = tools is not None and tools.in_reasoning and not reply.expected.held
        if tools is None or (reply.thinks and not in_reasoning):
            return ends
        return (*ends, *tools.starters)

    def _turn(self, reply: ReplyParser, found: str) -> Reading[None]:
        """Reasoning begins or ends.

        A model may repeat an opener that its prompt ends with, or a closer. Nothing that was said
        before a stray closer becomes reasoning: it was sent already.
        """
        assert self._thinking is not None
        opens = found == self._thinking.open
        if opens == reply.thinks and not reply.blank:
            reply.say(found)
            return
        reply.turn(thinks=opens)
        if opens and self._thinking.label:
            yield from reply.source.accepts(self._thinking.label)


def _calls(reply: ReplyParser, tools: ToolFormat, starter: str) -> Reading[None]:
    reply.source.text = starter + reply.source.text
    reply.source.mark()
    reply.source.take(len(starter))
    if (yield from reply.attempt(tools.read(reply, starter), starter)):
        yield from reply.source.closes(*tools.closers)


def _bare(reply: ReplyParser, tools: ToolFormat) -> Reading[bool]:
    """A call without a marker, where the answer begins with it; whether it seems to."""
    reply.source.mark()
    yield from reply.source.space()
    seems = (yield from reply.source.peek()) == tools.bare
    reply.source.rewind()
    if seems:
        yield from _calls(reply, tools, "")
    return seems
