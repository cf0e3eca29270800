"""The operations on a CPU: csrc's kernels behind `Ops`. Weights are read where they lie; nothing is
packed or copied.

The instruction set is the best that the processor has; the environment variable MOEBIUS_CPU_ISA
limits it (portable, avx2, avx512, avx512bf16, amx, or reference for plain PyTorch). Every kernel
computes a row in the same way whatever rows surround it, however many threads there are and
wherever the KV cache holds its tokens: one answer (promise P1).
"""

import math
import os
import re
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moebius import _cpu, machine
from moebius.config import Activation, RouterConfig
from moebius.errors import ConfigError
from moebius.ops.reference import ReferenceOps
from moebius.ops.sampling import Shaping, TopK
from moebius.ops.steps import (
    Captured,
    Compute,
    ExpertWeights,
    Logits,
    Pair,
    RouterTally,
    StepInputs,
)

# Torch functions that write to a tensor: copy_, __setitem__, __iadd__ and their kind.
_CHANGES = re.compile(r"[a-z]\w*[a-z0-9]_|__setitem__|__i(?!nt|ndex|nvert)\w+__")
_DTYPES = {torch.bfloat16: 0, torch.float32: 1}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_SCORES = {"softmax": 0, "sigmoid": 1, "logits": 2}
_WEIGHTS = {"raw": 0, "renorm": 1, "softmax": 2, "sigmoid": 3}


class CpuCache(NamedTuple):
    """One layer's keys and values, laid out as csrc/kernels.h says."""

    buffer: Tensor
    shape: Any
    kv_heads: int
    head_dim: int


class CpuLinear(NamedTuple):
    """Linear layers of one input as a table of addresses, their sizes, and the tensors that lie
    there."""

    table: Any
    dtype: torch.dtype
    in_size: int
    out_size: int
    layers: tuple[tuple[Tensor, Tensor | None], ...]


class CpuExperts(NamedTuple):
    """One layer's experts as a table of addresses, and the tensors that lie there."""

    table: Any
    weights: ExpertWeights


def _address(x: Tensor | None, dtype: torch.dtype | None = None) -> int:
    if x is None:
        return 0
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"the CPU kernels want {dtype} here, not {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(
            f"the CPU kernels want contiguous tensors, not strides {x.stride()} for shape "
            f"{tuple(x.shape)}"
        )
    return x.data_ptr()


def _require_no_gradient(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            "the CPU kernels compute no gradients; train with ReferenceOps, or serve under no_grad"
        )


def _require_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> int:
    for x in tensors:
        if x is not None and x.dtype != dtype:
            raise ValueError(f"the CPU kernels want one dtype, not {dtype} and {x.dtype}")
    if dtype not in _DTYPES:
        raise ValueError(f"the CPU kernels compute in bfloat16 and float32, not in {dtype}")
    return _DTYPES[dtype]


class _KernelsOnly(TorchFunctionMode):
    """Notices what torch itself computes, other views of the same memory apart: a recording would
    not know of it.

    (A TorchDispatchMode would see more, but importing what it needs takes seconds.)
    """

    only: bool = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        made = [
            x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)
        ]
        changes = _CHANGES.fullmatch(getattr(func, "__name__", ""))
        if changes or not all(x.untyped_storage().data_ptr() in given for x in made):
            self.only = func is torch.frombuffer and self.only
        return out


