"""What operations are handed: a step (the same record for real, warm-up and empty ones) and a
layer's experts."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moebius.ops.weights import Weight, planes_of

Pair = tuple[Tensor, Tensor]


class ExpertWeights(NamedTuple):
    """One layer's experts: one weight an expert, so that nothing mapped is stacked or copied.

    gate_FD, up_FD   E weights (F, D); up is empty where experts have two matrices
    down_DF          E weights (D, F)
    the biases       E tensors each, (F,), (F,) and (D,), or empty for none
    """

    gate_FD: Sequence[Weight]
    up_FD: Sequence[Weight]
    down_DF: Sequence[Weight]
    gate_bias_F: Sequence[Tensor] = ()
    up_bias_F: Sequence[Tensor] = ()
    down_bias_D: Sequence[Tensor] = ()

    def tensors(self) -> list[Tensor | None]:
        """What all of them lie in, kind after kind."""
        return planes_of([x for each in self for x in each])


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


@dataclass(eq=False)
class StepInputs:
    """A step's B sequences, as integers of the host; as tensors on the model's device once these
    are asked for.

    Sequence b brings rows query_start[b] to query_start[b + 1] - 1: its last tokens, prefill chunk
    or decode alike. seq_lens counts its tokens in the cache with these; block_table[b, i] is the
    block of its positions i * block_size onward. Positions are absolute, a slot is block id *
    block_size + offset.
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

    def of(self, group: int) -> "StepInputs":
        """The step as the layers of `group` see it."""
        assert group == self.group, "all layers share one block table"
        return self

    @classmethod
    def build(
        cls,
        token_ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        block_ids: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> "StepInputs":
        """From each sequence's new tokens, the position of the first of them, and its blocks."""
        ids, positions, slots = (list[int]() for _ in range(3))
        query_start, seq_lens, table = [0], [], array("i")
        width = max(map(len, block_ids), default=0)
        for tokens, start, blocks in zip(token_ids, starts, block_ids, strict=True):
            stop = start + len(tokens)
            ids += tokens
            if stop - start == 1:  # a decode, of which there are hundreds
                positions.append(start)
                slots.append(blocks[start // block_size] * block_size + start % block_size)
            else:
                positions.extend(range(start, stop))
                for at in range(start // block_size, -(-stop // block_size)):
                    shift = (blocks[at] - at) * block_size
                    slots.extend(
                        range(
                            max(start, at * block_size) + shift,
                            min(stop, (at + 1) * block_size) + shift,
                        )
                    )
            table.extend(blocks)
            table.frombytes(bytes((width - len(blocks)) * table.itemsize))
            query_start.append(len(ids))
            seq_lens.append(stop)
        rows = array("q", ids), array("q", positions), array("q", slots)
        return cls(device, *rows, array("i", query_start), array("i", seq_lens), table, width)

    @cached_property
    def input_ids(self) -> Tensor:
        return self._tensor(self.input_ids_host)

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
        return (
            torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
        ).to(self.device)
