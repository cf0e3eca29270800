"""Reading one GGUF file's head: keys and values, and the table of tensors.

All little-endian: "GGUF", u32 version, u64 tensors, u64 keys; then each key (string, u32 type,
value) and each tensor (string, u32 dimensions, u64 each, fastest first, u32 type, u64 offset from
the data's start); then the data, at the next multiple of general.alignment. A string is u64 length
and its bytes, an array u32 type, u64 count and its elements.

Every length in it may be a lie: each is held against the file's size before anything is made of it.
A vocabulary is hundreds of thousands of strings, so the walk passes over an array's strings and
makes none of them before they are asked for.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from moebius.errors import WeightsError
from moebius.files import short_name
from moebius.gguf.types import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    MAGIC,
    NUMBERS,
    STRING,
    TENSOR_TYPES,
    VERSIONS,
    BlockType,
)

Scalar = str | int | float | bool
Value = Scalar | list[str] | list[int] | list[float] | list[bool]

# More than any published file has; what they bound is time and memory.
_MOST_HEAD = 64 * 2**20
_MOST_KEYS = 2**16
_MOST_TENSORS = 2**16
_MOST_ELEMENTS = 2**22
_LONGEST_NAME = 2**10
_MOST_DIMENSIONS = 4
_FIRST_READ = 2**20

_HEAD = struct.Struct("<4sIQQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_TYPED_COUNT = struct.Struct("<IQ")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor; start and stop are byte offsets from the file's beginning.

    shape is as everywhere else, the slowest dimension first.
    """

    file: Path
    name: str
    type: BlockType
    shape: tuple[int, ...]
    start: int
    stop: int


class _Place(NamedTuple):
    """Where a key's value lies: a scalar's type and place, or an array's elements'."""

    type: int
    at: int
    elements: int | None = None


class Metadata(Mapping[str, Value]):
    """The keys of a file in its order; a value is made when it is first asked for.

    Raises WeightsError naming file and key for text that is not UTF-8.
    """

    def __init__(self, head: "_Bytes", places: Mapping[str, _Place]) -> None:
        self._head = head
        self._places = places
        self._made: dict[str, Value] = {}

    def __getitem__(self, key: str) -> Value:
        if key not in self._made:
            self._made[key] = self._head.value(key, self._places[key])
        return self._made[key]

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def length(self, key: str) -> int | None:
        """How many elements an array has, without making them; None for what is no array."""
        return self._places[key].elements


@dataclass(frozen=True, slots=True)
class GgufFile:
    """One file; tensors are in the order of its table, data_start is where the head ends."""

    path: Path
    version: int
    metadata: Metadata
    tensors: Mapping[str, GgufTensor]
    data_start: int


