"""Memory made present ahead of its use: a step that meets an absent page waits for the kernel."""

import ctypes
import mmap
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache

# From one byte to behind another, of memory or of a file.
Span = tuple[int, int]

HUGE = 2 * 2**20
# Linux 5.14; older kernels refuse them, and pages come at first use.
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23


def whole_pages(spans: Iterable[Span], page: int = mmap.PAGESIZE) -> list[Span]:
    """The pages that spans have a part in, as spans that do not touch, in order."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        first = start // page * page
        last = -(-stop // page) * page
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def reserve(nbytes: int) -> mmap.mmap:
    """Zeros, in huge pages where the system has them, which are there from their first use on."""
    size = -(-max(nbytes, 1) // HUGE) * HUGE
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # not every system has huge pages
        region.madvise(mmap.MADV_HUGEPAGE)
    return region


def give_back(address: int, nbytes: int) -> None:
    """Let the system have the pages that lie wholly within these bytes of private memory.

    What they held is gone, so nothing may read them any more. Only Linux can.
    """
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and first < last:
        _advise(first, last - first, mmap.MADV_DONTNEED)


def populate(
    address: int,
    spans: Sequence[Span],
    *,
    write: bool,
    owner: object,
    idle: Callable[[], bool] = lambda: True,
) -> None:
    """Fault in pages of a mapping, on a thread of its own, without changing what they hold, while
    it is `idle`: a virtual machine's host may take seconds to find a gigabyte, and steps that run
    meanwhile would wait.

    spans are of whole pages, counted from address, which is page-aligned. The mapping lives as long
    as `owner`; once nobody has that any more, the thread ends. Only Linux can; elsewhere nothing is
    done.
    """
    if sys.platform != "linux":
        return

    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    alive = weakref.ref(owner)

    def run() -> None:
        for first, last in spans:
            for start in range(first, last, HUGE):
                while not idle() and alive() is not None:
                    time.sleep(0.05)
                mapping = alive()  # held while the system works on it
                if mapping is None or not _advise(address + start, min(HUGE, last - start), advice):
                    return
                del mapping

    threading.Thread(target=run, name="populate", daemon=True).start()


def _advise(address: int, nbytes: int, advice: int) -> bool:
    """madvise(2); whether the system took it."""
    return int(_madvise()(address, nbytes, advice)) == 0


@cache
def _madvise() -> Callable[[int, int, int], int]:
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
