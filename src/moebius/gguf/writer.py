"""Writing one GGUF file: its head is known before any tensor's bytes are, which come in pieces."""

import math
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moebius.errors import StorageError
from moebius.files import Ours, begins_with, write_file
from moebius.gguf.reader import Value
from moebius.gguf.types import ALIGNMENT, ARRAY, BOOL, MAGIC, NUMBERS, STRING, BlockType

Pieces = Callable[[], Iterable[bytes | memoryview]]
"""Gives a tensor's bytes, in order."""

_VERSION = 3
_U32 = 4
_I32 = 5
_F32 = 6
_U64 = 10
_I64 = 11

gguf_file: Ours = begins_with(MAGIC)
"""Whether a file that is there is a GGUF file."""


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """One tensor; shape is as everywhere else, the slowest dimension first."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    pieces: Pieces

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numbers // self.type.elements * self.type.nbytes


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """A file as it will be: its head, and where each tensor begins, from the file's beginning."""

    head: bytes
    starts: tuple[int, ...]
    size: int


def lay_out(metadata: Mapping[str, Value], tensors: Sequence[TensorToWrite]) -> GgufLayout:
    """The head, and every tensor behind the one before it, at multiples of the alignment.

    Whole numbers are written as 32 bits where they fit (unsigned ones alone, signed ones in
    arrays), else as 64; other numbers as float32.
    """
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    offset = 0
    offsets = []
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        form = f"<I{len(sizes)}QIQ"
        line = struct.pack(form, len(sizes), *sizes, tensor.type.number, offset)
        parts += [_text(tensor.name), line]
        offsets.append(offset)
        offset = _aligned(offset + tensor.nbytes)
    head = b"".join(parts)
    head += bytes(_aligned(len(head)) - len(head))
    starts = tuple(len(head) + each for each in offsets)
    return GgufLayout(head, starts, len(head) + offset)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorToWrite],
    *,
    ours: Ours,
    written: Callable[[int], object] = lambda nbytes: None,
) -> GgufLayout:
    """Write the file: whole, or not at all; `written` hears of every piece's bytes.

    Raises StorageError where it cannot be written, and before any work where the disk has no room;
    ConfigError where the path holds what is not `ours`.
    """
    layout = lay_out(metadata, tensors)
    free = shutil.disk_usage(path.parent).free
    if layout.size > free:
        raise StorageError(
            f"{path} cannot be written: it takes {layout.size:,} bytes, and its disk has "
            f"{free:,} free"
        )

    def fill(at: Path) -> None:
        with at.open("wb") as file:
            file.write(layout.head)
            for tensor in tensors:
                for piece in _checked(tensor):
                    file.write(piece)
                    written(len(piece))
                _pad(file)

    write_file(path, fill, ours=ours)
    return layout


def _checked(tensor: TensorToWrite) -> Iterator[bytes | memoryview]:
    """A tensor's pieces, which are as many bytes as its shape says."""
    total = 0
    for piece in tensor.pieces():
        total += len(piece)
        yield piece
    assert total == tensor.nbytes, f"{tensor.name}: {total} bytes, not {tensor.nbytes}"


def _pad(file: BinaryIO) -> None:
    at = file.tell()
    file.write(bytes(_aligned(at) - at))


def _aligned(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """A value behind the number of its type."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if not isinstance(value, list):
        kind = _number_type([value], scalar=True)
        return struct.pack("<I", kind) + NUMBERS[kind].pack(value)
    if value and isinstance(value[0], str):
        count = struct.pack("<IIQ", ARRAY, STRING, len(value))
        return count + b"".join(_text(str(each)) for each in value)
    kind = _number_type(value, scalar=False)
    form = f"<{len(value)}{NUMBERS[kind].format[1:]}"
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + struct.pack(form, *value)


def _number_type(values: Sequence[Any], *, scalar: bool) -> int:
    """The narrowest of the usual types that holds them all."""
    if values and all(isinstance(each, bool) for each in values):
        return BOOL
    if any(isinstance(each, float) for each in values):
        return _F32
    low = min(values, default=0)
    high = max(values, default=0)
    if scalar and low >= 0 and high < 2**32:
        return _U32
    if low >= -(2**31) and high < 2**31:
        return _I32
    return _U64 if low >= 0 else _I64
