"""How long calls take on a device whose host may need longer to launch them.

A kernel of some microseconds is over before the host has launched the next one. So the device
sleeps while a whole round is launched, between two events that it notes when it comes to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import median
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]

MOST_SLEEP_S = 0.25
"""The device's longest sleep."""
ATTEMPTS = 5
"""How often a round is launched anew, under a longer sleep each time."""
_FIRST_SLEEP_S = 1e-3
_TRIAL_CYCLES = 10_000_000


class Round(NamedTuple):
    """Seconds of some calls, one after the other, on the device.

    host_late: the device was awake before all were launched, and may have waited for some.
    """

    seconds: float
    host_late: bool = False


class Clock(Protocol):
    """Times rounds of calls."""

    def round(self, calls: Sequence[Call]) -> Round: ...


class HostClock:
    """Of calls that are over when they return."""

    def round(self, calls: Sequence[Call]) -> Round:
        start = time.perf_counter()
        for call in calls:
            call()
        return Round(time.perf_counter() - start)


class DeviceClock:
    """Of calls that a CUDA device computes. It sleeps as long as the last round had needed."""

    def __init__(self) -> None:
        self.sleep_s = _FIRST_SLEEP_S

    def round(self, calls: Sequence[Call]) -> Round:
        for _ in range(ATTEMPTS):
            found = self._attempt(calls)
            if not found.host_late:
                break
        return found

    def _attempt(self, calls: Sequence[Call]) -> Round:
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.cuda._sleep(int(self.sleep_s * cycles_per_second()))
        begin.record()
        for call in calls:
            call()
        end.record()
        late = begin.query()
        launched_s = time.perf_counter() - start
        end.synchronize()
        if late:
            self.sleep_s = min(MOST_SLEEP_S, 2 * max(launched_s, self.sleep_s))
        return Round(begin.elapsed_time(end) / 1e3, late)


@cache
def cycles_per_second() -> float:
    """Of the clock that `_sleep` counts by, at its fastest: a sleep may be longer, not shorter."""
    found = []
    for _ in range(3):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.cuda._sleep(_TRIAL_CYCLES)
        end.record()
        end.synchronize()
        found.append(_TRIAL_CYCLES / begin.elapsed_time(end) * 1e3)
    return max(found)


def clock_of(device: str) -> Clock:
    return DeviceClock() if device == "cuda" else HostClock()


def warm(calls: Sequence[Call]) -> None:
    """Once each: what is compiled, or allocated once, is so by then."""
    for call in calls:
        call()


def seconds_a_call(device: str, calls: Sequence[Call], rounds: int) -> Round:
    """The median of some rounds of calls that are warm. host_late: of any of them."""
    return in_turn(device, {"": calls}, rounds)[""]


def in_turn(device: str, ways: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Round]:
    """The same of several ways to compute one thing, which take turns."""
    clocks = {name: clock_of(device) for name in ways}
    found: dict[str, list[Round]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, calls in ways.items():
            found[name].append(clocks[name].round(calls))
    return {
        name: Round(
            median(one.seconds for one in taken) / len(ways[name]),
            any(one.host_late for one in taken),
        )
        for name, taken in found.items()
    }
