"""A checkpoint's matrices as bytes of another format, a few rows at a time, on several threads."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from moebius.errors import WeightsError
from moebius.files import short_name
from moebius.models.gguf_architecture import Moved
from moebius.models.layout import Source
from moebius.models.store.heads import of_heads
from moebius.models.store.mapped import MappedFiles
from moebius.models.store.tensors import StoredTensor
from moebius.ops import FORMATS, Matrix
from moebius.ops.formats import BlockFormat, Dense, Mxfp4Planes, format_named
from moebius.ops.threads import TorchThreads, default_threads
from moebius.quantize.blocks_of_32 import mxfp4_blocks
from moebius.quantize.encode import encoded

# Numbers that a thread turns into bytes at a time: an expert's matrix is work for several threads.
_PIECE = 2**17


Change = Callable[[Tensor], Tensor]
"""What is made of some rows of a parameter, float32."""


def _unchanged(x_RK: Tensor) -> Tensor:
    return x_RK


def _change(source: Source, moved: Moved | None) -> Change:
    columns = None if moved is None or moved.columns is None else torch.tensor(moved.columns)
    exponential = moved is not None and moved.exponential
    negative = exponential and moved is not None and not moved.positive
    if not (exponential or source.added or columns is not None):
        return _unchanged

    def change(x_RK: Tensor) -> Tensor:
        x_RK = x_RK + source.added if source.added else x_RK
        x_RK = x_RK if columns is None else x_RK[:, columns]
        if exponential:
            x_RK = x_RK.exp()
        return -x_RK if negative else x_RK

    return change


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

    def pieces(self, stored: StoredTensor, format: str) -> Iterator[memoryview]:
        """The bytes of a whole tensor in `format`: of rows of its last dimension, however many
        others it has; of a vector each number is a row."""
        if stored.parts:
            for entry in range(math.prod(stored.shape[:-2])):
                yield self._of_planes(stored, format, entry, slice(None), _unchanged)
            return
        columns = stored.shape[-1] if len(stored.shape) > 1 else 1
        matrix = self._matrix(stored, 0, (math.prod(stored.shape) // columns, columns))
        if matrix.format.name == format:
            yield from _as_they_are(matrix)
        else:
            rows = range(matrix.shape[0])
            yield from self._converted(matrix, rows, format, stored, _unchanged)
        self._done(stored)

    def of(
        self,
        source: Source,
        stored: StoredTensor,
        format: str,
        moved: Moved | None = None,
    ) -> Iterator[memoryview]:
        """The bytes of a parameter in `format`; moved: what of it is otherwise than it is held."""
        if source.heads:
            yield from self._of_heads(source, stored, format)
            return
        entry = source.entry or 0
        # Of a whole tensor of more dimensions each but the last counts.
        whole = len(source.shape) > 2
        rows = range(math.prod(source.shape[:-1])) if whole else range(*source.rows)
        order = None if moved is None else moved.rows
        wanted = rows if order is None else [rows[row] for row in order]
        change = _change(source, moved)
        if stored.parts:
            chosen = slice(*source.rows) if order is None else torch.tensor(wanted)
            yield self._of_planes(stored, format, entry, chosen, change)
            return
        shape = source.stored_shape if source.entry is None else source.stored_shape[1:]
        columns = shape[-1] if len(source.shape) > 1 else 1
        matrix = self._matrix(stored, entry, (math.prod(shape) // columns, columns))
        if source.transposed:
            (plane,) = matrix.planes
            matrix = Matrix.of(plane.t())
        same = matrix.format.name == format and order is None and change is _unchanged
        if same and not source.scattered:
            yield from _as_they_are(matrix.rows(*source.rows))
        else:
            yield from self._converted(matrix, wanted, format, stored, change)
        self._done(stored)

    def _of_heads(self, source: Source, stored: StoredTensor, format: str) -> Iterator[memoryview]:
        """What a tensor has of each head, one below the other."""
        rows, columns = stored.shape[-2:]
        if stored.parts:
            kind = format_named(str(stored.format))
            planes = [
                self._files.view(part, dtype, 0, shape)
                for part, (dtype, shape) in zip(
                    stored.parts, kind.planes(rows, columns), strict=True
                )
            ]
            whole = Matrix(kind, (rows, columns), tuple(planes))
        else:
            whole = self._matrix(stored, 0, (rows, columns))
        numbers = of_heads(whole.widened(torch.float32), source).reshape(source.shape)
        wanted = range(source.shape[0])
        yield from self._converted(Matrix.of(numbers), wanted, format, stored, _unchanged)
        self._done(stored)

    def _converted(
        self,
        matrix: Matrix,
        wanted: Sequence[int],
        format: str,
        stored: StoredTensor,
        change: Change,
    ) -> Iterator[memoryview]:
        """These rows of a matrix in another format, changed before."""

        def encode(rows: Sequence[int]) -> memoryview:
            # Threads of our own compute pieces; torch's beside them would only wait.
            with TorchThreads(1):
                if isinstance(rows, range):
                    x_RK = matrix.rows(rows.start, rows.stop, rows.step).widened(torch.float32)
                else:
                    x_RK = matrix.take(torch.tensor(rows), torch.float32)
                return _bytes(_in_format(change(x_RK), format, stored))

        at_once = max(1, _PIECE // matrix.shape[1])
        waiting: deque[Future[memoryview]] = deque()
        for start in range(0, len(wanted), at_once):
            waiting.append(self._pool.submit(encode, wanted[start : start + at_once]))
            if len(waiting) > 2 * self._threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _of_planes(
        self,
        stored: StoredTensor,
        format: str,
        entry: int,
        chosen: slice | Tensor,
        change: Change,
    ) -> memoryview:
        """Some rows of one of a tensor's matrices, which lie in several planes."""
        rows, columns = stored.shape[-2:]
        source = format_named(str(stored.format))
        shapes = source.planes(rows, columns)
        planes = tuple(
            self._files.view(part, dtype, entry * math.prod(shape), shape)
            for part, (dtype, shape) in zip(stored.parts, shapes, strict=True)
        )
        if isinstance(source, Mxfp4Planes) and format == "mxfp4" and change is _unchanged:
            return _bytes(mxfp4_blocks(planes[0][chosen], planes[1][chosen]))
        parted, some = source.select(planes, chosen)
        x_RK = change(parted.widened(some, torch.float32))
        return _bytes(_in_format(x_RK, format, stored))

    def _done(self, stored: StoredTensor) -> None:
        """Pages of what was read are the system's again."""
        self._files.release(stored.file, [(stored.start, stored.stop)])

    def _matrix(self, stored: StoredTensor, entry: int, shape: tuple[int, int]) -> Matrix:
        """One entry of a tensor as a matrix of this shape, where it lies."""
        format = format_named(str(stored.format))
        ((dtype, plane),) = format.planes(*shape)
        view = self._files.view(stored, dtype, entry * math.prod(plane), plane)
        return Matrix(format, shape, (view,))


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
