"""Measuring on a machine that others use too: pause a driver while they do, and know what slipped
through.

While a driver works, a thread looks four times a second at the CPU time that other processes took.
When it was more than BUSY_SHARE of the cores, the driver's process group is stopped until the
machine has been calm for half a second. The stopped time goes into a small shared file, and
`common.clock` in the driver leaves it out.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_CORES = os.cpu_count() or 1
INTERVAL = 0.25
BUSY_SHARE = 0.12
CALM_SHARE = 0.05
# A repetition is kept when others took at most this share of the cores while it ran.
CLEAN_SHARE = 0.05


@dataclass(slots=True)
class Disturbance:
    """What others did during one repetition: shares of all cores while the driver ran, seconds it
    stood still."""

    foreign: float = 0.0
    steal: float = 0.0
    paused: float = 0.0

    @property
    def clean(self) -> bool:
        return self.foreign <= CLEAN_SHARE


class PauseClock:
    """A file that holds the seconds for which a driver was stopped so far, as one double."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(struct.pack("d", 0.0))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 8)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        self._total += seconds
        self._shared[:] = struct.pack("d", self._total)

    def remove(self) -> None:
        self._shared.close()
        self.path.unlink(missing_ok=True)


@dataclass(slots=True)
class _Sample:
    """CPU seconds so far: of the whole machine, stolen by the host, of ours; and the time."""

    busy: float
    stolen: float
    own: float
    time: float

    @classmethod
    def take(cls, group: int | None) -> _Sample:
        busy, stolen = _machine()
        return cls(busy, stolen, _own(group), time.perf_counter())

    def foreign_since(self, before: _Sample) -> tuple[float, float]:
        """(CPU seconds that others took, seconds that passed)."""
        return max(0.0, self.busy - before.busy - (self.own - before.own)), self.time - before.time


def _machine() -> tuple[float, float]:
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / _TICKS, steal / _TICKS


def _own(group: int | None) -> float:
    """CPU seconds of this process and of every process of a group, children that ended included."""
    mine = os.times()
    total = mine.user + mine.system + mine.children_user + mine.children_system
    if group is None:
        return total
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended since
        if int(fields[2]) == group:
            total += sum(map(int, fields[11:15])) / _TICKS
    return total


def wait_until_calm(limit: float = 300.0) -> bool:
    """Wait until others leave the machine alone for a second; False if they did not within `limit`
    seconds."""
    end = time.monotonic() + limit
    calm = 0
    before = _Sample.take(None)
    while time.monotonic() < end:
        time.sleep(2 * INTERVAL)
        now = _Sample.take(None)
        foreign, passed = now.foreign_since(before)
        calm = calm + 1 if foreign < CALM_SHARE * _CORES * passed else 0
        if calm == 2:
            return True
        before = now
    return False


@contextlib.contextmanager
def watch(group: int, pauses: PauseClock, patience: float) -> Iterator[Disturbance]:
    """Guard a driver's process group for the time of the block; the result is complete when the
    block ends.

    It stands still for at most `patience` seconds in all; then it runs on, disturbed.
    """
    result = Disturbance()
    done = threading.Event()
    thread = threading.Thread(
        target=_pause_while_busy, args=(group, pauses, patience, result, done)
    )
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()


def _pause_while_busy(
    group: int, pauses: PauseClock, patience: float, result: Disturbance, done: threading.Event
) -> None:
    before = _Sample.take(group)
    foreign_total = ran = 0.0
    stolen = before.stolen
    ended = False
    while not ended:
        ended = done.wait(INTERVAL)
        now = _Sample.take(group)
        foreign, passed = now.foreign_since(before)
        foreign_total += foreign
        ran += passed
        before = now
        left = patience - result.paused
        if left > 0 and not ended and foreign > BUSY_SHARE * _CORES * passed:
            seconds = _stand_still(group, left, done)
            pauses.add(seconds)
            result.paused += seconds
            before = _Sample.take(group)
    result.foreign = foreign_total / (_CORES * ran)
    result.steal = (before.stolen - stolen) / (_CORES * (ran + result.paused))


def _stand_still(group: int, limit: float, done: threading.Event) -> float:
    """Stop the group until the machine is calm or `limit` seconds are over; returns how long it
    stood still."""
    start = time.perf_counter()
    os.killpg(group, signal.SIGSTOP)
    while not done.is_set() and time.perf_counter() - start < limit:
        if wait_until_calm(limit=8 * INTERVAL):
            break
    os.killpg(group, signal.SIGCONT)
    return time.perf_counter() - start
