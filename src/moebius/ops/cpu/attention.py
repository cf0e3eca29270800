"""Attention over a paged cache by the CPU's kernels, whose layout csrc/kernels.h describes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.cpu.base import DTYPES, CpuBase, address, require_dtype
from moebius.ops.prepared import AttentionPlan, LayerCache, own
from moebius.ops.steps import StepInputs


@dataclass(frozen=True, slots=True, eq=False)
class CpuCache(LayerCache):
    """One layer's keys and values, and how they lie."""

    buffer: Tensor
    shape: _cpu.CacheShape
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, eq=False)
class CpuPlan(AttentionPlan):
    """A step's sequences, copied to where the kernels read them."""

    step: _cpu.StepAttention

    def set(self, step: StepInputs) -> None:
        query_start, _ = step.query_start_host.buffer_info()
        seq_lens, batch = step.seq_lens_host.buffer_info()
        block_table, _ = step.block_table_host.buffer_info()
        self.step.set(query_start, seq_lens, block_table, batch, step.max_blocks)


class AttentionOps(CpuBase):
    def rotate_and_store(
        self,
        qkv_TI: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        cache: LayerCache,
        slot_mapping_T: Tensor,
        q_norm_N: Tensor | None = None,
        k_norm_N: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        held = own(cache, CpuCache)
        dtype = require_dtype(qkv_TI.dtype, q_norm_N, k_norm_N)
        rows, size = qkv_TI.shape
        q_heads = size // held.head_dim - 2 * held.kv_heads
        out = self._empty((rows, q_heads, held.head_dim), qkv_TI.dtype)
        angles = address(cos_TR, torch.float32), address(sin_TR, torch.float32), cos_TR.shape[1]
        norms = address(q_norm_N), address(k_norm_N), eps
        places = address(slot_mapping_T, torch.int64), held.buffer.data_ptr(), out.data_ptr()
        self._native.rotate_and_store(
            dtype, held.shape, address(qkv_TI), rows, q_heads, *angles, *norms, *places
        )
        return out

    def kv_cache_bytes_per_block(
        self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        return _cpu.CacheShape(block_size, num_kv_heads, head_dim, DTYPES[dtype]).block_bytes

    def make_kv_cache(
        self, buffer: Tensor, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> CpuCache:
        shape = _cpu.CacheShape(block_size, num_kv_heads, head_dim, DTYPES[dtype])
        return CpuCache(buffer, shape, num_kv_heads, head_dim)

    def plan_attention(
        self, step: StepInputs, block_size: int, window: int | None = None
    ) -> CpuPlan:
        plan = CpuPlan(_cpu.StepAttention(window or 0))
        if self._recording:
            self._recording.plans.append(plan)
        plan.set(step)
        return plan

    def paged_attention(
        self,
        q_THN: Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        scale: float,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        held = own(cache, CpuCache)
        dtype = require_dtype(q_THN.dtype)
        out = self._empty(q_THN.shape, q_THN.dtype)
        q, sinks, caps = address(q_THN), address(sinks_H, torch.float32), softcap or 0.0
        into, at = out.data_ptr(), held.buffer.data_ptr()
        self._native.attention(
            dtype,
            held.shape,
            own(plan, CpuPlan).step,
            len(q_THN),
            at,
            q,
            q_THN.shape[1],
            scale,
            caps,
            sinks,
            into,
        )
        return out
