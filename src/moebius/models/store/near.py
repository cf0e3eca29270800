"""Parts of files in this process's own memory, which lies where the process is bound to.

What is mapped of a file lies in the memory of whichever node read it first, once for all who map
it. Where ranks of one host compute on several nodes, it is far for some of them. So each has a
private copy: such memory gets huge pages on every system, and when a rank has ended nothing is left
of it, or to be found again by the next.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from moebius.errors import WeightsError
from moebius.files import short_name
from moebius.models.store.tensors import StoredTensor
from moebius.pages import Span, reserve, whole_pages

# Copies begin where in a cache line the bytes in the file do.
_LINE = 64
# What one thread reads at a time.
_PIECE = 16 * 2**20


@dataclass(frozen=True, slots=True)
class _Run:
    """Bytes of a file, and where they begin in memory."""

    start: int
    stop: int
    place: int

    def pieces(self) -> Iterator["_Run"]:
        for first in range(self.start, self.stop, _PIECE):
            place = self.place + first - self.start
            yield _Run(first, min(first + _PIECE, self.stop), place)


class NearFiles:
    """Copies of these bytes of files, read by so many threads. They live as long as tensors over
    any of them.

    Raises WeightsError for a file that cannot be read, or has shrunk since its header was read.
    """

    def __init__(self, spans: Mapping[Path, Iterable[Span]], threads: int = 1) -> None:
        self._runs: dict[Path, list[_Run]] = {}
        size = 0
        for file, wanted in spans.items():
            runs = self._runs.setdefault(file, [])
            for start, stop in whole_pages(wanted, page=1):
                place = size + (start - size) % _LINE
                runs.append(_Run(start, stop, place))
                size = place + stop - start
        self._region = reserve(size)
        self._read(threads)

    def view(
        self, stored: StoredTensor, dtype: torch.dtype, skipped: int, shape: tuple[int, ...]
    ) -> Tensor:
        """Numbers of `dtype` out of a copy, `skipped` of them behind the tensor's beginning."""
        start = stored.start + skipped * dtype.itemsize
        runs = self._runs[stored.file]
        run = runs[bisect_right(runs, start, key=lambda each: each.start) - 1]
        offset = run.place + start - run.start
        count = math.prod(shape)
        flat = torch.frombuffer(self._region, dtype=dtype, count=count, offset=offset)
        return flat.view(shape)

    def _read(self, threads: int) -> None:
        with ExitStack() as opened, ThreadPoolExecutor(threads) as pool:
            done = []
            for path, runs in self._runs.items():
                file = opened.enter_context(_opened(path))
                pieces = [piece for run in runs for piece in run.pieces()]
                done += [pool.submit(self._copy, file, piece) for piece in pieces]
            for each in done:
                each.result()

    def _copy(self, file: BinaryIO, run: _Run) -> None:
        memory = memoryview(self._region)[run.place : run.place + run.stop - run.start]
        start = run.start
        while memory:
            try:
                count = os.preadv(file.fileno(), [memory], start)
            except OSError as cause:
                raise _unreadable(Path(file.name), cause) from None
            if count == 0:
                raise WeightsError(f"{short_name(Path(file.name))} shrank while it was loaded")
            memory = memory[count:]
            start += count


def _opened(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as cause:
        raise _unreadable(file, cause) from None


def _unreadable(file: Path, cause: OSError) -> WeightsError:
    return WeightsError(f"{short_name(file)} cannot be read: {cause.strerror or cause}")
