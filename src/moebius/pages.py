"""Memory made present ahead of its use: a step that meets an absent page waits for the kernel."""

import ctypes
import sys
import threading
import time
from collections.abc import Callable

_CHUNK = 2 * 2**20
# Linux 5.14; older kernels refuse them, and pages come at first use.
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23


def populate(
    address: int, nbytes: int, *, write: bool, keep: object, idle: Callable[[], bool] = lambda: True
) -> None:
    """Fault in the pages of a mapping, on a thread of its own, without changing what they hold,
    while it is `idle`: a virtual machine's host may take seconds to find a gigabyte, and steps that
    run meanwhile would wait.

    address is page-aligned; `keep` holds the mapping alive until it is done. Only Linux can;
    elsewhere nothing is done.
    """
    if sys.platform != "linux":
        return

    def run(keep: object) -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
        for start in range(0, nbytes, _CHUNK):
            while not idle():
                time.sleep(0.05)
            if madvise(address + start, min(_CHUNK, nbytes - start), advice) != 0:
                return

    threading.Thread(target=run, args=(keep,), name="populate", daemon=True).start()
