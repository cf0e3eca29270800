"""Files mapped into memory, and tensors over them."""

import math
import mmap
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moebius.errors import WeightsError
from moebius.files import short_name
from moebius.models.store.tensors import StoredTensor
from moebius.pages import Span, populate, whole_pages

# What the kernel reads a file in, where it has huge pages for files.
_HUGE = 2 * 2**20


class MappedFiles:
    """Read-only maps of files, each made once. A map lives as long as a tensor over it.

    whole: all of a file is read ahead once it is mapped, and otherwise what is asked for by `fetch`
    alone. Of the rest there are addresses and no pages.
    """

    def __init__(self, *, whole: bool = True) -> None:
        self.whole = whole
        self._maps: dict[Path, mmap.mmap] = {}

    def fetch(self, file: Path, spans: Iterable[Span]) -> None:
        """Read these bytes of a file ahead, in huge pages where the kernel has them for files."""
        region = self._region(file)
        # That a file has shrunk is for `view` to say.
        pages = [span for span in whole_pages(spans) if span[0] < len(region)]
        for start, stop in pages:
            # Nothing beside them is to be read.
            huge = (-(-start // _HUGE) * _HUGE, stop // _HUGE * _HUGE)
            _advise(region, "MADV_HUGEPAGE", huge)
            _advise(region, "MADV_WILLNEED", (start, stop))
        populate(_address(region), pages, write=False, keep=region)

    def release(self, file: Path, spans: Iterable[Span]) -> None:
        """Give pages back that lie wholly within these bytes; they are read anew at a next use."""
        region = self._region(file)
        for start, stop in spans:
            inner = (
                -(-start // mmap.PAGESIZE) * mmap.PAGESIZE,
                stop // mmap.PAGESIZE * mmap.PAGESIZE,
            )
            _advise(region, "MADV_DONTNEED", inner)

    def view(
        self, stored: StoredTensor, dtype: torch.dtype, skipped: int, shape: tuple[int, ...]
    ) -> Tensor:
        """Numbers of `dtype` where they lie, `skipped` of them behind the tensor's beginning.

        A copy where they are not aligned. Nothing may write to it. Raises WeightsError where the
        file has shrunk since its header was read.
        """
        region = self._region(stored.file)
        if len(region) < stored.stop:
            raise WeightsError(f"{short_name(stored.file)} shrank while it was loaded")
        start = stored.start + skipped * dtype.itemsize
        count = math.prod(shape)
        with warnings.catch_warnings():
            # torch warns that the buffer cannot be written.
            warnings.simplefilter("ignore")
            if start % dtype.itemsize == 0:
                flat = torch.frombuffer(region, dtype=dtype, count=count, offset=start)
            else:
                copied = bytearray(region[start : start + count * dtype.itemsize])
                flat = torch.frombuffer(copied, dtype=dtype, count=count)
        return flat.view(shape)

    def _region(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            region = _mapped(file)
            self._maps[file] = region
            if self.whole:
                all_of_it = (0, len(region))
                _advise(region, "MADV_HUGEPAGE", all_of_it)
                _advise(region, "MADV_WILLNEED", all_of_it)
                populate(_address(region), [all_of_it], write=False, keep=region)
        return self._maps[file]


def _address(region: mmap.mmap) -> int:
    address: int = np.frombuffer(region, np.uint8).ctypes.data
    return address


def _advise(region: mmap.mmap, advice: str, span: Span) -> None:
    """Not every system knows these words."""
    start, stop = span
    if start < stop:
        with suppress(OSError, AttributeError):
            region.madvise(getattr(mmap, advice), start, stop - start)


def _mapped(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as cause:
        reason = cause.strerror or cause
        raise WeightsError(f"{short_name(file)} cannot be mapped: {reason}") from None
    except ValueError:  # of an empty file
        raise WeightsError(f"{short_name(file)} shrank while it was loaded") from None
