"""Memory that is faulted in ahead of its use."""

from __future__ import annotations

import ctypes
import sys
import threading

import pytest

from moebius.pages import HUGE, populate, reserve

SECONDS = 20


def populating(before: set[threading.Thread]) -> threading.Thread:
    (thread,) = set(threading.enumerate()) - before
    return thread


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux populates")
def test_what_nobody_has_any_more_is_not_populated() -> None:
    region = reserve(4 * HUGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    before = set(threading.enumerate())
    asked = threading.Event()

    def never() -> bool:
        asked.set()
        return False

    populate(address, [(0, 4 * HUGE)], write=True, owner=region, idle=never)
    thread = populating(before)
    assert asked.wait(SECONDS) and thread.is_alive()
    del region
    thread.join(SECONDS)
    assert not thread.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux populates")
def test_populated_pages_hold_what_they_held() -> None:
    region = reserve(2 * HUGE)
    region[5:9] = b"held"
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    before = set(threading.enumerate())
    populate(address, [(0, len(region))], write=True, owner=region)
    for thread in set(threading.enumerate()) - before:
        thread.join(SECONDS)
    assert region[5:9] == b"held" and not any(region[-64:])
