"""A checkpoint's matrices as bytes of another format, a few rows at a time, on several threads."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from moebius.errors import WeightsError
from moebius.files import short_name
from moebius.models.store.mapped import MappedFiles
from moebius.models.store.tensors import StoredTensor
from moebius.ops import FORMATS, Matrix
from moebius.ops.formats import BlockFormat, Dense, format_named
from moebius.ops.threads import TorchThreads, default_threads
from moebius.quantize.encode import encoded

# Numbers that a thread turns into bytes at a time: an expert's matrix is work for several threads.
_PIECE = 2**17


class Rows:
    """Reads tensors where they lie and turns their rows into bytes, in order.

    threads    None: as many as torch would take. Used as a context.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads or default_threads()
        self._files = MappedFiles(whole=False)
        self._pool = ThreadPoolExecutor(self._threads, "quantize")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def pieces(
        self,
        stored: StoredTensor,
        format: str,
        *,
        first: int = 0,
        rows: int | None = None,
        order: Sequence[int] | None = None,
        added: float = 0.0,
    ) -> Iterator[memoryview]:
        """The bytes of a tensor's rows in `format`.

        The tensor is taken as rows of its last dimension, however many others it has; a vector as
        rows of one number. first, rows: those of them that are wanted. order: which of these stands
        where. added: to each number, of what lies in one plane.
        """
        count = _rows(stored) - first if rows is None else rows
        if stored.parts:
            yield from self._of_planes(stored, format, first, count, order)
            return
        matrix = self._matrix(stored).rows(first, first + count)
        if matrix.format.name == format and order is None and not added:
            yield from _as_they_are(matrix)
            self._done(stored)
            return
        at_once = max(1, _PIECE // matrix.shape[1])
        waiting: deque[Future[memoryview]] = deque()
        for start in range(0, count, at_once):
            stop = min(start + at_once, count)
            wanted = range(start, stop) if order is None else order[start:stop]
            waiting.append(self._pool.submit(self._encoded, matrix, wanted, format, stored, added))
            if len(waiting) > 2 * self._threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        self._done(stored)

    def _of_planes(
        self,
        stored: StoredTensor,
        format: str,
        first: int,
        count: int,
        order: Sequence[int] | None,
    ) -> Iterator[memoryview]:
        """The same of a tensor whose matrices lie in several planes, one matrix after the other:
        what planes have in common may be of all of a matrix's rows."""
        rows, columns = stored.shape[-2:]
        source = format_named(str(stored.format))
        shapes = source.planes(rows, columns)
        for entry in range(first // rows, -(-(first + count) // rows)):
            planes = tuple(
                self._files.view(part, dtype, entry * math.prod(shape), shape)
                for part, (dtype, shape) in zip(stored.parts, shapes, strict=True)
            )
            x_RK = source.widened(planes, torch.float32)
            start = max(first - entry * rows, 0)
            wanted_RK = x_RK[start : min(first + count - entry * rows, rows)]
            if order is not None:
                assert count == rows, "rows of one matrix are reordered as a whole"
                wanted_RK = wanted_RK[torch.tensor(order)]
            yield _bytes(_in_format(wanted_RK, format, stored))

    def _done(self, stored: StoredTensor) -> None:
        """Pages of what was read are the system's again."""
        self._files.release(stored.file, [(stored.start, stored.stop)])

    def _encoded(
        self,
        matrix: Matrix,
        rows: Sequence[int],
        format: str,
        stored: StoredTensor,
        added: float,
    ) -> memoryview:
        # Threads of our own compute pieces; torch's beside them would only wait.
        with TorchThreads(1):
            if isinstance(rows, range):
                x_RK = matrix.rows(rows.start, rows.stop).widened(torch.float32)
            else:
                x_RK = matrix.take(torch.tensor(rows), torch.float32)
            return _bytes(_in_format(x_RK + added if added else x_RK, format, stored))

    def _matrix(self, stored: StoredTensor) -> Matrix:
        """A tensor of any number of dimensions as a matrix, where it lies."""
        format = format_named(str(stored.format))
        columns = stored.shape[-1] if len(stored.shape) > 1 else 1
        rows = _rows(stored)
        ((dtype, shape),) = format.planes(rows, columns)
        return Matrix(format, (rows, columns), (self._files.view(stored, dtype, 0, shape),))


def _rows(stored: StoredTensor) -> int:
    """Of all of a tensor's matrices; of a vector each number is one."""
    return math.prod(stored.shape[:-1]) if len(stored.shape) > 1 else stored.shape[0]


def _in_format(x_RK: Tensor, name: str, stored: StoredTensor) -> Tensor:
    format = FORMATS[name]
    if isinstance(format, Dense):
        return x_RK.to(format.dtype)
    assert isinstance(format, BlockFormat)
    try:
        return encoded(x_RK, name)
    except WeightsError as error:
        where = f"{short_name(stored.file)}: tensor {stored.name!r}"
        raise WeightsError(f"{where} cannot be quantised: {error}") from None


def _as_they_are(matrix: Matrix) -> Iterator[memoryview]:
    """The bytes of what has the format already."""
    at_once = max(1, _PIECE // matrix.shape[1])
    for start in range(0, matrix.shape[0], at_once):
        (plane,) = matrix.rows(start, min(start + at_once, matrix.shape[0])).planes
        yield _bytes(plane)


def _bytes(plane: Tensor) -> memoryview:
    found: memoryview = plane.contiguous().view(torch.uint8).numpy().data
    return found.cast("B")
