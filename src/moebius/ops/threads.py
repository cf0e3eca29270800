"""How many threads torch computes with, for a part of a program that has a number of its own."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moebius import machine


def default_threads() -> int:
    """What torch takes on its own (OMP_NUM_THREADS, or one a core), as far as a CPU quota goes."""
    return min(torch.get_num_threads(), machine.threads())


class TorchThreads:
    """Within it torch spreads what the calling thread computes over `count` threads (None: as many
    as before).

    Afterwards the calling thread has what it had; other threads never notice. May be entered again,
    not nested.
    """

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._before: int | None = None

    def __enter__(self) -> None:
        before = None if self._count is None else torch.get_num_threads()
        if before != self._count:
            self._before = before
            _setter()(self._count)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            _setter()(self._before)
            self._before = None


@cache
def _setter() -> Callable[[int | None], Any]:
    """OpenMP's own setting, which is the calling thread's. torch.set_num_threads changes it too,
    but it also changes what every thread gets that computes with torch for the first time from then
    on."""
    try:
        library = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library.omp_set_num_threads
    except (OSError, AttributeError):  # another system, or torch built without OpenMP
        return torch.set_num_threads  # type: ignore[return-value]
