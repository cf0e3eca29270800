"""Recurrent layers by the CPU's kernels (csrc/recurrent.h)."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.capability import Operation
from moebius.ops.config import ChannelDecay, DeltaSizes, GateFunction, HeadGates, ScanSizes
from moebius.ops.cpu.base import (
    DTYPES,
    CpuBase,
    check_shape,
    norm_dtype,
    require_dtype,
    require_no_gradient,
)
from moebius.ops.prepared import StatePlan, own
from moebius.ops.reference.recurrent import require_states
from moebius.ops.steps import Step, StepInputs

# As csrc/kernels.h numbers them.
_GATES: dict[GateFunction, int] = {"silu": 0, "sigmoid": 1, "softplus": 2, "identity": 3}


@dataclass(frozen=True, slots=True, eq=False)
class CpuStatePlan(StatePlan):
    """A step's sequences and their states' slots, copied to where the kernels read them."""

    step: _cpu.StepStates

    def set(self, step: StepInputs) -> None:
        require_states(step)
        slots = None if step.states is None else array("i", step.states.slots)
        self.set_rows(step.query_start_host, slots)

    def set_rows(self, starts: "array[int]", slots: "array[int] | None") -> None:
        """starts (B + 1,) and slots (B,): int32."""
        at, length = starts.buffer_info()
        if slots is not None and len(slots) != length - 1:
            raise ValueError(f"{len(slots)} slots of states for {length - 1} sequences")
        own_slots = 0 if slots is None else slots.buffer_info()[0]
        self.step.set(query_start=at, slots=own_slots, batch=length - 1, kept=slots is not None)


class RecurrentOps(CpuBase):
    """Every operation of the interface, in bfloat16 and float32."""

    def plan_states(self, step: Step) -> StatePlan:
        plan = CpuStatePlan(_cpu.StepStates())
        if self._recorder is not None:
            self._recorder.plans.append((plan, step.group))
        else:
            plan.set(own(step, StepInputs))
        return plan

    def plan_documents(
        self, starts: Sequence[int], device: torch.device | str = "cpu"
    ) -> StatePlan:
        plan = CpuStatePlan(_cpu.StepStates())
        plan.set_rows(array("i", starts), None)
        return plan

    def causal_conv(
        self,
        x_TI: Tensor,
        start: int,
        weight_CJ: Tensor,
        state: Tensor | None,
        plan: StatePlan,
        bias_C: Tensor | None = None,
        *,
        silu: bool = True,
    ) -> Tensor:
        planned = own(plan, CpuStatePlan)
        require_no_gradient(x_TI, weight_CJ)
        channels, taps = weight_CJ.shape
        _check_columns(x_TI, start, channels)
        check_shape("a convolution's bias", bias_C, channels)
        slots = _slots(state, (taps - 1, channels), x_TI.dtype)
        out = self._empty(x_TI, (channels,), x_TI.dtype)
        call = _cpu.CausalConv(
            dtype=require_dtype(x_TI.dtype),
            step=planned.step,
            x=self._at(x_TI) + start * x_TI.element_size(),
            stride=x_TI.shape[1],
            channels=channels,
            taps=taps,
            weight=self._at(weight_CJ),
            weight_dtype=require_dtype(weight_CJ.dtype),
            bias=self._at(bias_C),
            bias_dtype=DTYPES[torch.float32] if bias_C is None else require_dtype(bias_C.dtype),
            state=self._at(state),
            slots=slots,
            silu=silu,
            out=self._at(out),
        )
        self._run(Operation.CAUSAL_CONV, call, x_TI, len(x_TI), planned)
        return out

    def gated_delta(
        self,
        qkv_TC: Tensor,
        gates_TI: Tensor,
        start: int,
        decay_H: Tensor,
        dt_bias_H: Tensor,
        state: Tensor | None,
        plan: StatePlan,
        sizes: DeltaSizes,
    ) -> Tensor:
        planned = own(plan, CpuStatePlan)
        require_no_gradient(qkv_TC, gates_TI)
        rows = len(qkv_TC)
        heads = sizes.value_heads
        check_shape("queries, keys and values", qkv_TC, rows, sizes.qkv_size)
        check_shape("a step's gates", gates_TI, rows, gates_TI.shape[1])
        _check_columns(gates_TI, start, 2 * heads)
        check_shape("decays", decay_H, heads)
        check_shape("what is added to time steps", dt_bias_H, heads)
        out = self._empty(qkv_TC, (sizes.out_size,), qkv_TC.dtype)
        call = _cpu.GatedDelta(
            dtype=require_dtype(qkv_TC.dtype, gates_TI),
            gates=self._at(gates_TI) + start * gates_TI.element_size(),
            gates_stride=gates_TI.shape[1],
            decay=self._at(decay_H, torch.float32),
            dt_bias=self._at(dt_bias_H, torch.float32),
            out=self._at(out),
            **self._delta(qkv_TC, state, planned, sizes),
        )
        self._run(Operation.GATED_DELTA, call, qkv_TC, rows, planned)
        return out

    def kimi_delta(
        self,
        qkv_TC: Tensor,
        beta_TI: Tensor,
        beta_start: int,
        channels_TI: Tensor,
        channels_start: int,
        decay_H: Tensor,
        dt_bias_HK: Tensor,
        state: Tensor | None,
        plan: StatePlan,
        sizes: DeltaSizes,
        decay: ChannelDecay,
    ) -> Tensor:
        planned = own(plan, CpuStatePlan)
        require_no_gradient(qkv_TC, beta_TI, channels_TI)
        rows = len(qkv_TC)
        heads = sizes.value_heads
        check_shape("queries, keys and values", qkv_TC, rows, sizes.qkv_size)
        check_shape("betas", beta_TI, rows, beta_TI.shape[1])
        check_shape("decays of channels", channels_TI, rows, channels_TI.shape[1])
        _check_columns(beta_TI, beta_start, heads)
        _check_columns(channels_TI, channels_start, heads * sizes.key_dim)
        check_shape("decays", decay_H, heads)
        check_shape("what is added to decays", dt_bias_HK, heads, sizes.key_dim)
        out = self._empty(qkv_TC, (sizes.out_size,), qkv_TC.dtype)
        call = _cpu.GatedDelta(
            dtype=require_dtype(qkv_TC.dtype, beta_TI, channels_TI),
            gates=self._at(beta_TI) + beta_start * beta_TI.element_size(),
            gates_stride=beta_TI.shape[1],
            decay=self._at(decay_H, torch.float32),
            dt_bias=self._at(dt_bias_HK, torch.float32),
            out=self._at(out),
            channels=self._at(channels_TI) + channels_start * channels_TI.element_size(),
            channels_stride=channels_TI.shape[1],
            lower=decay.lower or 0.0,
            rounded=decay.rounded,
            **self._delta(qkv_TC, state, planned, sizes),
        )
        self._run(Operation.KIMI_DELTA, call, qkv_TC, rows, planned)
        return out

    def _delta(
        self, qkv_TC: Tensor, state: Tensor | None, planned: CpuStatePlan, sizes: DeltaSizes
    ) -> dict[str, Any]:
        """What a kernel of the delta rule is told, however its states decay."""
        shape = (sizes.value_heads, sizes.key_dim, sizes.value_dim)
        slots = _slots(state, shape, torch.float32)
        return {
            "step": planned.step,
            "key_heads": sizes.key_heads,
            "value_heads": sizes.value_heads,
            "key_dim": sizes.key_dim,
            "value_dim": sizes.value_dim,
            "tiled": sizes.tiled,
            "qkv": self._at(qkv_TC),
            "state": self._at(state),
            "slots": slots,
        }

    def selective_scan(
        self,
        xbc_TC: Tensor,
        dt_TI: Tensor,
        start: int,
        decay_H: Tensor,
        dt_bias_H: Tensor,
        skip_H: Tensor,
        state: Tensor | None,
        plan: StatePlan,
        sizes: ScanSizes,
    ) -> Tensor:
        planned = own(plan, CpuStatePlan)
        require_no_gradient(xbc_TC, dt_TI)
        rows = len(xbc_TC)
        check_shape("a selective state space's rows", xbc_TC, rows, sizes.xbc_size)
        check_shape("time steps", dt_TI, rows, dt_TI.shape[1])
        _check_columns(dt_TI, start, sizes.heads)
        for what, vector in (("decays", decay_H), ("biases", dt_bias_H), ("skips", skip_H)):
            check_shape(f"{what} of heads", vector, sizes.heads)
        slots = _slots(state, (sizes.heads, sizes.state_dim, sizes.head_dim), torch.float32)
        out = self._empty(xbc_TC, (sizes.out_size,), xbc_TC.dtype)
        call = _cpu.SelectiveScan(
            dtype=require_dtype(xbc_TC.dtype, dt_TI),
            step=planned.step,
            heads=sizes.heads,
            head_dim=sizes.head_dim,
            state_dim=sizes.state_dim,
            groups=sizes.groups,
            xbc=self._at(xbc_TC),
            dt=self._at(dt_TI) + start * dt_TI.element_size(),
            dt_stride=dt_TI.shape[1],
            decay=self._at(decay_H, torch.float32),
            dt_bias=self._at(dt_bias_H, torch.float32),
            skip=self._at(skip_H, torch.float32),
            state=self._at(state),
            slots=slots,
            out=self._at(out),
        )
        self._run(Operation.SELECTIVE_SCAN, call, xbc_TC, rows, planned)
        return out

    def gated_norm(
        self,
        x_TI: Tensor,
        gate_TI: Tensor,
        start: int,
        weight_N: Tensor,
        eps: float,
        gate: GateFunction = "silu",
    ) -> Tensor:
        rows, width = x_TI.shape
        heads, rest = divmod(width, len(weight_N))
        if rest:
            raise ValueError(f"{width} columns are no heads of {len(weight_N)}, as the weight has")
        check_shape("gates", gate_TI, rows, gate_TI.shape[1])
        _check_columns(gate_TI, start, width)
        out = self._empty(x_TI, (width,), x_TI.dtype)
        call = _cpu.GatedNorm(
            dtype=require_dtype(x_TI.dtype, gate_TI),
            x=self._at(x_TI),
            gates=self._at(gate_TI) + start * gate_TI.element_size(),
            gates_stride=gate_TI.shape[1],
            weight=self._at(weight_N),
            weight_dtype=norm_dtype(x_TI.dtype, weight_N),
            eps=eps,
            heads=heads,
            size=len(weight_N),
            function=_GATES[gate],
            out=self._at(out),
        )
        self._run(Operation.GATED_NORM, call, x_TI, rows)
        return out

    def grouped_norm(
        self,
        x_TI: Tensor,
        gate_TI: Tensor,
        start: int,
        weight_I: Tensor,
        eps: float,
        groups: int,
    ) -> Tensor:
        rows, width = x_TI.shape
        size, rest = divmod(width, groups)
        if rest:
            raise ValueError(f"{width} columns are no {groups} groups")
        check_shape("a norm's weight", weight_I, width)
        check_shape("gates", gate_TI, rows, gate_TI.shape[1])
        _check_columns(gate_TI, start, width)
        out = self._empty(x_TI, (width,), x_TI.dtype)
        call = _cpu.GroupedNorm(
            dtype=require_dtype(x_TI.dtype, gate_TI),
            x=self._at(x_TI),
            gates=self._at(gate_TI) + start * gate_TI.element_size(),
            gates_stride=gate_TI.shape[1],
            weight=self._at(weight_I),
            weight_dtype=norm_dtype(x_TI.dtype, weight_I),
            eps=eps,
            groups=groups,
            size=size,
            out=self._at(out),
        )
        self._run(Operation.GROUPED_NORM, call, x_TI, rows)
        return out

    def gate_heads(self, x_THN: Tensor, gates_TI: Tensor, at: HeadGates) -> Tensor:
        rows, heads, size = x_THN.shape
        check_shape("gates", gates_TI, rows, gates_TI.shape[1])
        width = 1 if at.single else size
        if at.stride < 0:
            raise ValueError(f"gates of heads are {at.stride} columns apart")
        _check_columns(gates_TI, at.start, (heads - 1) * at.stride + width)
        out = self._empty(x_THN, (heads, size), x_THN.dtype)
        call = _cpu.GateHeads(
            dtype=require_dtype(x_THN.dtype, gates_TI),
            x=self._at(x_THN),
            heads=heads,
            size=size,
            gates=self._at(gates_TI) + at.start * gates_TI.element_size(),
            gates_stride=gates_TI.shape[1],
            head_stride=at.stride,
            single=at.single,
            function=_GATES[at.function],
            out=self._at(out),
        )
        self._run(Operation.GATE_HEADS, call, x_THN, rows)
        return out


def _check_columns(x: Tensor, start: int, count: int) -> None:
    """Raises ValueError for columns that x has not."""
    if not 0 <= start <= x.shape[1] - count:
        raise ValueError(f"{count} columns from {start} are not all of {x.shape[1]}")


def _slots(state: Tensor | None, row: tuple[int, ...], dtype: torch.dtype) -> int:
    """How many states there are. Raises ValueError for others than `row` of `dtype`."""
    if state is None:
        return 0
    if state.shape[1:] != row or state.dtype != dtype:
        raise ValueError(
            f"states are {tuple(state.shape[1:])} in {state.dtype}; they must be {row} in {dtype}"
        )
    return len(state)
