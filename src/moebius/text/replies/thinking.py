"""Thinking: the markers that a family of models puts around its reasoning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from moebius.text.replies.source import Markers


@dataclass(frozen=True, slots=True)
class _Spelling:
    """label: what follows the opener and belongs to it. lead: a line break that
    a model writes before the closer."""

    open: str
    close: str
    label: str = ""
    lead: str = ""


# In the order in which they are looked for.
_SPELLINGS = (
    _Spelling("<|channel>", "<channel|>", "thought\n"),
    _Spelling("[THINK]", "[/THINK]"),
    _Spelling("<seed:think>", "</seed:think>"),
    _Spelling("<think>", "</think>", lead="\n"),
    _Spelling("Here is my thought process:", "Here is my response:"),
)


State = Literal["begun", "over", "ahead"]
"""Where a prompt leaves a reply's reasoning; ahead: the reply may begin with it."""


@dataclass(frozen=True, slots=True)
class Border:
    """What a format writes round its reasoning.

    start    what begins it
    end      what ends it
    forced   what a model itself would write to end it, up to `end`
    answers  behind which the answer begins: any of them
    headed   an answer without reasoning is behind one of these, too
    """

    start: str
    end: str
    forced: str
    answers: tuple[str, ...]
    headed: bool = False


@dataclass(frozen=True, slots=True)
class ReasoningEnds:
    """A Border in token ids: for what is to begin behind a reply's reasoning, or to end it.

    state    where the prompt leaves it
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    forced: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    headed: bool
    state: State

    @property
    def begun(self) -> bool:
        """Whether the prompt has begun it."""
        return self.state == "begun"


@dataclass(frozen=True, slots=True)
class Thinking:
    """Markers round a reply's reasoning, as a source has them."""

    written: _Spelling
    open: str
    close: str
    label: str = ""

    @property
    def spelling(self) -> str:
        """How it begins."""
        return self.written.open

    @property
    def border(self) -> Border:
        written = self.written
        return Border(
            start=written.open + written.label,
            end=written.close,
            forced=written.lead + written.close,
            answers=(written.close,),
        )

    @classmethod
    def of(cls, tokens: Mapping[str, int], template: str, markers: Markers) -> Self | None:
        """Those of a model with these added tokens and this chat template; None where it has
        none."""
        for spelling in _SPELLINGS:
            ends = (spelling.open, spelling.close)
            if all(end in tokens for end in ends) or all(end in template for end in ends):
                return cls(
                    spelling,
                    open=markers(spelling.open),
                    close=markers(spelling.close),
                    label=spelling.label,
                )
        return None

    def left_by(self, tail: str) -> State:
        """Where a prompt that ends like this leaves the reasoning: what its last marker says."""
        opened = tail.rfind(self.open)
        closed = tail.rfind(self.close)
        if opened == closed:
            return "ahead"  # there is none
        return "begun" if opened > closed else "over"
