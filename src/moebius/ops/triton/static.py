"""A step of one row a sequence whose numbers lie at fixed places of a card.

Its layout is decided when a step is captured: so many rows, block tables of such a width. What each
run brings is written there before. Rows beyond those of a run are inert: they have no slot, see no
key and belong to no state.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moebius.ops.prepared import LayerCache, StatePlan, own
from moebius.ops.reference.attention import ReferenceCache
from moebius.ops.sources import Decodes
from moebius.ops.steps import StepInputs
from moebius.ops.triton.attention import SPLIT, Tiles, TritonPlan
from moebius.ops.triton.card import Card, NotCaptured
from moebius.ops.triton.recurrent import TritonStatePlan

# Splits of attention that a captured step has room for, of all rows together, and of one: longer
# contexts are computed as steps with prompts are. An empty split still costs a launch of threads.
_MOST_PARTS = 4096
_MOST_SPLITS = 64
# Columns of integers beside the slots: token ids, positions, lengths, states' slots.
_COLUMNS = 4
_PLAIN = "{} is plain PyTorch's, which would write for rows that are not there"


@dataclass(frozen=True, slots=True)
class Shape:
    """What is captured: `rows` rows, of sequences of up to `context` tokens."""

    rows: int
    groups: int
    context: int
    block_size: int
    states: bool

    @classmethod
    def of(cls, rows: int, groups: int, decodes: Decodes) -> "Shape":
        splits = min(_MOST_SPLITS, max(1, _MOST_PARTS // rows))
        context = min(decodes.context, splits * SPLIT)
        return cls(rows, groups, context, decodes.block_size, decodes.states)

    @property
    def width(self) -> int:
        """Blocks of a table."""
        return -(-self.context // self.block_size)

    def fits(self, step: StepInputs) -> bool:
        """Whether a step is one of these: one row a sequence, and nothing special about them."""
        rows = len(step.seq_lens_host)
        return (
            0 < rows <= self.rows
            and len(step.input_ids_host) == rows
            and max(step.seq_lens_host) <= self.context
            and step.max_blocks <= self.width
            and all(each.max_blocks <= self.width for each in step.others)
            and step.first_keys_host is None
            and not step.whole
            and (step.states is not None) == self.states
        )


class StaticInputs:
    """The numbers of such steps, on the host and on the card.

    There are two places on the host, in turn: one is written while the other is still being sent.
    """

    def __init__(self, shape: Shape, card: Card) -> None:
        self.shape = shape
        self._card = card
        self._columns = (_COLUMNS + shape.groups) * shape.rows
        tables = shape.groups * shape.rows * shape.width
        count = self._columns + -(-tables // 2)
        self._host = [card.pinned(count) for _ in range(2)]
        self._free: list[Callable[[], None]] = [at_once, at_once]
        self._turn = 0
        self.flat = torch.zeros(count, dtype=torch.int64, device=card.device)
        for host in self._host:
            _columns_of(host.numpy()[: self._columns], shape)[2:] = -1
            _columns_of(host.numpy()[: self._columns], shape)[2] = 0
        self.flat.copy_(self._host[0])
        rows = torch.arange(shape.rows, device=card.device)
        self.rows = rows
        self.behind = rows + 1

    @property
    def columns(self) -> Tensor:
        """(columns, rows): token ids, positions, lengths, states' slots, and slots by group."""
        return self.flat[: self._columns].view(-1, self.shape.rows)

    @property
    def tables(self) -> Tensor:
        """(groups, rows, width) int32."""
        shape = (self.shape.groups, self.shape.rows, self.shape.width)
        flat = self.flat[self._columns :].view(torch.int32)
        return flat[: shape[0] * shape[1] * shape[2]].view(shape)

    def put(self, step: StepInputs) -> None:
        """Send a step's numbers. Raises nothing: `Shape.fits` was asked."""
        self._turn ^= 1
        self._free[self._turn]()
        host = self._host[self._turn]
        numbers = host.numpy()
        columns = _columns_of(numbers[: self._columns], self.shape)
        rows = len(step.seq_lens_host)
        columns[:3, rows:] = 0
        columns[3:, rows:] = -1
        columns[0, :rows] = _numbers(step.input_ids_host, np.int64)
        columns[1, :rows] = _numbers(step.positions_host, np.int64)
        columns[2, :rows] = _numbers(step.seq_lens_host, np.int32)
        if step.states is not None:
            columns[3, :rows] = step.states.slots
        words = numbers[self._columns :].view(np.int32)
        tables = words[: self.tables.numel()].reshape(self.tables.shape)
        for group in range(self.shape.groups):
            own = step.of(group)
            if len(own.slot_mapping_host):
                columns[_COLUMNS + group, :rows] = _numbers(own.slot_mapping_host, np.int64)
                table = _numbers(own.block_table_host, np.int32).reshape(rows, own.max_blocks)
                tables[group, :rows, : own.max_blocks] = table
        self._free[self._turn] = self._card.send(host, self.flat)
        if step.drawn is not None:
            self.columns[0, :rows].copy_(step.drawn)


