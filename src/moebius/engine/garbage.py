"""Python's garbage collector, held back where thousands of objects are made and all are kept."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
