"""Restriction: which tokens one draw may give."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint32]
"""A set of token ids: id i is bit i % 32 of word i // 32."""


@dataclass(frozen=True, slots=True, eq=False)
class Restriction:
    """What one draw is held to.

    allowed   ids, of which one is drawn; None: all
    banned    ids of which none is
    shortens  min_tokens bans nothing here: all that is allowed would be
    """

    allowed: Bits | None = None
    banned: tuple[int, ...] = ()
    shortens: bool = False

    @property
    def free(self) -> bool:
        """Any token may be drawn."""
        return self.allowed is None and not self.banned