class Recording:
    """Kernels that were noted on one row, and are called again, all at once, on as many rows as
    come, over the same memory.

    Every tensor in between lies in memory of its own for `max_rows` rows, which a later tensor of
    the same size takes over when it is gone: the kernels run in one order. So a step allocates
    nothing, and Python's share of it does not grow with the layers.
    """

    out: Tensor

    def __init__(self, inputs: int, max_rows: int) -> None:
        self.max_rows = max_rows
        self.plans: list[tuple[Any, int]] = []  # attention's, each with its group of layers
        self._free: dict[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self.inputs = [self.buffer((), torch.int64).zero_() for _ in range(inputs)]
        self.program = _cpu.Program([x.data_ptr() for x in self.inputs])
        self._views: dict[int, Tensor] = {}

    def __call__(self, *inputs: "array[int]") -> Tensor:
        count = len(inputs[0])
        if count > self.max_rows:
            raise ValueError(f"{count} rows where {self.max_rows} were said to be the most")
        self.program(count, [x.buffer_info()[0] for x in inputs])
        if count not in self._views:  # a view costs torch as much as a small kernel
            self._views[count] = self.out[:count]
        return self._views[count]

    def buffer(self, row: Sequence[int], dtype: torch.dtype) -> Tensor:
        """(max_rows, *row). Its memory is free again when its last view is gone."""
        count = math.prod(row) * self.max_rows
        nbytes, free = count * dtype.itemsize, self._free
        memory = free[nbytes].pop() if free[nbytes] else np.empty(nbytes + 64, np.uint8)
        view = memory[-memory.ctypes.data % 64 :]
        weakref.finalize(view, free[nbytes].append, memory)
        return torch.frombuffer(view, dtype=dtype, count=count).view(self.max_rows, *row)


class CpuOps(ReferenceOps):
    """C++ kernels on `threads` threads of a pool of their own.

    Raises ConfigError for an instruction set that does not exist or that the processor lacks.
    """

    one_answer = True

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        isa = os.environ.get("MOEBIUS_CPU_ISA", "") if isa is None else isa
        try:
            self._ops = _cpu.Ops(isa, threads or machine.threads())
        except ValueError as error:
            has = ", ".join(_cpu.available())
            raise ConfigError(
                f"MOEBIUS_CPU_ISA={isa}: {error}; here there are: {has}, reference"
            ) from None
        self.name = f"cpu-{self._ops.name}"
        self._routers: dict[RouterConfig, Any] = {}
        self._recording: Recording | None = None

    def capture(
        self, compute: Compute, logits: Logits, example: StepInputs, max_tokens: int
    ) -> Captured:
        groups = range(1 + len(example.others))
        step = Recording(2 + len(groups), max_tokens)
        head = Recording(1, max_tokens)

        def on_step(inputs: StepInputs) -> Tensor:
            for plan, group in step.plans:
                _set_plan(plan, inputs.of(group))
            slots = [inputs.of(group).slot_mapping_host for group in groups]
            return step(inputs.input_ids_host, inputs.positions_host, *slots)

        def noted(ids: Tensor, positions: Tensor, *slots: Tensor) -> Tensor:
            example.input_ids = ids
            example.positions = positions
            for group in groups:
                example.of(group).slot_mapping = slots[group]
            return compute(example)

        plain = super().capture(compute, logits, example, max_tokens)
        if not self._note(step, noted):
            return plain
        whole = self._note(head, lambda rows_L: logits(step.out, rows_L))
        return on_step, (lambda _, rows: head(array("q", rows))) if whole else plain[1]

    def _note(self, recording: Recording, compute: Callable[..., Tensor]) -> bool:
        """Run `compute` on one row of each of the recording's inputs; False where torch computes a
        part of it."""
        self._recording, mode = recording, _KernelsOnly()
        self._ops.record(recording.program)
        try:
            with mode:
                out = compute(*(x[:1] for x in recording.inputs))
        finally:
            self._ops.record(None)
            self._recording = None
        if mode.only:  # the result is read until the next call, and so is kept
            recording.out = torch.as_strided(
                out, (recording.max_rows, *out.shape[1:]), out.stride()
            )
        return mode.only

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._recording:
            return self._recording.buffer(shape[1:], dtype)[: shape[0]]
        return torch.empty(shape, dtype=dtype)

    def prepare_linear(self, *layers: tuple[Tensor, Tensor | None]) -> CpuLinear:
        weights, biases = zip(*layers, strict=True)
        _require_no_gradient(*weights, *biases)
        dtype, size = _require_dtype(weights[0].dtype, *weights, *biases), weights[0].shape[1]
        sizes = [len(weight) for weight in weights]
        table = _cpu.Linear(
            dtype, size, [_address(x) for x in weights], [_address(x) for x in biases], sizes
        )
        return CpuLinear(table, weights[0].dtype, size, sum(sizes), layers)

    def linear(self, x_TI: Tensor, layers: CpuLinear) -> Tensor:
        return self._linear(x_TI, layers, layers.dtype)

    def logits(self, x_TI: Tensor, layers: CpuLinear) -> Tensor:
        return self._linear(x_TI, layers, torch.float32)

    def _linear(self, x: Tensor, layers: CpuLinear, out_dtype: torch.dtype) -> Tensor:
        table, dtype, size, out_size, _ = layers
        rows = x.shape[0]
        if x.dtype != dtype or x.shape[1] != size:
            raise ValueError(
                f"a linear layer of {size} {dtype} values got {tuple(x.shape)} of {x.dtype}"
            )
        out = self._empty((rows, out_size), out_dtype)
        self._ops.linear(table, _address(x), rows, out.data_ptr(), out_dtype == torch.float32)
        return out

    def embed(self, input_ids_T: Tensor, table_VD: Tensor, multiplier: float = 1.0) -> Tensor:
        _require_no_gradient(table_VD)
        dtype, rows, (count, size) = (
            _require_dtype(table_VD.dtype),
            len(input_ids_T),
            table_VD.shape,
        )
        out = self._empty((rows, size), table_VD.dtype)
        ids = _address(input_ids_T, torch.int64)
        self._ops.embed(
            dtype, _address(table_VD), count, ids, rows, size, multiplier, out.data_ptr()
        )
        return out

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return self._rms_norm(x_TD, None, 1.0, weight_D, eps)[1]

    def add_rms_norm(
        self, x_TD: Tensor, update_TD: Tensor, multiplier: float, weight_D: Tensor, eps: float
    ) -> Pair:
        return self._rms_norm(x_TD, update_TD, multiplier, weight_D, eps)

    def _rms_norm(
        self, x: Tensor, update: Tensor | None, multiplier: float, weight: Tensor, eps: float
    ) -> Pair:
        dtype = _require_dtype(x.dtype, update, weight)
        size = x.shape[-1]
        total = x if update is None else self._empty(x.shape, x.dtype)
        out = self._empty(x.shape, x.dtype)
        rows, at, update_at, weight_at = (
            x.numel() // size,
            _address(x),
            _address(update),
            _address(weight),
        )
        into = total.data_ptr(), out.data_ptr()
        self._ops.rms_norm(
            dtype, at, update_at, multiplier, weight_at, rows, size, size, eps, *into
        )
        return total, out

    def rms_norm_part(self, x_TI: Tensor, start: int, weight_D: Tensor, eps: float) -> Tensor:
        dtype, (rows, width), size = _require_dtype(x_TI.dtype, weight_D), x_TI.shape, len(weight_D)
        at = _address(x_TI) + start * x_TI.element_size()
        self._ops.rms_norm(dtype, at, 0, 1.0, _address(weight_D), rows, size, width, eps, 0, at)
        return x_TI

    def rotation(self, positions_T: Tensor, inverse_R: Tensor, factor: float) -> Pair:
        rows, half = len(positions_T), len(inverse_R)
        cos, sin = (
            self._empty((rows, half), torch.float32),
            self._empty((rows, half), torch.float32),
        )
        at, inverse = _address(positions_T, torch.int64), _address(inverse_R, torch.float32)
        self._ops.rotation(at, rows, inverse, half, factor, cos.data_ptr(), sin.data_ptr())
        return cos, sin

    def rotate_and_store(
        self,
        qkv_TI: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        cache: CpuCache,
        slot_mapping_T: Tensor,
        q_norm_N: Tensor | None = None,
        k_norm_N: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        buffer, shape, kv_heads, head_dim = cache
        dtype = _require_dtype(qkv_TI.dtype, q_norm_N, k_norm_N)
        rows, size = qkv_TI.shape
        q_heads = size // head_dim - 2 * kv_heads
        out = self._empty((rows, q_heads, head_dim), qkv_TI.dtype)
        angles = _address(cos_TR, torch.float32), _address(sin_TR, torch.float32), cos_TR.shape[1]
        norms = _address(q_norm_N), _address(k_norm_N), eps
        places = _address(slot_mapping_T, torch.int64), buffer.data_ptr(), out.data_ptr()
        self._ops.rotate_and_store(
            dtype, shape, _address(qkv_TI), rows, q_heads, *angles, *norms, *places
        )
        return out

    def route(
        self,
        logits_TE: Tensor,
        config: RouterConfig,
        selection_bias_E: Tensor | None = None,
        tally: RouterTally | None = None,
    ) -> Pair:
        if config not in self._routers:
            self._routers[config] = _router_settings(config)
        rows = len(logits_TE)
        weights = self._empty((rows, config.top_k), torch.float32)
        ids = self._empty((rows, config.top_k), torch.int64)
        bias = (
            selection_bias_E.float()
            if config.selection_bias and selection_bias_E is not None
            else None
        )
        at, bias_at = _address(logits_TE, torch.float32), _address(bias)
        pairs, sums = (None, None) if tally is None else tally
        counts = _address(pairs, torch.int64), _address(sums, torch.float64)
        self._ops.route(
            self._routers[config], at, rows, bias_at, weights.data_ptr(), ids.data_ptr(), *counts
        )
        return weights, ids

    def prepare_experts(self, weights: ExpertWeights, activation: Activation) -> Any:
        if not weights.up_FD:  # of two matrices, which nothing serves: plain PyTorch
            return super().prepare_experts(weights, activation)
        _require_no_gradient(*(x for tensors in weights for x in tensors))
        width, hidden = weights.gate_FD[0].shape
        dtype = _require_dtype(
            weights.gate_FD[0].dtype, *(x for tensors in weights for x in tensors)
        )
        tables = [[_address(x) for x in tensors] for tensors in weights]
        return CpuExperts(
            _cpu.Experts(dtype, hidden, width, _ACTIVATIONS[activation], *tables), weights
        )

    def experts(
        self, x_TD: Tensor, weights_TK: Tensor | None, expert_ids_TK: Tensor | None, experts: Any
    ) -> Tensor:
        if not isinstance(experts, CpuExperts):
            return super().experts(x_TD, weights_TK, expert_ids_TK, experts)
        _require_dtype(x_TD.dtype, experts.weights.gate_FD[0])
        out = self._empty(x_TD.shape, x_TD.dtype)
        top_k = 1 if expert_ids_TK is None else expert_ids_TK.shape[1]
        routing = _address(weights_TK, torch.float32), _address(expert_ids_TK, torch.int64), top_k
        self._ops.experts(experts.table, _address(x_TD), len(x_TD), *routing, out.data_ptr())
        return out

    def add_gated(self, a_TD: Tensor, b_TD: Tensor, gate_T1: Tensor | None = None) -> Tensor:
        dtype = _require_dtype(a_TD.dtype, b_TD)
        (rows, size), gate = a_TD.shape, _address(gate_T1, torch.float32)
        out = self._empty(a_TD.shape, a_TD.dtype)
        self._ops.add_gated(dtype, _address(a_TD), _address(b_TD), gate, rows, size, out.data_ptr())
        return out

    def kv_cache_bytes_per_block(
        self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        return _cpu.CacheShape(block_size, num_kv_heads, head_dim, _DTYPES[dtype]).block_bytes

    def make_kv_cache(
        self, buffer: Tensor, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> CpuCache:
        shape = _cpu.CacheShape(block_size, num_kv_heads, head_dim, _DTYPES[dtype])
        return CpuCache(buffer, shape, num_kv_heads, head_dim)

    cache_layout = "lanes of 16 keys, pairs of values"

    def block_memory(self, cache: CpuCache, block: int) -> Sequence[Tensor]:
        size = cache.shape.block_bytes
        return (cache.buffer[block * size : (block + 1) * size],)

    def plan_attention(self, step: StepInputs, block_size: int, window: int | None = None) -> Any:
        plan = _cpu.StepAttention(window or 0)
        if self._recording:
            self._recording.plans.append((plan, step.group))
        _set_plan(plan, step)
        return plan

    def paged_attention(
        self,
        q_THN: Tensor,
        cache: CpuCache,
        plan: Any,
        scale: float,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        dtype = _require_dtype(q_THN.dtype)
        out = self._empty(q_THN.shape, q_THN.dtype)
        q, sinks, caps = _address(q_THN), _address(sinks_H, torch.float32), softcap or 0.0
        into, at = out.data_ptr(), cache.buffer.data_ptr()
        self._ops.attention(
            dtype, cache.shape, plan, len(q_THN), at, q, q_THN.shape[1], scale, caps, sinks, into
        )
        return out

    def argmax(self, logits_LV: Tensor, rows: Sequence[int] | None = None) -> list[int]:
        return self._ops.argmax(_logits(logits_LV), range(len(logits_LV)) if rows is None else rows)

    def draw(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        temperatures: Sequence[float],
        uniforms: Sequence[float],
    ) -> list[int]:
        return self._ops.draw(_logits(logits_LV), rows, temperatures, uniforms)

    def log_softmax_top_k(
        self,
        logits_LV: Tensor,
        rows: Sequence[int],
        counts: Sequence[int],
        temperatures: Sequence[float] | None = None,
    ) -> TopK:
        counts = [min(count, logits_LV.shape[1]) for count in counts]
        heats = [1.0] * len(rows) if temperatures is None else temperatures
        log_sums_R = torch.empty(len(rows), dtype=torch.float64)
        values, ids = torch.empty(sum(counts)), torch.empty(sum(counts), dtype=torch.int64)
        into = log_sums_R.data_ptr(), values.data_ptr(), ids.data_ptr()
        self._ops.log_softmax_top_k(_logits(logits_LV), rows, counts, heats, *into)
        return TopK(log_sums_R, values, ids)

    def ranks(self, logits_LV: Tensor, rows: Sequence[int], token_ids: Sequence[int]) -> list[int]:
        return self._ops.ranks(_logits(logits_LV), rows, token_ids)

    @contextmanager
    def shaped(
        self, logits_LV: Tensor, rows: Sequence[int], shapings: Sequence[Shaping]
    ) -> Iterator[None]:
        before = self._ops.shape(
            _logits(logits_LV), rows, [_shaping(shaping) for shaping in shapings]
        )
        try:
            yield
        finally:
            before.restore()


def _logits(logits_LV: Tensor) -> Any:
    return _cpu.Logits(_address(logits_LV, torch.float32), *logits_LV.shape)


def _shaping(s: Shaping) -> Any:
    return _cpu.Shaping(
        biased=list(s.bias),
        bias=list(s.bias.values()),
        seen=s.seen,
        drawn=s.drawn,
        repetition=s.repetition,
        presence=s.presence,
        frequency=s.frequency,
        banned=s.banned,
    )


def _set_plan(plan: Any, step: StepInputs) -> None:
    facts = step.query_start_host, step.seq_lens_host, step.block_table_host
    plan.set(*(x.buffer_info()[0] for x in facts), len(step.seq_lens_host), step.max_blocks)


def _router_settings(r: RouterConfig) -> Any:
    integers = (
        r.num_experts,
        r.top_k,
        _SCORES[r.score],
        _WEIGHTS[r.weight],
        r.num_groups,
        r.groups_kept,
    )
    floats = r.masked_score, r.renorm_eps, r.scale, r.logit_softcap or 0.0
    return _cpu.RouterSettings(*integers, int(r.group_score == "top2"), *floats)
