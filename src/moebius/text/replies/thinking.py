"""Thinking: the markers that a family of models puts around its reasoning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

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


@dataclass(frozen=True, slots=True)
class ReasoningEnds:
    """Token ids round a reply's reasoning: for what is to begin behind it, or to end it.

    start    what begins it
    end      what ends it
    forced   what a model itself would write to end it, up to `end`
    answer   behind what the answer begins: `end`, as a rule
    begun    whether the prompt has begun it
    """

    start: tuple[int, ...]
    end: tuple[int, ...]
    forced: tuple[int, ...]
    answer: tuple[int, ...]
    begun: bool


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
    def ends(self) -> tuple[str, str, str, str]:
        """ReasoningEnds' sequences, as they are spelled."""
        written = self.written
        opens = written.open + written.label
        return opens, written.close, written.lead + written.close, written.close

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

    def begun_by(self, tail: str) -> bool:
        """Whether a prompt that ends like this has begun the reasoning: whether the last marker in
        it is an opener."""
        return tail.rfind(self.open) > tail.rfind(self.close)
