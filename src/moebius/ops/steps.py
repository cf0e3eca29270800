"""What operations are handed: a step (the same record for real, warm-up and empty ones) and a layer's experts."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
# A step's final hidden states (T, D).
Compute = Callable[["StepInputs"], Tensor]


class ExpertWeights(NamedTuple):
    """One layer's experts: sequences of one tensor an expert, so that nothing mapped is ever stacked or copied.

    gate_FD, up_FD   E tensors (F, D); up is empty where experts have two matrices      down_DF   E tensors (D, F)
    the biases       E tensors each, (F,), (F,) and (D,), or empty for none
    """

    gate_FD: Sequence[Tensor]
    up_FD: Sequence[Tensor]
    down_DF: Sequence[Tensor]
    gate_bias_F: Sequence[Tensor] = ()
    up_bias_F: Sequence[Tensor] = ()
    down_bias_D: Sequence[Tensor] = ()


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """A step's B sequences as tensors on the model's device, and the same facts for the host.

    Sequence b brings rows query_start[b] to query_start[b + 1] - 1: its last tokens, prefill chunk or decode alike.
    seq_lens counts its tokens in the cache with these; block_table[b, i] is the block of its positions
    i * block_size onward. Host copies spare a backend that needs them the wait for the device.
    """

    # (T,) int64
    input_ids: Tensor
    # (T,) int64, absolute
    positions: Tensor
    # (T,) int64, block id * block_size + offset
    slot_mapping: Tensor
    # (B + 1,) int32
    query_start: Tensor
    # (B,) int32
    seq_lens: Tensor
    # (B, max_blocks) int32, padded with 0
    block_table: Tensor
    # (L,) int64, rows of the step whose logits are wanted
    logit_rows: Tensor
    # B + 1 and B integers
    query_start_host: tuple[int, ...]
    seq_lens_host: tuple[int, ...]

    @classmethod
    def build(
        cls,
        token_ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        block_ids: Sequence[Sequence[int]],
        logit_rows: Sequence[int],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> "StepInputs":
        """From each sequence's new tokens, the position of the first of them, and its blocks."""
        ids, positions, slots, table = (list[int]() for _ in range(4))
        query_start, seq_lens = [0], []
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
                    slots.extend(range(max(start, at * block_size) + shift, min(stop, (at + 1) * block_size) + shift))
            table += blocks
            if len(blocks) < width:
                table += repeat(0, width - len(blocks))
            query_start.append(len(ids))
            seq_lens.append(stop)

        def tensor(values: Sequence[int], code: str = "q") -> Tensor:
            # An array takes a list at once, and torch reads an array where it lies: appending to arrays, or numpy on
            # the way, would cost more than a short step's integers.
            dtype = torch.int64 if code == "q" else torch.int32
            data = torch.frombuffer(array(code, values), dtype=dtype) if values else torch.empty(0, dtype=dtype)
            return data.to(device)

        return cls(
            input_ids=tensor(ids),
            positions=tensor(positions),
            slot_mapping=tensor(slots),
            query_start=tensor(query_start, "i"),
            seq_lens=tensor(seq_lens, "i"),
            block_table=tensor(table, "i").view(len(seq_lens), width),
            logit_rows=tensor(logit_rows),
            query_start_host=tuple(query_start),
            seq_lens_host=tuple(seq_lens),
        )
