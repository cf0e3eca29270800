"""Attention over a paged cache by the CPU's kernels, whose layout csrc/kernels.h describes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.cache_spec import (
    CacheSpec,
    Plane,
    check_key_offset,
    holds_latents,
    key_value_planes,
)
from moebius.ops.capability import Feature, Operation
from moebius.ops.config import PLAIN_HEADS, HeadRows
from moebius.ops.cpu.base import CACHES, CpuBase, check_shape, norm_dtype, require_dtype
from moebius.ops.prepared import AttentionPlan, LayerCache, own
from moebius.ops.steps import Rotation, Step, StepInputs


@dataclass(frozen=True, slots=True, eq=False)
class CpuCache(LayerCache):
    """One layer's keys and values, and how they lie."""

    buffer: Tensor
    shape: _cpu.CacheShape
    keys: Plane
    values: Plane
    key_offset: Tensor | None
    latent: bool = False

    @property
    def num_blocks(self) -> int:
        shape = self.shape
        return (len(self.buffer) + shape.stride - shape.block_bytes) // shape.stride

    @property
    def features(self) -> frozenset[Feature]:
        """What it asks of the operations on it."""
        if self.latent:
            return frozenset({Feature.LATENT})
        return frozenset({Feature.INT8_CACHE} if self.keys.dtype == torch.int8 else ())


@dataclass(frozen=True, slots=True, eq=False)
class CpuPlan(AttentionPlan):
    """A step's sequences, copied to where the kernels read them."""

    step: _cpu.StepAttention
    window: int | None

    def set(self, step: StepInputs) -> None:
        query_start, _ = step.query_start_host.buffer_info()
        seq_lens, batch = step.seq_lens_host.buffer_info()
        block_table, _ = step.block_table_host.buffer_info()
        firsts = step.first_keys_host
        if firsts is not None and len(firsts) != batch:
            raise ValueError(f"first keys of {len(firsts)} sequences, where there are {batch}")
        self.step.set(
            query_start=query_start,
            seq_lens=seq_lens,
            block_table=block_table,
            batch=batch,
            width=step.max_blocks,
            first_keys=0 if firsts is None else firsts.buffer_info()[0],
            whole=step.whole,
        )


def _shape(spec: CacheSpec, block_size: int, stride: int | None = None) -> _cpu.CacheShape:
    keys, values = key_value_planes(spec)
    if keys.dtype not in CACHES:
        raise ValueError(f"the CPU kernels keep no keys and values in {keys.dtype}")
    return _cpu.CacheShape(
        block_size=block_size,
        kv_heads=keys.shape[0],
        key_dim=keys.shape[1],
        value_dim=values.shape[1],
        type=CACHES[keys.dtype],
        shared=holds_latents(spec),
        stride=stride or 0,
    )


