"""Random sequences in a paged cache full of NaN, for the tests of attention: any backend, dtype and
block size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebius.ops import Ops
from moebius.ops.cache_spec import key_value_spec
from moebius.ops.steps import Rotation, StepInputs


def side_by_side(q_THN: Tensor, k_TGN: Tensor, v_TGN: Tensor) -> Tensor:
    """(T, (H + G) * N + G * Nv), as rotate_and_store wants them."""
    return torch.cat((q_THN.flatten(1), k_TGN.flatten(1), v_TGN.flatten(1)), dim=1)


def as_is(ops: Ops, cache: Any, k_TGN: Tensor, v_TGN: Tensor, slots_T: Tensor) -> None:
    """Write keys and values to their slots without norm and rotation."""
    nothing = torch.empty(len(k_TGN), 0)
    rows_TI = side_by_side(k_TGN, k_TGN, v_TGN)
    ops.rotate_and_store(rows_TI, Rotation(nothing, nothing), cache, slots_T)


def empty_cache(
    ops: Ops,
    blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    value_dim: int | None = None,
    key_offset_GN: Tensor | None = None,
) -> Any:
    """A layer's cache in which every value that nobody wrote is NaN, in bfloat16 and in float32; of
    int8 every scale."""
    spec = key_value_spec(kv_heads, head_dim, dtype, value_dim)
    size = ops.cache_bytes_per_block(spec, block_size) * blocks
    memory = torch.full((size,), 255, dtype=torch.uint8)
    return ops.make_cache(memory, spec, block_size, key_offset_GN)


@dataclass(frozen=True)
class Sequences:
    """Keys and values (S, G, N) of some sequences; a step computes the last `new` tokens of
    each."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    new: Sequence[int]

    def scatter(self, block_size: int, seed: int, spare: int = 3) -> tuple[list[list[int]], int]:
        """Each sequence's blocks, in random places, and how many blocks there are in all."""
        counts = [-(-len(k) // block_size) for k in self.keys]
        order = torch.randperm(
            sum(counts) + spare, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        return [[order.pop() for _ in range(count)] for count in counts], sum(counts) + spare

    def attend(
        self,
        ops: Ops,
        q_THN: Tensor,
        scale: float,
        block_size: int,
        *,
        window: int | None = None,
        seed: int = 0,
        kv_dtype: torch.dtype | None = None,
        key_offset_GN: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Fill a cache, attend with the step's queries, as an engine would: (T, H, N).

        kv_dtype: the cache's; None: the queries'.
        """
        tables, blocks = self.scatter(block_size, seed)
        _, kv_heads, head_dim = self.keys[0].shape
        value_dim = self.values[0].shape[2]
        held = kv_dtype or q_THN.dtype
        cache = empty_cache(
            ops, blocks, block_size, kv_heads, head_dim, held, value_dim, key_offset_GN
        )
        whole = StepInputs.build(
            [[0] * len(k) for k in self.keys], [0] * len(tables), tables, block_size
        )
        as_is(
            ops, cache, torch.cat(list(self.keys)), torch.cat(list(self.values)), whole.slot_mapping
        )
        starts = [len(k) - n for k, n in zip(self.keys, self.new, strict=True)]
        step = StepInputs.build([[0] * n for n in self.new], starts, tables, block_size)
        return ops.paged_attention(
            q_THN, cache, ops.plan_attention(step, block_size, window), scale, **options
        )
