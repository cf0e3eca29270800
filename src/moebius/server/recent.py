"""What the front door hears between two frames of the live page: latencies and ends of sequences.

`ServerMetrics` tells it of them while somebody looks, and has none of it otherwise.
"""

import math
from collections import Counter

_BINS_PER_DECADE = 24
_SHORTEST = 1e-5
_LONGEST = 1e5

Binned = list[tuple[float, int]]
"""(milliseconds, how many), shortest first."""


class Bins:
    """Durations by size, in bins a tenth wide: at most 240 of them, however many durations came."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        seconds = min(max(seconds, _SHORTEST), _LONGEST)
        self._counts[math.floor(_BINS_PER_DECADE * math.log10(seconds))] += 1

    def take(self) -> Binned:
        """What came since the last time, each bin by its geometric middle: 5 % off at most."""
        counts = sorted(self._counts.items())
        self._counts.clear()
        middles = ((1e3 * 10 ** ((bin + 0.5) / _BINS_PER_DECADE), count) for bin, count in counts)
        return [(float(f"{milliseconds:.3g}"), count) for milliseconds, count in middles]


class Recent:
    """Since the last frame. Everything happens on the event loop."""

    def __init__(self) -> None:
        self.first_token = Bins()
        self.between_tokens = Bins()
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def take_ends(self) -> tuple[dict[str, int], dict[str, int]]:
        """Sequences that ended, and calls that were refused, each by its reason."""
        ends = dict(self.finished), dict(self.refused)
        self.finished.clear()
        self.refused.clear()
        return ends
