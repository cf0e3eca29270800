"""StepInputs: the one record of what a step computes, the same for real, warm-up and empty steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    ) -> StepInputs:
        """From each sequence's new tokens, the position of the first of them, and its blocks."""
        query_start, seq_lens = [0], []
        positions: list[int] = []
        slots: list[int] = []
        for ids, start, blocks in zip(token_ids, starts, block_ids, strict=True):
            stop = start + len(ids)
            query_start.append(query_start[-1] + len(ids))
            seq_lens.append(stop)
            positions.extend(range(start, stop))
            slots.extend(blocks[p // block_size] * block_size + p % block_size for p in range(start, stop))
        width = max((len(blocks) for blocks in block_ids), default=0)
        table = [[*blocks, *[0] * (width - len(blocks))] for blocks in block_ids]

        def tensor(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return cls(
            input_ids=tensor([t for ids in token_ids for t in ids]),
            positions=tensor(positions),
            slot_mapping=tensor(slots),
            query_start=tensor(query_start, torch.int32),
            seq_lens=tensor(seq_lens, torch.int32),
            block_table=torch.tensor(table, dtype=torch.int32).reshape(len(table), width).to(device),
            logit_rows=tensor(logit_rows),
            query_start_host=tuple(query_start),
            seq_lens_host=tuple(seq_lens),
        )
