"""Memory made present ahead of its use: a step that meets an absent page waits for the kernel."""

import ctypes
import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence

# From one byte to behind another, of memory or of a file.
Span = tuple[int, int]

_CHUNK = 2 * 2**20
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


def populate(
    address: int,
    spans: Sequence[Span],
    *,
    write: bool,
    keep: object,
    idle: Callable[[], bool] = lambda: True,
) -> None:
    """Fault in pages of a mapping, on a thread of its own, without changing what they hold, while
    it is `idle`: a virtual machine's host may take seconds to find a gigabyte, and steps that run
    meanwhile would wait.

    spans are of whole pages, counted from address, which is page-aligned; `keep` holds the mapping
    alive until it is done. Only Linux can; elsewhere nothing is done.
    """
    if sys.platform != "linux":
        return

    def run(keep: object) -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
        for first, last in spans:
            for start in range(first, last, _CHUNK):
                while not idle():
                    time.sleep(0.05)
                if madvise(address + start, min(_CHUNK, last - start), advice) != 0:
                    return

    threading.Thread(target=run, args=(keep,), name="populate", daemon=True).start()
