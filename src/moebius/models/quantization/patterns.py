"""Regular expressions out of files that anybody may have written, matched in bounded time.

Python's `re` goes back over every choice that an expression leaves, and some leave more choices
than can be tried. So the ways through one are counted before it is used: an expression that repeats
what has a choice itself is refused, and so is one with too many choices side by side. What a
checkpoint's expressions cost together is measured as they are used.
"""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from moebius.errors import ConfigError

_MOST_LENGTH = 1000
# Ends of a repeat that are tried: names of modules are no longer.
_ENDS = 64
_MOST_WAYS = 10**10
_MOST_SECONDS = 10.0
_TOKEN = re.compile(
    r"""(?P<other>\\. | \[\^?\]?(?:\\.|[^\\\]])*\])
    | (?P<open>\((?:\?(?:P?<[A-Za-z_]\w*>|P=|<?[=!]|[a-zA-Z-]*:|>|\#)?)?)
    | (?P<close>\))
    | (?P<bar>\|)
    | (?P<repeat>(?:[*+?]|\{\d*,?\d*\})[?+]?)
    | (?P<any>.)""",
    re.VERBOSE | re.DOTALL,
)


class Patterns:
    """Regular expressions for the beginnings of modules' names."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Raises ConfigError for one that is none, or that could take too long."""
        self._compiled = [_checked(each) for each in patterns]
        self._seconds = 0.0

    def match(self, module: str) -> bool:
        """Whether any matches. Raises ConfigError where all names together took too long."""
        if not self._compiled:
            return False
        start = time.thread_time()
        found = any(each.match(module) for each in self._compiled)
        self._seconds += time.thread_time() - start
        if self._seconds > _MOST_SECONDS:
            first = self._compiled[0].pattern
            raise _error(first, "and those beside it take too long to match this model's names")
        return found


def _error(pattern: str, what: str) -> ConfigError:
    shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
    return ConfigError(f"config.json: quantization_config: {shown!r} {what}")


def _checked(pattern: str) -> re.Pattern[str]:
    if len(pattern) > _MOST_LENGTH:
        raise _error(pattern, f"has {len(pattern)} characters; supported are {_MOST_LENGTH}")
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as cause:
        raise _error(pattern, f"is no regular expression: {cause}") from None
    ways = ways_through(pattern)
    if ways is None:
        raise _error(
            pattern,
            "repeats what has choices itself, which can take for ever to match; "
            "supported are repeats of what has none",
        )
    if ways > _MOST_WAYS:
        raise _error(pattern, "leaves too many choices, which can take for ever to match")
    return compiled


@dataclass(slots=True)
class _Group:
    """What has been read of a group.

    ways   through it: no more than the product of its choices, with as many for each alternative
    last   ways through what a repeat that comes next would repeat
    """

    ways: int = 1
    bars: int = 0
    last: int = 1

    @property
    def all_ways(self) -> int:
        return self.ways * (self.bars + 1)


def ways_through(pattern: str) -> int | None:
    """An upper bound for the ways in which an expression can be gone through; None for one that
    repeats what has more than one."""
    groups = [_Group()]
    for token in _TOKEN.finditer(pattern):
        group = groups[-1]
        kind = token.lastgroup
        if kind == "open":
            groups.append(_Group())
        elif kind == "close" and len(groups) > 1:
            groups.pop()
            groups[-1].ways *= group.all_ways
            groups[-1].last = group.all_ways
        elif kind == "bar":
            group.bars += 1
            group.last = 1
        elif kind == "repeat":
            ends = _ends(token.group())
            if group.last > 1 and ends != 2:
                return None
            group.ways *= ends
            group.last *= ends
        else:
            group.last = 1
    return groups[0].all_ways


def _ends(repeat: str) -> int:
    """After how many times a repeat may end; 2 is once or not at all."""
    if repeat[0] == "?":
        return 2
    if repeat[0] in "*+":
        return _ENDS
    low, comma, high = repeat[1 : repeat.index("}")].partition(",")
    if not comma:
        # Exactly so often: no choice, but one to each time in what it repeats.
        return 1
    return int(high) - int(low or 0) + 1 if high else _ENDS
