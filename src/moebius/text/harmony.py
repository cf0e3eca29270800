"""harmony, gpt-oss' chat format: a reply is several messages, each in a channel.

    <|start|>assistant<|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>final<|message|>...<|return|>

What the user is to read is in `final`, and in `commentary` that is addressed to nobody; reasoning
is in `analysis`. A message to a recipient calls a tool, and ends with <|call|>. The generation
prompt begins a message. Source: openai-harmony's documentation.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from moebius.text.detokenize import Detokenizer

Part = Literal["content", "reasoning", "call", "markup"]
"""What a token of a reply belongs to; markup stands around messages."""

_START = "<|start|>"
_CHANNEL = "<|channel|>"
_MESSAGE = "<|message|>"
_END = "<|end|>"
_STOPS = ("<|return|>", "<|call|>")
_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=\S")


@dataclass(frozen=True, slots=True)
class Harmony:
    """The ids of the format's tokens; stops are those that end a message and the reply with it."""

    start: int
    channel: int
    message: int
    end: int
    stops: frozenset[int]
    detokenizer: Detokenizer

    @classmethod
    def of(
        cls,
        tokens: Mapping[str, int],
        templates: Mapping[str, str],
        detokenizer: Detokenizer,
    ) -> Self | None:
        """Of a model with these added tokens and chat templates; None where it has another
        format."""
        written = (_START, _CHANNEL, _MESSAGE)
        source = templates.get("default", "")
        if not all(token in tokens for token in (*written, _END, *_STOPS)):
            return None
        if not all(token in source for token in written):
            return None
        return cls(
            start=tokens[_START],
            channel=tokens[_CHANNEL],
            message=tokens[_MESSAGE],
            end=tokens[_END],
            stops=frozenset(tokens[stop] for stop in _STOPS),
            detokenizer=detokenizer,
        )

    def reader(self, prompt_ids: Sequence[int]) -> "HarmonyReader":
        """Of the reply to a prompt, which may have begun its first message."""
        return HarmonyReader(self, prompt_ids)


class HarmonyReader:
    """Tells of each token of a reply what it belongs to."""

    def __init__(self, format: Harmony, prompt_ids: Sequence[int]) -> None:
        self._format = format
        self._head: list[int] = []
        # What the message at hand is; None in its head. Outside of messages all is content.
        self._message: Part | None = "content"
        places = reversed(range(len(prompt_ids)))
        begun = next((at for at in places if prompt_ids[at] == format.start), len(prompt_ids))
        for token_id in prompt_ids[begun:]:
            self.push(token_id)

    def push(self, token_id: int) -> Part:
        """What the next token belongs to."""
        format = self._format
        if token_id in (format.start, format.end) or token_id in format.stops:
            self._message = None
            self._head = []
        elif token_id == format.message and self._message is None:
            self._message = self._part()
        elif token_id == format.channel or self._message is None:
            # A model may forget to end a message, and to begin the next one.
            if self._message is not None:
                self._message = None
                self._head = []
            self._head.append(token_id)
        else:
            return self._message
        return "markup"

    def _part(self) -> Part:
        """What the message is whose head is complete."""
        head = self._format.detokenizer.join(self._head, skip_special=False).decode(
            "utf-8", "replace"
        )
        if _RECIPIENT.search(head):
            return "call"
        name = _NAME.search(head)
        return "reasoning" if name is not None and name[1] == "analysis" else "content"