class _Bytes:
    """A file's beginning, read as far as it was asked for."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self.size = os.fstat(file.fileno()).st_size
        self.data = bytearray()
        self.elements = 0  # of all values so far
        self._file: BinaryIO | None = file

    def refuse(self, what: str) -> NoReturn:
        raise WeightsError(f"{self.name}: {what}")

    def close(self) -> None:
        """Nothing more will be read."""
        self._file = None

    def need(self, stop: int, what: str) -> None:
        """Have the bytes before `stop`. Raises WeightsError where the file does not."""
        if stop <= len(self.data):
            return
        if stop > self.size:
            self.refuse(f"{what} ends at byte {stop}, the file at {self.size}; it is truncated")
        if stop > _MOST_HEAD:
            self.refuse(
                f"{what} ends at byte {stop}; at most {_MOST_HEAD} bytes of a head are read"
            )
        wanted = max(stop, 2 * len(self.data), _FIRST_READ)
        assert self._file is not None
        self.data += self._file.read(min(wanted, _MOST_HEAD) - len(self.data))
        if stop > len(self.data):
            self.refuse(f"{what} ends at byte {stop}; the file shrank while it was read")

    def unpack(self, form: struct.Struct, at: int, what: str) -> tuple[int, ...]:
        self.need(at + form.size, what)
        return form.unpack_from(self.data, at)

    def text(self, at: int, what: str, longest: int = _MOST_HEAD) -> tuple[str, int]:
        """A string, and where it ends."""
        (length,) = self.unpack(_U64, at, what)
        if length > longest:
            self.refuse(f"{what} has a length of {length} bytes; at most {longest} are read")
        stop = at + 8 + length
        self.need(stop, what)
        return self._decoded(at + 8, stop, what), stop

    def _decoded(self, start: int, stop: int, what: str) -> str:
        try:
            return self.data[start:stop].decode()
        except UnicodeDecodeError:
            self.refuse(f"{what} is no UTF-8")

    def after_strings(self, at: int, count: int, what: str) -> int:
        """Where `count` strings end; none of them is made."""
        unpack = _U64.unpack_from
        data = self.data
        turns = iter(range(count))
        whole = False
        while not whole:
            try:
                for _ in turns:
                    at += 8 + unpack(data, at)[0]
                whole = True
            except (struct.error, OverflowError):  # beyond what was read
                self.need(at + 8, what)
                at += 8 + unpack(data, at)[0]
        self.need(at, what)
        return at

    def value(self, key: str, place: _Place) -> Value:
        if place.elements is None:
            return self._scalar(key, place)
        if place.type == STRING:
            return self._strings(key, place.at, place.elements)
        form = struct.Struct(f"<{place.elements}{NUMBERS[place.type].format[1:]}")
        return list(form.unpack_from(self.data, place.at))

    def _scalar(self, key: str, place: _Place) -> Scalar:
        if place.type == STRING:
            return self.text(place.at, key)[0]
        found: Scalar = NUMBERS[place.type].unpack_from(self.data, place.at)[0]
        return found

    def _strings(self, key: str, at: int, count: int) -> list[str]:
        unpack = _U64.unpack_from
        data = memoryview(self.data)
        found = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                found.append(str(data[start:at], "utf-8"))
        except UnicodeDecodeError:
            self.refuse(f"{key}[{len(found)}] is no UTF-8")
        return found


def read_gguf(path: Path) -> GgufFile:
    """One file's head. Raises WeightsError naming the file and what is wrong in it."""
    name = short_name(path)
    try:
        with path.open("rb") as file:
            head = _Bytes(file, name)
            read = _read(path, head)
            head.close()
            return read
    except OSError as cause:
        raise WeightsError(f"{name} cannot be read: {cause.strerror or cause}") from None


