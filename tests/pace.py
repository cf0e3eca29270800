"""How fast the machine is now, for tests of a promise in seconds of processor time.

A promise is a figure for a machine of today that has a processor to itself. On a slower one, or
beside others on the same core, whatever is measured takes longer, and so does this loop. A test that
allows what the loop's time says finds code that has become slow, and not machines that are.
"""

from __future__ import annotations

import time

_ROUNDS = 20_000
LOOP_SECONDS = 0.004
"""What the loop takes on a machine that the promises are for: 2.7 ms on an idle core of Zen 3."""


def loop() -> float:
    """Seconds of this thread's processor time for a fixed piece of Python."""
    began = time.thread_time()
    found: dict[int, str] = {}
    for i in range(_ROUNDS):
        found[i % 997] = str(i)
    return time.thread_time() - began


def allowed(seconds: float) -> float:
    """The promise, or as much more as the machine is slower just now. Asked for after what is
    measured, while the machine is as it was then."""
    return seconds * max(1.0, loop() / LOOP_SECONDS)
