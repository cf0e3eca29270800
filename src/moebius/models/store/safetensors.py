"""Tensors in safetensors files, single or sharded: headers read and checked, nothing allocated.

A file is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes without a
gap.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from moebius.errors import WeightsError
from moebius.files import read_json, short_name
from moebius.models.store.tensors import DirectoryStore, StoredTensor

# Bytes an element, of every dtype that the format knows and whose size is whole bytes.
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1
    ),
}
_FORMATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_MAX_HEADER = 100 * 2**20
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class SafetensorsStore(DirectoryStore):
    """The tensors of a directory's safetensors files."""

    dtypes = tuple(_FORMATS)

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors

    @classmethod
    def is_in(cls, directory: Path) -> bool:
        return (directory / _SINGLE).exists() or (directory / _INDEX).exists()

    @classmethod
    def open(cls, directory: Path) -> Self:
        return cls(read_tensors(directory))

    def header(self, file: Path) -> bytes:
        with file.open("rb") as opened:
            length = opened.read(8)
            return length + opened.read(int.from_bytes(length, "little"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = Counter(key for key, _ in pairs)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises WeightsError naming file and tensor."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise WeightsError(
                    f"{short_name(path)}: a header of {length} bytes in a file of {size}; it is "
                    "truncated or not safetensors"
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as cause:
        reason = cause.strerror or cause
        raise WeightsError(f"{short_name(path)} cannot be read: {reason}") from None
    except (ValueError, RecursionError) as cause:
        if isinstance(cause, WeightsError):
            raise
        raise WeightsError(f"{short_name(path)}: the header is no valid JSON: {cause}") from None
    if not isinstance(header, dict):
        raise WeightsError(f"{short_name(path)}: the header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_extent(path, tensors, 8 + length, size)
    return tensors


def _stored(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    def integers(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)

    where = f"{short_name(path)}: tensor {name!r}"
    fields: Any = entry if isinstance(entry, dict) else {}
    shape = fields.get("shape")
    offsets = fields.get("data_offsets")
    dtype = fields.get("dtype")
    if not integers(shape) or not integers(offsets):
        raise WeightsError(f"{where}: the header's entry has no valid shape and data_offsets")
    if len(offsets) != 2:
        raise WeightsError(f"{where}: data_offsets is {offsets}; it must be a start and a stop")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise WeightsError(f"{where}: dtype {dtype!r} is unknown")
    stored = offsets[1] - offsets[0]
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if stored != needed:
        raise WeightsError(
            f"{where}: {stored} bytes stored, but shape {shape} of {dtype} needs {needed}"
        )
    return StoredTensor(
        path,
        name,
        dtype,
        _FORMATS.get(dtype),
        tuple(shape),
        base + offsets[0],
        base + offsets[1],
    )


def _check_extent(path: Path, tensors: Mapping[str, StoredTensor], base: int, size: int) -> None:
    """The tensors fill the file from the header to its end, without gap or overlap."""
    file = short_name(path)
    last = "the header"
    at = base
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        this = f"tensor {tensor.name!r}"
        if tensor.start != at:
            kind = "a gap" if tensor.start > at else "an overlap"
            raise WeightsError(f"{file}: {kind} between {last} and {this}")
        if tensor.stop > size:
            raise WeightsError(
                f"{file}: {this} ends at byte {tensor.stop}, the file at {size}; it is truncated"
            )
        at = tensor.stop
        last = this
    if at != size:
        raise WeightsError(
            f"{file}: {size - at} bytes follow {last}; the file does not match its header"
        )


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a single or sharded checkpoint. Raises WeightsError naming file and tensor."""
    if (directory / _SINGLE).exists():
        return read_header(directory / _SINGLE)
    if not (directory / _INDEX).exists():
        hint = ""
        other = sorted(path.name for path in directory.glob("*.bin"))
        if other:
            hint = f"; {other[0]} is a pickle, which is never loaded: convert it to safetensors"
        raise WeightsError(f"{directory} holds neither {_SINGLE} nor {_INDEX}{hint}")
    return _read_shards(directory)


def _read_shards(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of all files that an index names, each where the index says."""
    weight_map = read_json(directory / _INDEX, error=WeightsError).get("weight_map")
    index = short_name(directory / _INDEX)
    shards = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(shard, str) for shard in shards):
        raise WeightsError(f"{index}: weight_map must map tensor names to files")
    assert isinstance(weight_map, dict)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shards)):
        if Path(shard).name != shard:
            raise WeightsError(f"{index}: {shard!r} is no file name within the directory")
        where = short_name(directory / shard)
        if not (directory / shard).exists():
            raise WeightsError(f"{where} is missing, but {_INDEX} names it")
        found = read_header(directory / shard)
        for name in found:
            if weight_map.get(name) != shard:
                raise WeightsError(
                    f"{where}: tensor {name!r} is left over; {_INDEX} does not place it there"
                )
        tensors.update(found)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise WeightsError(
                f"{short_name(directory / shard)}: tensor {name!r} is missing, but {_INDEX} places "
                "it there"
            )
    return tensors