def _read(path: Path, head: _Bytes) -> GgufFile:
    version, tensors, keys = _counts(head)
    at = _HEAD.size
    places: dict[str, _Place] = {}
    for _ in range(keys):
        key, at = head.text(at, f"key {len(places) + 1} of {keys}", _LONGEST_NAME)
        if key in places:
            head.refuse(f"the key {key!r} is there twice")
        places[key], at = _place(head, at, key)
    metadata = Metadata(head, places)
    alignment = _alignment(head, metadata)
    rows: dict[str, _Row] = {}
    for number in range(tensors):
        name, at = head.text(at, f"tensor {number + 1} of {tensors}", _LONGEST_NAME)
        if name in rows:
            head.refuse(f"tensor {name!r} is there twice")
        rows[name], at = _row(head, at, f"tensor {name!r}")
    start = -(-at // alignment) * alignment
    found = _placed(path, head, rows, start, alignment)
    return GgufFile(path, version, metadata, found, start)


def _counts(head: _Bytes) -> tuple[int, int, int]:
    """Version, tensors and keys of the file's first bytes."""
    if head.size < _HEAD.size:
        head.refuse(f"{head.size} bytes are no GGUF file")
    head.need(_HEAD.size, "the header")
    magic, version, tensors, keys = _HEAD.unpack_from(head.data)
    if magic != MAGIC:
        head.refuse(f"it begins with {bytes(magic)!r}, a GGUF file with {MAGIC!r}")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            head.refuse("a big-endian GGUF file; convert it to little-endian")
        head.refuse(f"GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} are read")
    for what, count, most in (("keys", keys, _MOST_KEYS), ("tensors", tensors, _MOST_TENSORS)):
        if count > most:
            head.refuse(f"{count} {what} in a file of {head.size} bytes; at most {most} are read")
    return version, tensors, keys


def _place(head: _Bytes, at: int, key: str) -> tuple[_Place, int]:
    """Where a key's value is, and where it ends."""
    (kind,) = head.unpack(_U32, at, key)
    at += 4
    if kind != ARRAY:
        return _Place(kind, at), _after(head, at, kind, 1, key)
    kind, count = head.unpack(_TYPED_COUNT, at, key)
    at += _TYPED_COUNT.size
    return _Place(kind, at, count), _after(head, at, kind, count, key)


def _after(head: _Bytes, at: int, kind: int, count: int, key: str) -> int:
    """Where so many values of one type end."""
    if kind != STRING and kind not in NUMBERS:
        head.refuse(f"{key} has a value of type {kind}, which GGUF does not have there")
    least = 8 if kind == STRING else NUMBERS[kind].size
    head.elements += count
    if count > (head.size - at) // least or head.elements > _MOST_ELEMENTS:
        head.refuse(
            f"{key} has {count} values, in a file of {head.size} bytes; it is truncated or damaged"
        )
    if kind == STRING:
        return head.after_strings(at, count, key)
    stop = at + count * least
    head.need(stop, key)
    if kind == BOOL and head.data[at:stop].strip(b"\0\1"):
        head.refuse(f"{key} holds a truth value that is neither 0 nor 1")
    return stop


def _alignment(head: _Bytes, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    if type(value) is not int or not 1 <= value <= 2**20 or value & (value - 1):
        head.refuse(f"general.alignment is {value!r}; it must be a power of two")
    return value


class _Row(NamedTuple):
    """An entry of the table of tensors; offset counts from the data's start."""

    type: BlockType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _row(head: _Bytes, at: int, what: str) -> tuple[_Row, int]:
    """What a tensor's entry says behind its name, and where the entry ends."""
    (count,) = head.unpack(_U32, at, what)
    if not 1 <= count <= _MOST_DIMENSIONS:
        head.refuse(f"{what} has {count} dimensions; 1 to {_MOST_DIMENSIONS} are read")
    at += 4
    form = struct.Struct(f"<{count}QIQ")
    *sizes, number, offset = head.unpack(form, at, what)
    kind = TENSOR_TYPES.get(number)
    if kind is None:
        head.refuse(f"{what} has type {number}, which is unknown")
    elements = math.prod(sizes)
    if not 1 <= elements < 2**62 or elements // kind.elements * kind.nbytes > head.size:
        shape = " x ".join(map(str, reversed(sizes)))
        head.refuse(f"{what} of {shape} {kind.name} does not fit a file of {head.size} bytes")
    if sizes[0] % kind.elements:
        head.refuse(
            f"{what} has rows of {sizes[0]}; {kind.name} has blocks of {kind.elements} numbers"
        )
    nbytes = elements // kind.elements * kind.nbytes
    return _Row(kind, tuple(reversed(sizes)), offset, nbytes), at + form.size


def _placed(
    path: Path, head: _Bytes, rows: Mapping[str, _Row], start: int, alignment: int
) -> dict[str, GgufTensor]:
    """The tensors, each right behind the one before it and within the file."""
    tensors: dict[str, GgufTensor] = {}
    wanted = 0
    last = "the table"
    for name, row in sorted(rows.items(), key=lambda each: each[1].offset):
        this = f"tensor {name!r}"
        if row.offset != wanted:
            kind = "a gap" if row.offset > wanted else "an overlap"
            head.refuse(f"{kind} between {last} and {this}, which begins at {row.offset}")
        stop = start + row.offset + row.nbytes
        if stop > head.size:
            head.refuse(f"{this} ends at byte {stop}, the file at {head.size}; it is truncated")
        tensors[name] = GgufTensor(path, name, row.type, row.shape, start + row.offset, stop)
        wanted = -(-(row.offset + row.nbytes) // alignment) * alignment
        last = this
    left = head.size - (start + wanted)
    if left >= alignment:
        head.refuse(f"{left} bytes follow {last}; the file does not match its table of tensors")
    return {name: tensors[name] for name in rows}
