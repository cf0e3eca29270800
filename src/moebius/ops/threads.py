"""How many threads torch computes with, for a part of a program that has a number of its own."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moebius import machine


def default_threads() -> int:
    """What torch takes on its own (OMP_NUM_THREADS, or one a core), as far as a CPU quota goes."""
    return min(torch.get_num_threads(), machine.threads())


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Within it torch spreads what the calling thread computes over `count` threads (None: as many as before).

    Afterwards the calling thread has what it had; other threads never notice.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    set_threads = _setter()
    set_threads(count)
    try:
        yield
    finally:
        set_threads(before)


@cache
def _setter() -> Callable[[int], Any]:
    """OpenMP's own setting, which is the calling thread's. torch.set_num_threads changes it too, but it also changes
    what every thread gets that computes with torch for the first time from then on."""
    try:
        library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library.omp_set_num_threads
    except (OSError, AttributeError):  # another system, or torch built without OpenMP
        return torch.set_num_threads
