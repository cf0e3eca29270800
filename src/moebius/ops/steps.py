"""StepInputs: the one record of what a step computes, the same for real, warm-up and empty steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
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
        counts = [len(ids) for ids in token_ids]
        query_start = [0, *accumulate(counts)]
        seq_lens = [start + count for start, count in zip(starts, counts, strict=True)]
        table = np.zeros((len(counts), max(map(len, block_ids), default=0)), np.int32)
        for row, blocks in zip(table, block_ids, strict=True):
            row[: len(blocks)] = blocks
        sequence = np.repeat(np.arange(len(counts)), np.asarray(counts, np.int64))
        offsets = np.asarray(starts, np.int64) - np.asarray(query_start[:-1], np.int64)
        positions = np.arange(query_start[-1]) + offsets[sequence]
        slots = table[sequence, positions // block_size].astype(np.int64) * block_size + positions % block_size

        def tensor(values: Any, dtype: Any = np.int64) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype)).to(device, non_blocking=True)

        return cls(
            input_ids=tensor(list(chain.from_iterable(token_ids))),
            positions=tensor(positions),
            slot_mapping=tensor(slots),
            query_start=tensor(query_start, np.int32),
            seq_lens=tensor(seq_lens, np.int32),
            block_table=tensor(table, np.int32),
            logit_rows=tensor(logit_rows),
            query_start_host=tuple(query_start),
            seq_lens_host=tuple(seq_lens),
        )
