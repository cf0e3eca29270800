"""ToolFormat: how a family of models writes tool calls."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from moebius.text.replies.call_ids import call_id
from moebius.text.replies.lark import HeldTool, Lark
from moebius.text.replies.parser import ReplyParser
from moebius.text.replies.source import Markers, Reading


class ToolFormat(ABC):
    """One family's tool calls: what begins them, and how they are read.

    name          what --tool-format calls it
    spellings     its markers, as they are spelled; `markers` has them as a source has them
    num_starters  so many of them, the first ones, begin a call or a list of calls; what is left of
                  the others behind a call is not said
    bare          what a call without any marker begins with, at the beginning of an answer; ""
                  where there is no such call
    in_reasoning  whether a call that is made before the reasoning was closed is one, and closes it
    repeats       several calls have markers each; else all stand between one pair
    """

    name: ClassVar[str]
    spellings: ClassVar[tuple[str, ...]]
    num_starters: ClassVar[int] = 1
    bare: ClassVar[str] = ""
    in_reasoning: ClassVar[bool] = False
    repeats: ClassVar[bool] = False

    def __init__(self, markers: Markers) -> None:
        self.markers = tuple(map(markers, self.spellings))
        self.starters = self.markers[: self.num_starters]
        self.closers = self.markers[self.num_starters :]

    def call_id(self, key: str, index: int) -> str:
        """The id of a call that has none in the text; `key` names its request."""
        return call_id(key, index)

    @abstractmethod
    def read(self, reply: ReplyParser, starter: str) -> Reading[None]:
        """Read what this starter began, or the bare character (""), to its end.

        NotACall as ReplyParser.attempt wants it. A call that is still open at the end is ended, and
        a closer behind it read.
        """

    @abstractmethod
    def held(self, lark: Lark, starter: str, tools: Sequence[HeldTool], *, several: bool) -> str:
        """The expression, in a grammar, of what is behind a starter ("": of a call without one), up
        to the end of the markers: a call, or several where one pair of markers has them.

        All that it takes, `read` reads as calls. RequestError for what cannot be held.
        """
