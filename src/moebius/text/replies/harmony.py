"""harmony, gpt-oss' chat format: a reply is several messages, each in a channel.

    <|start|>assistant<|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|>...<|return|>

What the user is to read is in `final`, and in `commentary` that is addressed to nobody; reasoning
is in `analysis`. A message to a recipient calls a tool, and ends with <|call|>. The generation
prompt begins a message. Source: openai-harmony's documentation.
"""

import re
from collections.abc import Mapping, Sequence

from moebius.text.prompts import EncodedPrompt
from moebius.text.replies.call_ids import call_id
from moebius.text.replies.lark import ANY, HeldTool, Lark, Schema, literal
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import SYMBOLS, Markers, Reading, Spell
from moebius.text.replies.thinking import Border, State

START = "<|start|>"
CHANNEL = "<|channel|>"
MESSAGE = "<|message|>"
END = "<|end|>"
CONSTRAIN = "<|constrain|>"
STOPS = ("<|return|>", "<|call|>")
NAME = "harmony"
EFFORTS = ("low", "medium", "high")
# As models spell the beginning of an answer; of one in JSON they may say so.
FINAL_HEADS = (
    f"{CHANNEL}final{MESSAGE}",
    f"{CHANNEL}final {CONSTRAIN}json{MESSAGE}",
    f"{CHANNEL}final{CONSTRAIN}json{MESSAGE}",
    f"{CHANNEL}final json{MESSAGE}",
)

_RECIPIENT = re.compile(rf"\bto=([^\s{SYMBOLS}]+)")
_FUNCTIONS = "functions."


def fits(tokens: Mapping[str, int], template: str) -> bool:
    """Whether a model with these added tokens and this chat template writes this format."""
    written = (START, CHANNEL, MESSAGE)
    known = all(token in tokens for token in (*written, END, *STOPS))
    return known and all(token in template for token in written)


class HarmonyReply:
    """Reads such a reply, from where the prompt's own beginning of a message ends.

    Calls are looked for where tools may be called; others are left out.
    """

    def __init__(self, markers: Markers) -> None:
        self._start = markers(START)
        self._channel = markers(CHANNEL)
        self._message = markers(MESSAGE)
        self._end = markers(END)
        self._borders = (self._start, self._end, *map(markers, STOPS))
        self._analysis = re.compile(rf"{re.escape(self._channel)}\s*analysis\b")
        self._constrain = markers(CONSTRAIN)

    def __call__(self, reply: ReplyParser) -> Reading[None]:
        # Outside of messages all is content.
        found = yield from self._body(reply, "")
        while found:
            head = found if found == self._channel else ""
            text, found = yield from reply.source.text_until(self._message, *self._borders)
            if found == self._message:
                found = yield from self._body(reply, head + text)

    reasoning = f"{CHANNEL}analysis"
    call_id = staticmethod(call_id)
    border = Border(
        start=f"{CHANNEL}analysis{MESSAGE}",
        end=END,
        forced=END,
        answers=FINAL_HEADS,
        headed=True,
    )
    starters: tuple[str, ...] = ()

    @property
    def border_markers(self) -> tuple[str, ...]:
        """The markers of these, as a source has them."""
        return (self._start, self._channel, self._message)

    def start(self, prompt: EncodedPrompt, spell: Spell) -> tuple[bool, str]:
        """Whether the reply begins with reasoning, and the part of it that its prompt has begun:
        what is behind the last message's beginning."""
        for at in reversed(range(len(prompt.ids))):
            if spell(prompt.ids[at : at + 1]) == self._start:
                return False, spell(prompt.ids[at:])
        return False, ""

    def state(self, prompt: EncodedPrompt, spell: Spell) -> State:
        """Where the prompt leaves the reasoning: it may have begun the message that this is in, or
        the answer's."""
        _, begun = self.start(prompt, spell)
        head, message, _ = begun.rpartition(self._message)
        if not message:
            return "ahead"
        return "begun" if self._analysis.search(head) else "over"

    def held(self, lark: Lark, tools: Sequence[HeldTool], *, must: bool) -> None:
        """Write the grammar of a whole reply, its reasoning included: one that calls a tool, which
        ends it, or one that may."""
        channel = lark.text(self._channel)
        message = lark.text(self._message)
        kind = f'(" "? ({lark.text(self._constrain)})? "json")?'

        def call(name: str, schema: Schema) -> str:
            to = literal(f" to={_FUNCTIONS}{name}")
            head = f'{channel} "commentary" {to} | {to} {channel} "commentary"'
            return f"({head}) {kind} {message} {lark.arguments(schema)}"

        text = lark.terminal(ANY)
        calls = lark.calls(tools, call)
        begins = f'{lark.text(self._end + self._start)} "assistant"'
        before = lark.rule(
            f'{channel} ("analysis" | "commentary") {message} {text}? {begins}', "before"
        )
        final = f'{channel} "final" {kind} {message} {text}?'
        lark.start(f"{before}* {calls}" if must else f"{before}* ({calls} | {final})")

    def _body(self, reply: ReplyParser, head: str) -> Reading[str]:
        """Read a message whose head was this; the marker behind it.

        A model may forget to end a message, and to begin the next one.
        """
        borders = (*self._borders, self._channel)
        recipient = _RECIPIENT.search(head)
        if recipient is not None and (yield from self._called(reply, recipient[1], borders)):
            _, found = yield from reply.source.text_until(*borders)
            return found
        reply.turn(thinks=self._analysis.search(head) is not None)
        found = yield from reply.source.until(borders, reply.say)
        reply.turn(thinks=False)
        return found

    def _called(
        self, reply: ReplyParser, recipient: str, borders: tuple[str, ...]
    ) -> Reading[bool]:
        """Read a call of one of the request's functions. False where it is to be read as content.

        Other recipients are the format's own tools, which are not here: nothing is made of them.
        """
        tools = reply.expected.tools
        name = recipient.removeprefix(_FUNCTIONS)
        if tools is None or not (recipient.startswith(_FUNCTIONS) or name in tools):
            return True
        reply.source.mark()
        return (yield from reply.attempt(reply.arguments(name, *borders), ""))
