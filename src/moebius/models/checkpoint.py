"""What a checkpoint directory holds, checked from headers: nothing is allocated, no torch. One
tensor is read where two may be the same: see _tied.

A safetensors file is 8 bytes of little-endian header length, a JSON header, then the tensors' bytes
without a gap.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from moebius.errors import ConfigError, WeightsError, require
from moebius.files import read_json
from moebius.models.config import ModelConfig
from moebius.models.family import family, read_config
from moebius.models.layout import Layout, Source, sources

log = logging.getLogger(__name__)

# Bytes an element, of every dtype that the format knows and whose size is whole bytes.
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(
        ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1
    ),
}
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_MAX_HEADER = 100 * 2**20
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SAMPLE = 4096
# Bytes of two tensors that may be the same; larger pieces would leave the processor's cache.
_COMPARED_AT_ONCE = 2**18


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file; start and stop are byte offsets from the file's beginning."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """One parameter as it will be held: mapped from the file as it lies there, or copied (and
    converted)."""

    name: str
    mapped: bool
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose configuration and tensors fit together; made by open_checkpoint.

    config.tie_word_embeddings says what the tensors do, which is not always what config_json says.
    """

    directory: Path
    config_json: Mapping[str, Any]
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    sources: tuple[Source, ...]

    @cached_property
    def dtype(self) -> str:
        """The dtype that most bytes of the file have: bfloat16, float16 or float32."""
        sizes: Counter[str] = Counter()
        for source in self.sources:
            tensor = self.tensors[source.name]
            sizes[_DTYPES[tensor.dtype]] += math.prod(source.shape) * _ITEM_BYTES[tensor.dtype]
        return max(sizes, key=lambda name: sizes[name])

    def plan_weights(self, dtype: str, device: str = "cpu") -> list[PlannedWeight]:
        """How each parameter will be held on `device` as `dtype`, bfloat16, float16 or float32;
        loads none."""
        rows = []
        for source in self.sources:
            stored, kept = self.tensors[source.name], "float32" if source.float32 else dtype
            item = 4 if kept == "float32" else 2
            mapped = device == "cpu" and _DTYPES[stored.dtype] == kept and stored.start % item == 0
            rows.append(PlannedWeight(source.parameter, mapped, math.prod(source.shape) * item))
        return rows


