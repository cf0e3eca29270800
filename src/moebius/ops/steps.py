"""What operations are handed: a step, be it real, warm-up or empty, and a layer's experts."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moebius.ops.transfer import send
from moebius.ops.weights import Weight, planes_of

Pair = tuple[Tensor, Tensor]


class Rotation(NamedTuple):
    """How the heads of each row turn: cos and sin (T, R) float32 of its pairs' angles.

    interleaved   a head's values 2i and 2i + 1 are a pair; else i and i + R
    """

    cos_TR: Tensor
    sin_TR: Tensor
    interleaved: bool = False


class ExpertWeights(NamedTuple):
    """One layer's experts: one weight an expert, so that nothing mapped is stacked or copied.

    gate_FD, up_FD   E weights (F, D); up is empty where experts have two matrices
    down_DF          E weights (D, F)
    the biases       E tensors each, (F,), (F,) and (D,), or empty for none

    All of an expert is None where another rank holds it: a hole. Not all are.
    """

    gate_FD: Sequence[Weight | None]
    up_FD: Sequence[Weight | None]
    down_DF: Sequence[Weight | None]
    gate_bias_F: Sequence[Tensor | None] = ()
    up_bias_F: Sequence[Tensor | None] = ()
    down_bias_D: Sequence[Tensor | None] = ()

    def tensors(self) -> list[Tensor | None]:
        """What all of them lie in, kind after kind."""
        return planes_of([x for each in self for x in each])

    @property
    def width(self) -> int:
        """F."""
        return next(weight.shape[0] for weight in self.gate_FD if weight is not None)


class RouterTally(NamedTuple):
    """What one layer's router has done since the tally was made; `route` adds to it.

    pairs_E   int64, (token, choice) pairs that each expert got
    sums      float64 (2,): the entropies of the tokens' probabilities, in nats, and how many tokens
    """

    pairs_E: Tensor
    sums: Tensor


class Step(Protocol):
    """What is computed on: (T,) int64 each, on the model's device."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def slot_mapping(self) -> Tensor: ...

    @property
    def group(self) -> int: ...

    def of(self, group: int) -> "Step":
        """The step as the layers of `group` see it."""


class StateInputs(NamedTuple):
    """What a step does with the recurrent states of its sequences.

    slots      the slot of each sequence's state (B,)
    cleared    slots that start from zeros
    restores   (from, to) slots to copy before the step
    saves      (from, to) slots to copy after it
    """

    slots: Sequence[int]
    cleared: Sequence[int]
    restores: Sequence[tuple[int, int]]
    saves: Sequence[tuple[int, int]]


@dataclass(eq=False)
class StepInputs:
    """A step's B sequences: integers of the host, and tensors on the device once asked for.

    Sequence b brings rows query_start[b] to query_start[b + 1] - 1: its last tokens, prefill chunk
    or decode alike. seq_lens counts its tokens in the cache with these; block_table[b, i] is the
    block of its positions i * block_size onward, in the cache of one group of layers, and -1 where
    these lie before the group's window: its memory is another's, and must not be read. Positions
    are absolute, a slot is block id * block_size + offset.

    slot_mapping and block_table are those of group `group`; `of` has the same step for the others.

    first_keys (B,) int32: the positions before which a sequence's rows see none; None for 0.
    whole: rows see all of the seq_lens tokens, wherever they are themselves.
    drawn (T,) int64: the token ids, where the device knows them before the host does, whose own are
    zeros then.
    """

    device: torch.device | str
    # (T,) int64 each
    input_ids_host: "array[int]"
    positions_host: "array[int]"
    slot_mapping_host: "array[int]"
    # (B + 1,) and (B,) int32
    query_start_host: "array[int]"
    seq_lens_host: "array[int]"
    # (B, max_blocks) int32 in one row, padded with 0
    block_table_host: "array[int]"
    max_blocks: int
    group: int = 0
    others: "tuple[StepInputs, ...]" = ()
    states: StateInputs | None = None
    first_keys_host: "array[int] | None" = None
    whole: bool = False
    drawn: Tensor | None = None

    @classmethod
    def build(
        cls,
        token_ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        block_ids: Sequence[Sequence[int]] | None,
        block_size: int,
        device: torch.device | str = "cpu",
        *,
        others: Sequence[Sequence[Sequence[int]]] = (),
        states: StateInputs | None = None,
        drawn: Tensor | None = None,
    ) -> "StepInputs":
        """From each sequence's new tokens, the position of the first of them, and its blocks.

        block_ids are those of the first group of layers, `others` those of each further group;
        None where no layer has any, as in a model of recurrent states alone.
        """
        ids = list[int]()
        positions = list[int]()
        query_start = [0]
        seq_lens = list[int]()
        for tokens, start in zip(token_ids, starts, strict=True):
            count = len(tokens)
            if count == 1:  # a decode, of which there are hundreds
                ids.append(tokens[0])
                positions.append(start)
            else:
                ids += tokens
                positions += range(start, start + count)
            seq_lens.append(start + count)
            query_start.append(len(ids))
        slots = array("q")
        if block_ids is not None:
            slots = _slots(block_ids, starts, seq_lens, block_size)
        step = cls(
            device,
            array("q", ids),
            array("q", positions),
            slots,
            array("i", query_start),
            array("i", seq_lens),
            *_table(block_ids or ()),
            states=states,
            drawn=drawn,
        )
        step.others = tuple(
            replace(
                step,
                slot_mapping_host=_slots(tables, starts, seq_lens, block_size),
                block_table_host=table,
                max_blocks=width,
                group=group,
            )
            for group, tables in enumerate(others, 1)
            for table, width in [_table(tables)]
        )
        return step

    def of(self, group: int) -> "StepInputs":
        """The same step, as the layers of a group see it."""
        return self if group == self.group else self.others[group - 1]

    @cached_property
    def input_ids(self) -> Tensor:
        return self._tensor(self.input_ids_host) if self.drawn is None else self.drawn

    @cached_property
    def positions(self) -> Tensor:
        return self._tensor(self.positions_host)

    @cached_property
    def slot_mapping(self) -> Tensor:
        return self._tensor(self.slot_mapping_host)

    @cached_property
    def block_table(self) -> Tensor:
        return self._tensor(self.block_table_host).view(len(self.seq_lens_host), self.max_blocks)

    def _tensor(self, values: "array[int]") -> Tensor:
        dtype = torch.int64 if values.typecode == "q" else torch.int32
        host = torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
        return send(host, self.device)


def _slots(
    tables: Sequence[Sequence[int]], starts: Sequence[int], stops: Sequence[int], block_size: int
) -> "array[int]":
    """Where each sequence's positions from `starts` to `stops` - 1 lie in the cache."""
    slots = list[int]()
    for blocks, start, stop in zip(tables, starts, stops, strict=True):
        if stop - start == 1:
            slots.append(blocks[start // block_size] * block_size + start % block_size)
            continue
        for at in range(start // block_size, -(-stop // block_size)):
            shift = (blocks[at] - at) * block_size
            first = max(start, at * block_size) + shift
            last = min(stop, (at + 1) * block_size) + shift
            slots.extend(range(first, last))
    return array("q", slots)


def _table(tables: Sequence[Sequence[int]]) -> "tuple[array[int], int]":
    """Block tables in one row, padded to the longest; and its length."""
    width = max(map(len, tables), default=0)
    table = array("i")
    for blocks in tables:
        table.extend(blocks)
        if len(blocks) < width:
            table.frombytes(bytes((width - len(blocks)) * table.itemsize))
    return table, width
