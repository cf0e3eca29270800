"""Python's garbage collector: held back where thousands of objects are made and all are kept, and
called often where requests leave some circles each."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_SETTLED = 10_000


@contextmanager
def uncollected() -> Iterator[None]:
    """Without collections, each of which walks all objects that there are: torch's are a million.

    Around what takes a second and leaves no circles of garbage behind. Also a decorator.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def settle() -> None:
    """What has been loaded by now stays: no collection walks it again.

    A collection of everything that a process has loaded takes a tenth of a second, while requests
    wait. What comes from here on is collected little and often: circles that requests leave behind
    do not add up to tens of megabytes, and no collection takes more than some milliseconds.
    """
    gc.freeze()
    gc.set_threshold(_SETTLED)