def _columns_of(numbers: NDArray[Any], shape: Shape) -> NDArray[Any]:
    return numbers.reshape(-1, shape.rows)


def _numbers(values: "array[int]", dtype: type[np.signedinteger[Any]]) -> NDArray[Any]:
    return np.frombuffer(values, dtype)


def at_once() -> None:
    """Nothing is on its way."""


class StaticStep(StepInputs):
    """The step as it is captured, seen by the layers of one group. It has no values on the host:
    to ask for one would freeze it into all steps."""

    def __init__(self, inputs: StaticInputs, group: int = 0) -> None:
        self.inputs = inputs
        self.device = inputs.flat.device
        self.group = group
        self.max_blocks = inputs.shape.width
        # As StepInputs' cached properties would leave them.
        self.__dict__.update(
            input_ids=inputs.columns[0],
            positions=inputs.columns[1],
            slot_mapping=inputs.columns[_COLUMNS + group] if inputs.shape.groups else inputs.rows,
            block_table=inputs.tables[group] if inputs.shape.groups else inputs.rows[:0],
        )

    def __getattr__(self, name: str) -> object:
        if name.endswith("_host"):
            raise NotCaptured(f"{name} of a step is read on the host")
        raise AttributeError(name)

    def of(self, group: int) -> "StaticStep":
        return self if group == self.group else StaticStep(self.inputs, group)

    @property
    def real_rows(self) -> Tensor:
        """Which rows are of a sequence (rows,), bool."""
        return self.inputs.columns[2] > 0

    def attention_plan(self, block_size: int, window: int | None) -> "StaticPlan":
        """Worked out on the card, of the lengths alone: one row a tile, and as many splits as there
        may be."""
        lengths_T = self.inputs.columns[2]
        low_T = torch.zeros_like(lengths_T)
        if window is not None:
            low_T = (lengths_T - window).clamp(min=0)
        seen_T3 = torch.stack((low_T, lengths_T, lengths_T - 1), dim=1).int()
        rows = self.inputs.rows
        ones = torch.ones_like(rows)
        tiles_P6 = torch.stack((rows, rows, ones, low_T, lengths_T, rows), dim=1).int()
        splits = -(-self.inputs.shape.context // SPLIT)
        if window is not None:
            splits = min(splits, window // SPLIT + 2)
        none = tiles_P6[:0]
        tiles = Tiles(none, tiles_P6, none, 0, 0, 0)
        if splits > 1:
            tiles = Tiles(none, none, tiles_P6, splits, len(rows), 1)
        return StaticPlan(self, block_size, window, seen_T3, seen_T3, static=tiles)

    def state_plan(self) -> StatePlan:
        given = self.inputs
        slots = given.columns[3] if given.shape.states else None
        counts = [given.shape.rows]
        return StaticStatePlan(given.rows, slots, given.rows, counts, given.rows, given.behind)


class StaticStatePlan(TritonStatePlan):
    """A plan of states whose rows may have no slot: for our kernels alone."""

    __slots__ = ()

    def keep(self, state: Tensor | None, after: Tensor) -> None:
        raise NotCaptured(_PLAIN.format("a recurrence"))


class StaticCache(ReferenceCache):
    """A cache to which rows may be written that have no slot: by our kernels alone."""

    __slots__ = ()

    @classmethod
    def of(cls, cache: LayerCache) -> "StaticCache":
        held = own(cache, ReferenceCache)
        return cls(held.k, held.v, held.scales, held.key_offset, held.shared)

    def write(self, k_TGN: Tensor, v_TGN: Tensor, slots_T: Tensor) -> None:
        raise NotCaptured(_PLAIN.format("what writes to the cache"))


@dataclass(frozen=True, slots=True, eq=False)
class StaticPlan(TritonPlan):
    """A plan whose tiles are one row each, however many a tile has room for."""

    static: Tiles | None = None

    def of_rows(self, rows: int) -> Tiles:
        assert self.static is not None, "made by StaticStep"
        return self.static
