"""The one quantile that tests need, without a statistics package."""

from __future__ import annotations

import math


def chi_square_limit(degrees: int, z: float = 4.5) -> float:
    """Value that a chi-square variable exceeds about as often as a normal one exceeds z (Wilson and
    Hilferty 1931)."""
    if degrees < 1:
        return 1e-9
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + z * math.sqrt(spread)) ** 3