@cache
def _file(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _check(good: bool, where: str, message: str) -> None:
    require(good, f"{where}{message}", WeightsError)


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
            fits = size >= 8 and 2 <= length <= min(size - 8, _MAX_HEADER)
            what = f"a header of {length} bytes in a file of {size}"
            _check(fits, _file(path), f": {what}; it is truncated or not safetensors")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as cause:
        raise WeightsError(f"{_file(path)} cannot be read: {cause.strerror or cause}") from None
    except (ValueError, RecursionError) as cause:
        if isinstance(cause, WeightsError):
            raise
        raise WeightsError(f"{_file(path)}: the header is no valid JSON: {cause}") from None
    _check(isinstance(header, dict), _file(path), ": the header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_extent(path, tensors, 8 + length, size)
    return tensors


def _stored(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    def integers(value: Any) -> bool:
        return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)

    where = f"{_file(path)}: tensor {name!r}: "
    good = (
        isinstance(entry, dict)
        and integers(entry.get("shape"))
        and integers(entry.get("data_offsets"))
    )
    _check(good, where, "the header's entry has no valid shape and data_offsets")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry.get("dtype")
    _check(len(offsets) == 2, where, f"data_offsets is {offsets}; it must be a start and a stop")
    _check(isinstance(dtype, str) and dtype in _ITEM_BYTES, where, f"dtype {dtype!r} is unknown")
    stored, needed = offsets[1] - offsets[0], math.prod(shape) * _ITEM_BYTES[dtype]
    _check(
        stored == needed,
        where,
        f"{stored} bytes stored, but shape {shape} of {dtype} needs {needed}",
    )
    return StoredTensor(path, name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _check_extent(path: Path, tensors: Mapping[str, StoredTensor], base: int, size: int) -> None:
    """The tensors fill the file from the header to its end, without gap or overlap."""
    at, last, where = base, "the header", f"{_file(path)}: "
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        kind, this = "a gap" if tensor.start > at else "an overlap", f"tensor {tensor.name!r}"
        _check(tensor.start == at, where, f"{kind} between {last} and {this}")
        _check(
            tensor.stop <= size,
            where,
            f"{this} ends at byte {tensor.stop}, the file at {size}; it is truncated",
        )
        at, last = tensor.stop, this
    _check(
        at == size, where, f"{size - at} bytes follow {last}; the file does not match its header"
    )


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of a single or sharded checkpoint. Raises WeightsError naming file and tensor."""
    if (directory / _SINGLE).exists():
        return read_header(directory / _SINGLE)
    if not (directory / _INDEX).exists():
        other = sorted(path.name for path in directory.glob("*.bin"))
        hint = (
            f"; {other[0]} is a pickle, which is never loaded: convert it to safetensors"
            if other
            else ""
        )
        raise WeightsError(f"{directory} holds neither {_SINGLE} nor {_INDEX}{hint}")
    weight_map = read_json(directory / _INDEX, error=WeightsError).get("weight_map")
    index = _file(directory / _INDEX)
    good = isinstance(weight_map, dict) and all(
        isinstance(shard, str) for shard in weight_map.values()
    )
    _check(good, index, ": weight_map must map tensor names to files")
    assert isinstance(weight_map, dict)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        _check(
            Path(shard).name == shard, index, f": {shard!r} is no file name within the directory"
        )
        where = _file(directory / shard)
        _check((directory / shard).exists(), where, f" is missing, but {_INDEX} names it")
        found = read_header(directory / shard)
        for name in found:
            here = weight_map.get(name) == shard
            _check(here, where, f": tensor {name!r} is left over; {_INDEX} does not place it there")
        tensors.update(found)
    for name, shard in weight_map.items():
        _check(
            name in tensors,
            _file(directory / shard),
            f": tensor {name!r} is missing, but {_INDEX} places it there",
        )
    return tensors


def _named_in_full(
    layout: Layout, tensors: Mapping[str, StoredTensor]
) -> Mapping[str, StoredTensor]:
    """The tensors under their names in a model with a head; one that was saved without has no
    `model.` before them."""
    before = layout.prefix
    if any(name.startswith(before) for name in tensors):
        return tensors
    return {
        name if name == layout.head else before + name: tensor for name, tensor in tensors.items()
    }


def _harmless(name: str, config: ModelConfig, head: str) -> bool:
    """Buffers that old checkpoints carry, and the copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == head and config.tie_word_embeddings)


def _tied(
    directory: Path, config: ModelConfig, layout: Layout, tensors: Mapping[str, StoredTensor]
) -> bool:
    """Whether the head is the embedding: it is meant to be, and no head is stored that differs.

    As in transformers: a head of its own counts for more than tie_word_embeddings. Bytes are
    compared, so that two spellings of one number are two heads, which costs memory and is right.
    What is read is what loading maps, and it ends at the first difference.
    """
    embedding = tensors.get(layout.embedding)
    head = tensors.get(layout.head)
    if not config.tie_word_embeddings or embedding is None or head is None:
        return config.tie_word_embeddings
    if _same_values(embedding, head):
        return True
    log.warning(
        "%s: tie_word_embeddings is true, but the files hold a %s that is not %s: it is used",
        directory.name,
        layout.head,
        layout.embedding,
    )
    return False


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(mine == theirs for mine, theirs in zip(_pieces(one), _pieces(other), strict=True))


def _pieces(tensor: StoredTensor) -> Iterator[bytearray]:
    """The tensor's bytes, one piece after the other in the same buffer; the last may have old bytes
    behind it, the same of two tensors whose earlier pieces are the same."""
    buffer = bytearray(_COMPARED_AT_ONCE)
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            for left in range(tensor.stop - tensor.start, 0, -len(buffer)):
                wanted = memoryview(buffer)[:left]
                _check(
                    file.readinto(wanted) == len(wanted),
                    _file(tensor.file),
                    " shrank while it was read",
                )
                yield buffer
    except OSError as cause:
        raise WeightsError(
            f"{_file(tensor.file)} cannot be read: {cause.strerror or cause}"
        ) from None


def _match(
    directory: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor]
) -> tuple[Source, ...]:
    """The sources of all parameters, in the layout that the checkpoint has."""
    layouts = family(config.model_type).layouts
    head = layouts[0].head
    if config.tie_word_embeddings and layouts[0].embedding not in tensors:
        layouts = tuple(replace(layout, embedding=head) for layout in layouts)
    candidates = [tuple(sources(config, layout)) for layout in layouts]
    wanted = max(candidates, key=lambda option: sum(source.name in tensors for source in option))
    missing = list(dict.fromkeys(source.name for source in wanted if source.name not in tensors))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        if missing == [head]:
            more = (
                "; if the embedding is meant to serve as head, config.json must say "
                "tie_word_embeddings = true"
            )
        shards = sorted({_file(tensor.file) for tensor in tensors.values()}) or [directory.name]
        raise WeightsError(f"{', '.join(shards[:3])}: tensor {missing[0]!r} is missing{more}")
    for source in wanted:
        stored = tensors[source.name]
        where = f"{_file(stored.file)}: tensor {source.name!r}"
        same = stored.shape == source.stored_shape
        _check(
            same,
            where,
            f" has shape {list(stored.shape)}; config.json needs {list(source.stored_shape)}",
        )
        known = stored.dtype in _DTYPES
        _check(known, where, f" has dtype {stored.dtype}; supported are {', '.join(_DTYPES)}")
    used = {source.name for source in wanted}
    for name, stored in tensors.items():
        wanted_here = name in used or _harmless(name, config, head)
        left_over = f": tensor {name!r} is left over; {config.model_type} has no such tensor"
        _check(wanted_here, _file(stored.file), left_over)
    return wanted


def open_checkpoint(directory: Path | str) -> Checkpoint:
    """Read and check a model directory. Raises ConfigError or WeightsError; allocates nothing.

    Keys of config.json that change nothing are named in the log.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(
            f"{directory} is no directory; a model is a directory with config.json and safetensors "
            "files"
        )
    config_json = read_json(directory / "config.json")
    config, ignored, _ = read_config(config_json)
    if ignored:
        log.info(
            "config.json: no %s model reads %s, which changes nothing",
            config.model_type,
            ", ".join(ignored),
        )
    found = family(config.model_type)
    layout = found.layouts[0]
    stored = read_tensors(directory)
    known = {name: tensor for name, tensor in stored.items() if not found.leaves_out(name)}
    tensors = _named_in_full(layout, known)
    config = replace(config, tie_word_embeddings=_tied(directory, config, layout, tensors))
    return Checkpoint(directory, config_json, config, tensors, _match(directory, config, tensors))


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 hex digits naming a checkpoint: its configuration, headers, file sizes and 4 KiB of each
    tensor."""
    digest = blake2b(digest_size=8, person=b"moebius-weights")
    digest.update(json.dumps(checkpoint.config_json, sort_keys=True).encode())
    digest.update(b"tied" if checkpoint.config.tie_word_embeddings else b"a head of its own")
    tensors = sorted(checkpoint.tensors.values(), key=lambda t: (t.file.name, t.start))
    for path in sorted({tensor.file for tensor in tensors}):
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            header = file.read(8)
            header += file.read(int.from_bytes(header, "little"))
            for part in (path.name.encode(), size.to_bytes(8, "little"), header):
                digest.update(len(part).to_bytes(8, "little") + part)
            for tensor in tensors:
                if tensor.file == path:
                    file.seek(tensor.start)
                    digest.update(file.read(min(_SAMPLE, tensor.stop - tensor.start)))
    return digest.hexdigest()