def _check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError where not as many query heads share each key head."""
    if num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key heads")


def _reach(bias_HR: Tensor | None, num_heads: int) -> int:
    """The farthest distance with a bias. Raises ValueError for biases of other heads."""
    if bias_HR is None:
        return 0
    distances = bias_HR.shape[1]
    check_shape("biases by distance", bias_HR, num_heads, distances)
    if distances % 2 == 0:
        raise ValueError(f"biases of {distances} distances are not as many on both sides of 0")
    return distances // 2


def _norm_dtype(dtype: torch.dtype, key_size: int, *norms: Tensor | None) -> int:
    """Of head norms' weights beside rows of `dtype`. Raises ValueError for weights of two dtypes,
    or of another size."""
    numbers = set()
    for norm in norms:
        check_shape("a norm's weight", norm, key_size)
        if norm is not None:
            numbers.add(norm_dtype(dtype, norm))
    if len(numbers) > 1:
        raise ValueError("the CPU kernels want one dtype of the norms of queries and of keys")
    return numbers.pop() if numbers else require_dtype(dtype)


def _dtype_of(cache: CpuCache, x: Tensor) -> int:
    """The dtype of all that goes in or comes out of a cache, and of one that holds no codes."""
    held = cache.keys.dtype
    return require_dtype(x.dtype if held == torch.int8 else held, x)


class AttentionOps(CpuBase):
    """Every feature of the interface, in bfloat16 and float32."""

    def rotate_and_store(
        self,
        qkv_TI: Tensor,
        rotation: Rotation,
        cache: LayerCache,
        slot_mapping_T: Tensor,
        q_norm_N: Tensor | None = None,
        k_norm_N: Tensor | None = None,
        eps: float = 0.0,
        heads: HeadRows = PLAIN_HEADS,
    ) -> Tensor:
        held = own(cache, CpuCache)
        num_kv_heads, key_size = held.keys.shape
        value_size = held.values.shape[1]
        rows, width = qkv_TI.shape
        cos_TR, sin_TR, interleaved = rotation
        half = cos_TR.shape[1]
        q_size, _, _ = heads.sizes(width, num_kv_heads, key_size, value_size)
        num_heads, rest = divmod(q_size, 2 * key_size if heads.gated else key_size)
        unlike = heads.keys_as_values and key_size != value_size
        if rest or 2 * half > key_size or unlike:
            raise ValueError(
                f"{width} columns, rotated in {half} pairs a head, are not the queries, keys and "
                f"values of {num_kv_heads} key heads of {key_size} values"
            )
        if num_heads:
            _check_heads(num_heads, num_kv_heads)
        check_shape("cosines", cos_TR, rows, half)
        check_shape("sines", sin_TR, rows, half)
        check_shape("slots", slot_mapping_T, rows)
        out = self._empty(qkv_TI, (num_heads, key_size), qkv_TI.dtype)
        call = _cpu.RotateAndStore(
            dtype=_dtype_of(held, qkv_TI),
            shape=held.shape,
            blocks=held.num_blocks,
            qkv=self._at(qkv_TI),
            q_heads=num_heads,
            gated=heads.gated,
            cos=self._at(cos_TR, torch.float32),
            sin=self._at(sin_TR, torch.float32),
            half=half,
            interleaved=interleaved,
            q_norm=self._at(q_norm_N),
            k_norm=self._at(k_norm_N),
            norm_dtype=_norm_dtype(qkv_TI.dtype, key_size, q_norm_N, k_norm_N),
            eps=eps,
            slots=self._at(slot_mapping_T, torch.int64),
            cache=self._at(held.buffer),
            key_offset=self._at(held.key_offset),
            q_out=self._at(out),
            turned_first=heads.turned_first,
            keys_as_values=heads.keys_as_values,
            normed_values=heads.normed_values,
            queries_alone=heads.queries_alone,
        )
        use = Operation.ROTATE_AND_STORE
        self._run(use, call, qkv_TI, rows, held, features=held.features)
        return out

    def cache_bytes_per_block(self, spec: CacheSpec, block_size: int) -> int:
        return _shape(spec, block_size).block_bytes

    def scratch_bytes(self, widest: int, spec: CacheSpec, block_size: int, context: int) -> int:
        shape = _shape(spec, block_size)
        return self._native.most_scratch_bytes(widest=widest, shape=shape, context=context)

    def make_cache(
        self,
        buffer: Tensor,
        spec: CacheSpec,
        block_size: int,
        key_offset_GN: Tensor | None = None,
        stride: int | None = None,
    ) -> CpuCache:
        keys, values = key_value_planes(spec)
        check_key_offset(spec, key_offset_GN)
        shape = _shape(spec, block_size, stride)
        if shape.stride < shape.block_bytes or shape.stride % 4:
            raise ValueError(f"blocks of {shape.block_bytes} bytes cannot lie {stride} apart")
        return CpuCache(buffer, shape, keys, values, key_offset_GN, holds_latents(spec))

    @property
    def cache_layout(self) -> str:
        return "lanes of 16 keys, pairs of values, scales behind codes"

    def block_memory(self, cache: LayerCache, block: int) -> Sequence[Tensor]:
        held = own(cache, CpuCache)
        start = block * held.shape.stride
        return (held.buffer[start : start + held.shape.block_bytes],)

    def plan_attention(self, step: Step, block_size: int, window: int | None = None) -> CpuPlan:
        plan = CpuPlan(_cpu.StepAttention(window=window or 0, block_size=block_size), window)
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
        bias_HR: Tensor | None = None,
    ) -> Tensor:
        held = own(cache, CpuCache)
        planned = own(plan, CpuPlan)
        num_kv_heads, key_size = held.keys.shape
        value_size = held.values.shape[1]
        rows, num_heads, _ = q_THN.shape
        _check_heads(num_heads, num_kv_heads)
        check_shape("queries", q_THN, rows, num_heads, key_size)
        check_shape("sinks", sinks_H, num_heads)
        reach = _reach(bias_HR, num_heads)
        out = self._empty(q_THN, (num_heads, value_size), q_THN.dtype)
        call = _cpu.Attention(
            dtype=_dtype_of(held, q_THN),
            shape=held.shape,
            blocks=held.num_blocks,
            step=planned.step,
            cache=self._at(held.buffer),
            key_offset=self._at(held.key_offset),
            q=self._at(q_THN),
            q_heads=num_heads,
            scale=scale,
            softcap=softcap or 0.0,
            sinks=self._at(sinks_H, torch.float32),
            out=self._at(out),
            bias=self._at(bias_HR, torch.float32),
            reach=reach,
        )
        asked = {
            Feature.WINDOW: planned.window is not None,
            Feature.SOFTCAP: softcap is not None,
            Feature.SINKS: sinks_H is not None,
            Feature.BIAS: bias_HR is not None,
            Feature.VALUE_SIZE: value_size != key_size,
        }
        features = held.features | {feature for feature, is_asked in asked.items() if is_asked}
        use = Operation.PAGED_ATTENTION
        self._run(use, call, q_THN, rows, held, planned, features=features)
        return out
