"""The tensors behind blocks and states, in one anonymous mapping of huge pages, touched early on.

Every block has one size: some layers' keys and values of `block_size` tokens. Layers that keep the
same of the past form a group with a block table of its own (schedule/groups.py says why groups
share one pool); a group of more layers than a block has room for is cut into several. No two groups
ever use one block.

Where all layers keep as much, layer `row` of a block lies in the same array for all groups. Where
they do not (Gemma 4's, whose heads are of two sizes), a block has room for more layers of the one
kind than of the other: its bytes lie together, and a layer's are found every so many.
"""

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebius.errors import CacheDataError
from moebius.ops import LayerCache, Ops
from moebius.ops.cache_spec import CacheSpec, Plane
from moebius.pages import populate, reserve

MOST_TABLES = 8
"""Block tables that a sequence may have: each costs every step a little, so above this a block with
some unused memory is the lesser evil."""
MOST_UNEQUAL_TABLES = 16
"""The same where layers keep more or less: then more of a block may be unused."""
_LONG = 16
"""How many windows long a sequence is that the size of a block is chosen for."""
_IDLE_SECONDS = 0.2
_MAGIC = b"moebius cache\n"
_CHECKSUM_BYTES = 16


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Where each layer's past lies.

    windows   of each block table, that is each group of layers (None: the whole past)
    rows      layers that a block has room for, of those that keep least
    places    each layer's (group, row); None for a layer without keys and values
    unequal   layers keep more or less of a token than others
    """

    windows: tuple[int | None, ...]
    rows: int
    places: tuple[tuple[int, int] | None, ...]
    unequal: bool = False


def lay_out(specs: Sequence[CacheSpec]) -> CacheLayout:
    """Group the layers with equal specs, and cut the groups to the size of a block.

    Of the sizes with at most MOST_TABLES tables, the one that leaves least memory unused; of equal
    ones the largest.
    """
    groups = Counter(spec for spec in specs if spec.token)
    unequal = len({spec.token for spec in groups}) > 1
    rows = _unequal_rows(groups) if unequal else _equal_rows(groups)
    windows: list[int | None] = []
    first: dict[CacheSpec, int] = {}
    for spec, count in groups.items():
        first[spec] = len(windows)
        windows += [spec.window] * -(-count // rows[spec])
    places: list[tuple[int, int] | None] = []
    seen: Counter[CacheSpec] = Counter()
    for spec in specs:
        if not spec.token:
            places.append(None)
            continue
        group, row = divmod(seen[spec], rows[spec])
        places.append((first[spec] + group, row))
        seen[spec] += 1
    most = max(rows.values(), default=0)
    return CacheLayout(tuple(windows), most, tuple(places), unequal)


def _equal_rows(groups: Mapping[CacheSpec, int]) -> dict[CacheSpec, int]:
    """Layers a block, of groups that all keep as much of a token."""
    return dict.fromkeys(groups, _rows(list(groups.values())))


def _unequal_rows(groups: Mapping[CacheSpec, int]) -> dict[CacheSpec, int]:
    """The same of groups that keep more or less: so many of each have room in a block. Unused
    memory counts for more where all of a long sequence has some."""

    def tables(room: int, spec: CacheSpec) -> int:
        return -(-groups[spec] // (room // spec.bytes_per_token))

    def cost(room: int) -> tuple[int, int]:
        long = sum(tables(room, spec) * (1 if spec.window else _LONG) for spec in groups)
        return room * long, -room

    least = max(spec.bytes_per_token for spec in groups)
    rooms = {
        spec.bytes_per_token * rows
        for spec, count in groups.items()
        for rows in range(1, count + 1)
    }
    most = max(MOST_UNEQUAL_TABLES, len(groups))
    fitting = [
        room
        for room in rooms | {least}
        if room >= least and sum(tables(room, spec) for spec in groups) <= most
    ]
    room = min(fitting or [max(rooms)], key=cost)
    return {spec: min(room // spec.bytes_per_token, groups[spec]) for spec in groups}


def _rows(counts: Sequence[int]) -> int:
    """Layers a block, for groups of so many layers each."""
    if not counts:
        return 0

    def tables(rows: int) -> int:
        return sum(-(-count // rows) for count in counts)

    most = max(MOST_TABLES, len(counts))
    fitting = [rows for rows in range(1, max(counts) + 1) if tables(rows) <= most]
    return min(fitting, key=lambda rows: (rows * tables(rows), -rows))


class KVCache:
    """Every layer's cache of `num_blocks` blocks, and `num_states` slots of recurrent states.

    `layers[i]` is opaque: only the operations' backend reads it. `groups[i]` is the block table
    that layer i uses. `states[i]` has layer i's state planes by name, (num_states, *shape) each.

    key_offsets: what each layer's keys are held less (G, N), where they are codes; none for none.
    nbytes: what the blocks take; the states' planes lie behind them in the same mapping.
    """

    def __init__(
        self,
        specs: Sequence[CacheSpec],
        ops: Ops,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        num_states: int = 0,
        key_offsets: Sequence[Tensor | None] = (),
    ) -> None:
        self.specs = tuple(specs)
        self.layout = lay_out(specs)
        self.num_blocks = num_blocks
        self.num_states = num_states
        self.block_size = block_size
        self.last_used = 0.0
        self._ops = ops
        per_block = block_bytes(specs, ops, block_size)
        self.nbytes = num_blocks * per_block
        states = _aligned(self.nbytes)
        planes = [plane for spec in specs for plane in spec.state]
        buffer = _reserve(
            states + sum(_aligned(num_states * plane.nbytes) for plane in planes),
            device,
            lambda: time.monotonic() - self.last_used > _IDLE_SECONDS,
        )
        places = self.layout.places
        offsets = tuple(key_offsets) or (None,) * len(places)
        self._offset_names = tuple(map(_offset_name, offsets))
        made = _unequal_caches if self.layout.unequal else _equal_caches
        self.layers = made(self, ops, buffer[: self.nbytes], per_block, offsets)
        self.groups = tuple(0 if at is None else at[0] for at in places)
        self.states = _state_planes(buffer[states:], specs, num_states)

    def clear_states(self, slots: Sequence[int]) -> None:
        """Sequences that begin in these slots begin with zeros."""
        for slot in slots:
            for part in self._state_memory(slot):
                part.zero_()

    def copy_states(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy all layers' states from one slot to another, for each of the pairs in turn."""
        for source, target in pairs:
            written = self._state_memory(target)
            for part, read in zip(written, self._state_memory(source), strict=True):
                part.copy_(read)

    def read_block(self, group: int, block: int) -> bytes:
        """A block with its header and checksum, for `write_block` of an equal cache.

        IndexError for a block or a group that is none of this cache's.
        """
        return bytes(self.sealed(group, block))

    def write_block(self, group: int, block: int, data: bytes) -> None:
        """Put back what `read_block` gave.

        Raises CacheDataError where that is another cache's, or damaged; nothing is written then.
        """
        self._memory(group, block)
        self.fill(group, block, self.opened(group, data))

    def read_state(self, slot: int) -> bytes:
        """All layers' states in a slot, as `read_block` has it."""
        return bytes(self.sealed(None, slot))

    def write_state(self, slot: int, data: bytes) -> None:
        """Put back what `read_state` gave, or raise CacheDataError."""
        self._memory(None, slot)
        self.fill(None, slot, self.opened(None, data))

    def describe(self, group: int | None) -> bytes:
        """What tells the bytes of a group's blocks from those of any other cache; with None, the
        bytes of a slot of states."""
        header = self._state_header() if group is None else self._block_header(group)
        return json.dumps(header, sort_keys=True).encode()

    def piece_bytes(self, group: int | None) -> int:
        """Bytes of memory that a block of this group takes, or with None a slot of states."""
        return sum(part.nbytes for part in self._memory(group, 0))

    def sealed(self, group: int | None, place: int) -> memoryview:
        """What `read_block` and, with None, `read_state` give.

        Another thread may write to this place meanwhile; then what this gives is worth nothing.
        """
        return _seal(self.describe(group), self._memory(group, place))

    def opened(self, group: int | None, data: bytes | memoryview) -> list[memoryview]:
        """Check what `sealed` gave, on any thread: its memory, for `fill`, or CacheDataError."""
        sizes = [part.nbytes for part in self._memory(group, 0)]
        return _open(memoryview(data), self.describe(group), sizes)

    def fill(self, group: int | None, place: int, pieces: Sequence[memoryview]) -> None:
        """Put the memory of `opened` to this place, which is nobody else's."""
        for part, piece in zip(self._memory(group, place), pieces, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that what is read alone cannot be written
                _bytes_of(part).copy_(torch.frombuffer(piece, dtype=torch.uint8))

    def _memory(self, group: int | None, place: int) -> list[Tensor]:
        return self._state_memory(place) if group is None else self._block_memory(group, place)

    def _members(self, group: int) -> list[int]:
        places = self.layout.places
        return [i for i, at in enumerate(places) if at is not None and at[0] == group]

    def _state_memory(self, slot: int) -> list[Tensor]:
        if not 0 <= slot < self.num_states:
            raise IndexError(f"slot {slot} is none of {self.num_states}")
        return [plane[slot] for planes in self.states for plane in planes.values()]

    def _block_memory(self, group: int, block: int) -> list[Tensor]:
        if not 0 <= block < self.num_blocks:  # as NO_BLOCK is not
            raise IndexError(f"block {block} is none of {self.num_blocks}")
        layers = [self.layers[i] for i in self._members(group)]
        return [part for layer in layers for part in self._ops.block_memory(layer, block)]

    def _block_header(self, group: int) -> dict[str, Any]:
        layers = self._members(group)
        spec = self.specs[layers[0]]
        return {
            "kind": "block",
            "layout": self._ops.cache_layout,
            "block_size": self.block_size,
            "window": spec.window,
            "layers": layers,
            "planes": _planes(spec.token),
            "key_offsets": [self._offset_names[i] for i in layers],
        }

    def _state_header(self) -> dict[str, Any]:
        layers = {str(i): _planes(spec.state) for i, spec in enumerate(self.specs) if spec.state}
        return {"kind": "state", "layers": layers}


def block_bytes(specs: Sequence[CacheSpec], ops: Ops, block_size: int) -> int:
    """What one block takes: keys and values of `block_size` tokens, in the layers of a group."""
    sizes = {spec: ops.cache_bytes_per_block(spec, block_size) for spec in specs if spec.token}
    places = zip(lay_out(specs).places, specs, strict=True)
    return max((sizes[spec] * (at[1] + 1) for at, spec in places if at is not None), default=0)


def _equal_caches(
    cache: KVCache, ops: Ops, buffer: Tensor, block: int, offsets: Sequence[Tensor | None]
) -> list[LayerCache]:
    """Each layer's cache, in the array of its row."""
    per_row = cache.num_blocks * block // max(cache.layout.rows, 1)
    layers = []
    for at, spec, offset in zip(cache.layout.places, cache.specs, offsets, strict=True):
        if at is None:
            layers.append(LayerCache())
            continue
        row = buffer[at[1] * per_row : (at[1] + 1) * per_row]
        layers.append(ops.make_cache(row, spec, cache.block_size, offset))
    return layers


def _unequal_caches(
    cache: KVCache, ops: Ops, buffer: Tensor, block: int, offsets: Sequence[Tensor | None]
) -> list[LayerCache]:
    """Each layer's cache, in its part of each block."""
    layers = []
    for at, spec, offset in zip(cache.layout.places, cache.specs, offsets, strict=True):
        if at is None:
            layers.append(LayerCache())
            continue
        own = ops.cache_bytes_per_block(spec, cache.block_size)
        start = at[1] * own
        part = buffer[start : start + (cache.num_blocks - 1) * block + own]
        layers.append(ops.make_cache(part, spec, cache.block_size, offset, stride=block))
    return layers


def state_bytes(specs: Sequence[CacheSpec]) -> int:
    """What one slot takes: a state of each layer that has one."""
    return sum(spec.bytes_per_state for spec in specs)


def scratch_states(specs: Sequence[CacheSpec]) -> int:
    """How many states more a sequence may need at a time."""
    return max((spec.scratch_states for spec in specs), default=0)


def _planes(planes: Sequence[Plane]) -> list[list[Any]]:
    return [[plane.name, list(plane.shape), str(plane.dtype)] for plane in planes]


def _offset_name(offset: Tensor | None) -> str | None:
    """Tells what keys are held less from anything else."""
    if offset is None:
        return None
    return blake2b(_bytes_of(offset).cpu().numpy().tobytes(), digest_size=8).hexdigest()


def _seal(described: bytes, parts: Sequence[Tensor]) -> memoryview:
    """Magic, length of the header, header, memory, checksum of all of it.

    By numpy, whose copies let other threads run and start none.
    """
    start = b"".join((_MAGIC, len(described).to_bytes(4, "little"), described))
    memory = sum(part.nbytes for part in parts)
    sealed = np.empty(len(start) + memory + _CHECKSUM_BYTES, np.uint8)
    end = len(start)
    sealed[:end] = np.frombuffer(start, np.uint8)
    for part in parts:
        np.copyto(sealed[end : end + part.nbytes], _bytes_of(part).cpu().numpy())
        end += part.nbytes
    view = sealed.data
    view[end:] = blake2b(view[:end], digest_size=_CHECKSUM_BYTES).digest()
    return view


def _open(data: memoryview, described: bytes, sizes: Sequence[int]) -> list[memoryview]:
    """Check all of `data`; the memory in it, in parts of these sizes."""
    start = len(_MAGIC) + 4
    if len(data) < start + _CHECKSUM_BYTES or data[: len(_MAGIC)] != _MAGIC:
        raise CacheDataError("this is no block or state of a cache")
    sealed = data[:-_CHECKSUM_BYTES]
    if blake2b(sealed, digest_size=_CHECKSUM_BYTES).digest() != data[-_CHECKSUM_BYTES:]:
        raise CacheDataError("the bytes of a block or state do not match their checksum")
    end = start + int.from_bytes(sealed[len(_MAGIC) : start], "little")
    if sealed[start:end] != described:
        difference = _difference(bytes(sealed[start:end]), json.loads(described))
        raise CacheDataError(f"the bytes are of another cache: {difference}")
    wanted = sum(sizes)
    if len(sealed) - end != wanted:
        raise CacheDataError(
            f"the bytes are of another cache: {len(sealed) - end} of memory instead of {wanted}"
        )
    pieces = []
    for size in sizes:
        pieces.append(sealed[end : end + size])
        end += size
    return pieces


def _difference(described: bytes, header: dict[str, Any]) -> str:
    """What another cache's header says instead of ours."""
    try:
        theirs = json.loads(described)
    except (ValueError, RecursionError):
        theirs = None
    if not isinstance(theirs, dict) or theirs == header:
        return "its header cannot be read"
    names = sorted(n for n in {*theirs, *header} if theirs.get(n) != header.get(n))
    return ", ".join(f"{n} {theirs.get(n)!r} instead of {header.get(n)!r}" for n in names)


def _bytes_of(part: Tensor) -> Tensor:
    return part.view(-1).view(torch.uint8)


def _aligned(nbytes: int) -> int:
    """So many bytes, rounded up to a cache line."""
    return -(-nbytes // 64) * 64


def _state_planes(
    buffer: Tensor, specs: Sequence[CacheSpec], num_states: int
) -> tuple[dict[str, Tensor], ...]:
    """Each layer's state planes by name, (num_states, *shape), one behind the other."""
    layers = []
    start = 0
    for spec in specs:
        planes = {}
        for plane in spec.state:
            part = buffer[start : start + num_states * plane.nbytes]
            planes[plane.name] = part.view(plane.dtype).view(num_states, *plane.shape)
            start += _aligned(num_states * plane.nbytes)
        layers.append(planes)
    return tuple(layers)


def _reserve(nbytes: int, device: torch.device, idle: Callable[[], bool]) -> torch.Tensor:
    if device.type != "cpu" or sys.platform != "linux" or not nbytes:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    region = reserve(nbytes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = torch.frombuffer(region, dtype=torch.uint8, count=nbytes)
    populate(buffer.data_ptr(), [(0, len(region))], write=True, owner=region, idle=idle)
    return buffer
