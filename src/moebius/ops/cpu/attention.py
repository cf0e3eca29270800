"""Attention over a paged cache by the CPU's kernels, whose layout csrc/kernels.h describes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.cache_spec import CacheSpec, key_value_planes
from moebius.ops.capability import Feature, Operation
from moebius.ops.cpu.base import CpuBase, require_dtype
from moebius.ops.prepared import AttentionPlan, LayerCache, own
from moebius.ops.steps import Step, StepInputs


@dataclass(frozen=True, slots=True, eq=False)
class CpuCache(LayerCache):
    """One layer's keys and values, and how they lie."""

    buffer: Tensor
    shape: _cpu.CacheShape
    num_kv_heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True, slots=True, eq=False)
class CpuPlan(AttentionPlan):
    """A step's sequences, copied to where the kernels read them."""

    step: _cpu.StepAttention
    window: int | None

    def set(self, step: StepInputs) -> None:
        query_start, _ = step.query_start_host.buffer_info()
        seq_lens, batch = step.seq_lens_host.buffer_info()
        block_table, _ = step.block_table_host.buffer_info()
        self.step.set(
            query_start=query_start,
            seq_lens=seq_lens,
            block_table=block_table,
            batch=batch,
            width=step.max_blocks,
        )


def _shape(spec: CacheSpec, block_size: int) -> _cpu.CacheShape:
    keys, values = key_value_planes(spec)
    return _cpu.CacheShape(
        block_size=block_size,
        kv_heads=keys.shape[0],
        key_dim=keys.shape[1],
        value_dim=values.shape[1],
        dtype=require_dtype(keys.dtype),
    )


class AttentionOps(CpuBase):
    """Every feature of the interface, in bfloat16 and float32."""

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
        kv_size = held.num_kv_heads * (held.key_size + held.value_size)
        num_heads = (qkv_TI.shape[1] - kv_size) // held.key_size
        out = self._empty(qkv_TI, (num_heads, held.key_size), qkv_TI.dtype)
        call = _cpu.RotateAndStore(
            dtype=require_dtype(qkv_TI.dtype, q_norm_N, k_norm_N),
            shape=held.shape,
            qkv=self._at(qkv_TI),
            q_heads=num_heads,
            cos=self._at(cos_TR, torch.float32),
            sin=self._at(sin_TR, torch.float32),
            half=cos_TR.shape[1],
            q_norm=self._at(q_norm_N),
            k_norm=self._at(k_norm_N),
            eps=eps,
            slots=self._at(slot_mapping_T, torch.int64),
            cache=self._at(held.buffer),
            q_out=self._at(out),
        )
        self._run(Operation.ROTATE_AND_STORE, call, qkv_TI, len(qkv_TI), held)
        return out

    def cache_bytes_per_block(self, spec: CacheSpec, block_size: int) -> int:
        return _shape(spec, block_size).block_bytes

    def scratch_bytes(self, widest: int, spec: CacheSpec, block_size: int, context: int) -> int:
        shape = _shape(spec, block_size)
        return self._native.most_scratch_bytes(widest=widest, shape=shape, context=context)

    def make_cache(self, buffer: Tensor, spec: CacheSpec, block_size: int) -> CpuCache:
        keys, values = key_value_planes(spec)
        num_kv_heads, key_size = keys.shape
        shape = _shape(spec, block_size)
        return CpuCache(buffer, shape, num_kv_heads, key_size, values.shape[1])

    @property
    def cache_layout(self) -> str:
        return "lanes of 16 keys, pairs of values"

    def block_memory(self, cache: LayerCache, block: int) -> Sequence[Tensor]:
        held = own(cache, CpuCache)
        size = held.shape.block_bytes
        return (held.buffer[block * size : (block + 1) * size],)

    def plan_attention(self, step: Step, block_size: int, window: int | None = None) -> CpuPlan:
        plan = CpuPlan(_cpu.StepAttention(window=window or 0), window)
        if self._recorder is not None:
            self._recorder.plans.append((plan, step.group))
        else:
            plan.set(own(step, StepInputs))
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
        planned = own(plan, CpuPlan)
        num_heads = q_THN.shape[1]
        out = self._empty(q_THN, (num_heads, held.value_size), q_THN.dtype)
        call = _cpu.Attention(
            dtype=require_dtype(q_THN.dtype),
            shape=held.shape,
            step=planned.step,
            cache=self._at(held.buffer),
            q=self._at(q_THN),
            q_heads=num_heads,
            scale=scale,
            softcap=softcap or 0.0,
            sinks=self._at(sinks_H, torch.float32),
            out=self._at(out),
        )
        asked = {
            Feature.WINDOW: planned.window is not None,
            Feature.SOFTCAP: softcap is not None,
            Feature.SINKS: sinks_H is not None,
            Feature.VALUE_SIZE: held.value_size != held.key_size,
        }
        features = frozenset(feature for feature, is_asked in asked.items() if is_asked)
        use = Operation.PAGED_ATTENTION
        self._run(use, call, q_THN, len(q_THN), held, planned, features=features)
        return out
