"""When circles of garbage are collected, in a process of their own: the collector is one of all."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc, weakref
from moebius.engine.garbage import settle, uncollected

class Circle:
    def __init__(self):
        self.itself = self

def most_alive(circles):
    known, most = [], 0
    for made in range(1, circles + 1):
        known.append(weakref.ref(Circle()))
        if made % 500 == 0:
            most = max(most, sum(each() is not None for each in known))
    return most

gc.set_threshold(100_000)
loaded = [Circle() for _ in range(50_000)]
with uncollected():
    print(most_alive(12_000) == 12_000, gc.isenabled())
settle()
print(gc.isenabled(), most_alive(30_000) <= 10_500, gc.get_freeze_count() > 50_000)
"""


def test_circles_do_not_add_up_once_all_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "True", "True", "True"], done.stderr
