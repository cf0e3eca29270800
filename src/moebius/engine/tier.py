"""What the engine's loop knows of a second tier of its prefix cache: a turn between two steps."""

from typing import Protocol

from moebius.engine.client import DiskStats
from moebius.engine.counters import Counters
from moebius.engine.tracing import Tracing


class Tier(Protocol):
    """Used by the engine's thread alone, but for `stats`."""

    def turn(self, now: float, counters: Counters, trace: Tracing) -> None:
        """Do what is to be done before the next plan, at `now` on the engine's clock."""

    def stats(self) -> DiskStats: ...

    def close(self) -> None: ...


class NoTier:
    """There is none."""

    def turn(self, now: float, counters: Counters, trace: Tracing) -> None:
        pass

    def stats(self) -> DiskStats:
        return DiskStats()

    def close(self) -> None:
        pass


NO_TIER = NoTier()
