"""Files mapped into memory, and tensors over them."""

import math
import mmap
import warnings
from collections.abc import Iterable, Sequence
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
        self._bytes: dict[Path, Tensor] = {}
        # Of tensors that were asked for, such as those of all of a layer's experts.
        self._pieces: dict[tuple[Path, int, torch.dtype, tuple[int, ...]], Sequence[Tensor]] = {}

    def fetch(self, file: Path, spans: Iterable[Span]) -> None:
        """Read these bytes of a file ahead, in huge pages where the kernel has them for files."""
        region = self.map(file)
        # That a file has shrunk is for `view` to say.
        pages = [span for span in whole_pages(spans) if span[0] < len(region)]
        for start, stop in pages:
            # Nothing beside them is to be read.
            huge = (-(-start // _HUGE) * _HUGE, stop // _HUGE * _HUGE)
            _advise(region, "MADV_HUGEPAGE", huge)
            _advise(region, "MADV_WILLNEED", (start, stop))
        populate(_address(region), pages, write=False, owner=region)

    def release(self, file: Path, spans: Iterable[Span]) -> None:
        """Give pages back that lie wholly within these bytes; they are read anew at a next use."""
        region = self.map(file)
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
        region = self.map(stored.file)
        if len(region) < stored.stop:
            raise WeightsError(f"{short_name(stored.file)} shrank while it was loaded")
        start = stored.start + skipped * dtype.itemsize
        count = math.prod(shape)
        if start % dtype.itemsize:
            copied = bytearray(region[start : start + count * dtype.itemsize])
            return torch.frombuffer(copied, dtype=dtype, count=count).view(shape)
        pieces = self._cut(stored, dtype, shape)
        number, rest = divmod(skipped, max(count, 1))
        if rest == 0 and number < len(pieces):
            return pieces[number]
        stop = start + count * dtype.itemsize
        return self._bytes[stored.file][start:stop].view(dtype).view(shape)

    def _cut(
        self, stored: StoredTensor, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Sequence[Tensor]:
        """A tensor in pieces of one shape: all that there are, as one by one they take torch much
        longer."""
        key = (stored.file, stored.start, dtype, shape)
        if key not in self._pieces:
            piece = math.prod(shape) * dtype.itemsize
            count = (stored.stop - stored.start) // max(piece, 1)
            flat = self._bytes[stored.file][stored.start : stored.start + count * piece]
            self._pieces[key] = flat.view(dtype).view(count, *shape).unbind()
        return self._pieces[key]

    def map(self, file: Path) -> mmap.mmap:
        """Its map, and so far as a whole is wanted the beginning of its being read."""
        if file not in self._maps:
            region = _mapped(file)
            self._maps[file] = region
            with warnings.catch_warnings():
                # torch warns that the buffer cannot be written.
                warnings.simplefilter("ignore")
                self._bytes[file] = torch.frombuffer(region, dtype=torch.uint8)
            if self.whole:
                all_of_it = (0, len(region))
                _advise(region, "MADV_HUGEPAGE", all_of_it)
                _advise(region, "MADV_WILLNEED", all_of_it)
                populate(_address(region), [all_of_it], write=False, owner=region)
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
