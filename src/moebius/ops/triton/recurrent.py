"""Recurrent layers by Triton kernels: delta rules, selective state spaces, and what stands around
them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moebius.ops.capability import Operation
from moebius.ops.config import ChannelDecay, DeltaSizes, GateFunction, HeadGates, ScanSizes
from moebius.ops.prepared import StatePlan, own
from moebius.ops.reference import ReferenceOps
from moebius.ops.reference.recurrent import ReferenceStatePlan, require_state
from moebius.ops.steps import Step
from moebius.ops.transfer import send_numbers
from moebius.ops.triton.kernels import recurrent as kernels
from moebius.ops.triton.weights import DTYPES

OPERATIONS = frozenset(
    {
        Operation.CAUSAL_CONV,
        Operation.GATED_DELTA,
        Operation.KIMI_DELTA,
        Operation.SELECTIVE_SCAN,
        Operation.GATED_NORM,
        Operation.GROUPED_NORM,
        Operation.GATE_HEADS,
    }
)
# Columns of one program: of a convolution, and of a state, which has to fit in registers.
_COLUMNS = 256
_STATE_COLUMNS = 32
# Heads of one program where gates meet them.
_HEADS = 4


def _lengths(counts: Sequence[int]) -> list[int]:
    """How many rows each sequence has, longest first. counts: how many have a row at each turn."""
    lengths: list[int] = []
    for turn in range(len(counts), 0, -1):
        lengths += [turn] * (counts[turn - 1] - len(lengths))
    return lengths


@dataclass(frozen=True, slots=True, eq=False)
class TritonStatePlan(ReferenceStatePlan):
    """stops   behind the last row of each sequence (B,)"""

    stops: Tensor

    @classmethod
    def of(cls, plan: StatePlan) -> "TritonStatePlan":
        known = own(plan, ReferenceStatePlan)
        # To count on the device would be to wait for it.
        rows_B = send_numbers(_lengths(known.counts), torch.int64, known.starts.device)
        return cls(
            known.starts,
            known.slots,
            known.order,
            known.counts,
            known.sequence,
            known.starts + rows_B,
        )

    @property
    def places(self) -> Tensor:
        """Of states; where none is kept, what no kernel reads."""
        return self.starts if self.slots is None else self.slots

    def kept(self, state: Tensor | None, row: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """What kernels read and write in place; None where nothing is kept."""
        if self.slots is None:
            return None
        state = require_state(state, row, dtype)
        if not state[:1].is_contiguous():
            raise ValueError(f"a state's own numbers lie {state.stride()[1:]} apart, not in order")
        return state


class _Delta(NamedTuple):
    """What both delta rules are launched with, and what they write.

    args   the states, the sequences and the sizes, in the kernels' order
    """

    out: Tensor
    grid: tuple[int, int, int]
    args: tuple[object, ...]
    constants: dict[str, object]

    @classmethod
    def of(
        cls,
        qkv_TC: Tensor,
        decay_H: Tensor,
        state: Tensor | None,
        plan: StatePlan,
        sizes: DeltaSizes,
    ) -> "_Delta":
        planned = own(plan, TritonStatePlan)
        heads = sizes.value_heads
        kept = planned.kept(state, (heads, sizes.key_dim, sizes.value_dim), torch.float32)
        # Where none is kept, what no kernel reads.
        states = decay_H if kept is None else kept
        out = qkv_TC.new_empty((len(qkv_TC), sizes.out_size))
        args = (
            states,
            states.stride(0),
            planned.starts,
            planned.stops,
            planned.places,
            out,
            sizes.key_heads,
            heads,
            sizes.key_dim,
            sizes.value_dim,
            sizes.key_dim**-0.5,
        )
        constants = {
            "KEPT": kept is not None,
            "TILED": sizes.tiled,
            "K": triton.next_power_of_2(sizes.key_dim),
            "V": _STATE_COLUMNS,
        }
        parts = triton.cdiv(sizes.value_dim, _STATE_COLUMNS)
        return cls(out, (len(planned.starts), heads, parts), args, constants)


class RecurrentOps(ReferenceOps):
    def plan_states(self, step: Step) -> StatePlan:
        return TritonStatePlan.of(super().plan_states(step))

    def plan_documents(
        self, starts: Sequence[int], device: torch.device | str = "cpu"
    ) -> StatePlan:
        return TritonStatePlan.of(super().plan_documents(starts, device))

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
        if x_TI.dtype not in DTYPES:
            return super().causal_conv(x_TI, start, weight_CJ, state, plan, bias_C, silu=silu)
        planned = own(plan, TritonStatePlan)
        columns, taps = weight_CJ.shape
        kept = planned.kept(state, (taps - 1, columns), x_TI.dtype)
        x_TC = _columns(x_TI, start, columns)
        out = x_TI.new_empty((len(x_TI), columns))
        if not len(out):
            return out
        parts = triton.cdiv(columns, _COLUMNS)
        given = x_TC if kept is None else kept
        kernels.causal_conv[(len(out), parts)](
            x_TC,
            x_TC.stride(0),
            weight_CJ,
            weight_CJ if bias_C is None else bias_C,
            given,
            given.stride(0),
            planned.sequence,
            planned.starts,
            planned.places,
            out,
            columns,
            KEPT=kept is not None,
            BIASED=bias_C is not None,
            SILU=silu,
            TAPS=taps,
            BLOCK=_COLUMNS,
        )
        if kept is not None and taps > 1:
            kernels.keep_inputs[(len(planned.starts), parts)](
                x_TC,
                x_TC.stride(0),
                kept,
                kept.stride(0),
                planned.starts,
                planned.stops,
                planned.places,
                columns,
                TAPS=taps,
                BLOCK=_COLUMNS,
            )
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
        if not {qkv_TC.dtype, gates_TI.dtype} <= {*DTYPES}:
            return super().gated_delta(
                qkv_TC, gates_TI, start, decay_H, dt_bias_H, state, plan, sizes
            )
        launch = _Delta.of(qkv_TC, decay_H, state, plan, sizes)
        gates_TG = _columns(gates_TI, start, 2 * sizes.value_heads)
        if len(qkv_TC):
            kernels.gated_delta[launch.grid](
                qkv_TC,
                qkv_TC.stride(0),
                gates_TG,
                gates_TG.stride(0),
                decay_H,
                dt_bias_H,
                *launch.args,
                **launch.constants,
            )
        return launch.out

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
        if not {qkv_TC.dtype, beta_TI.dtype, channels_TI.dtype} <= {*DTYPES}:
            of_channels = (channels_TI, channels_start, decay_H, dt_bias_HK)
            return super().kimi_delta(
                qkv_TC, beta_TI, beta_start, *of_channels, state, plan, sizes, decay
            )
        launch = _Delta.of(qkv_TC, decay_H, state, plan, sizes)
        heads = sizes.value_heads
        beta_TH = _columns(beta_TI, beta_start, heads)
        channels = _columns(channels_TI, channels_start, heads * sizes.key_dim)
        if len(qkv_TC):
            kernels.kimi_delta[launch.grid](
                qkv_TC,
                qkv_TC.stride(0),
                beta_TH,
                beta_TH.stride(0),
                channels,
                channels.stride(0),
                decay_H,
                dt_bias_HK.contiguous(),
                *launch.args,
                decay.lower or 0.0,
                BOUNDED=decay.lower is not None,
                ROUNDED=decay.rounded,
                **launch.constants,
            )
        return launch.out

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
        if xbc_TC.dtype not in DTYPES or dt_TI.dtype != xbc_TC.dtype:
            return super().selective_scan(
                xbc_TC, dt_TI, start, decay_H, dt_bias_H, skip_H, state, plan, sizes
            )
        planned = own(plan, TritonStatePlan)
        row = (sizes.heads, sizes.state_dim, sizes.head_dim)
        kept = planned.kept(state, row, torch.float32)
        steps_TH = _columns(dt_TI, start, sizes.heads)
        out = xbc_TC.new_empty((len(xbc_TC), sizes.out_size))
        given = decay_H if kept is None else kept
        if len(out):
            parts = triton.cdiv(sizes.head_dim, _STATE_COLUMNS)
            kernels.selective_scan[(len(planned.starts), sizes.heads, parts)](
                xbc_TC,
                xbc_TC.stride(0),
                steps_TH,
                steps_TH.stride(0),
                decay_H,
                dt_bias_H,
                skip_H,
                given,
                given.stride(0),
                planned.starts,
                planned.stops,
                planned.places,
                out,
                sizes.heads,
                sizes.groups,
                sizes.head_dim,
                sizes.state_dim,
                KEPT=kept is not None,
                M=triton.next_power_of_2(sizes.state_dim),
                P=_STATE_COLUMNS,
            )
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
        if not {x_TI.dtype, gate_TI.dtype} <= {*DTYPES}:
            return super().gated_norm(x_TI, gate_TI, start, weight_N, eps, gate)
        rows, width = x_TI.shape
        size = len(weight_N)
        heads, rest = divmod(width, size)
        if rest:
            raise ValueError(f"{width} columns are no heads of {size}, as the weight has")
        gates = _columns(gate_TI, start, width)
        out = torch.empty_like(x_TI)
        if rows:
            kernels.gated_norm[(rows, heads)](
                x_TI,
                gates,
                gates.stride(0),
                weight_N,
                out,
                heads,
                size,
                eps,
                WEIGHT_WIDE=weight_N.dtype == torch.float32,
                GATE=gate,
                BLOCK=triton.next_power_of_2(size),
            )
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
        if not {x_TI.dtype, gate_TI.dtype} <= {*DTYPES}:
            return super().grouped_norm(x_TI, gate_TI, start, weight_I, eps, groups)
        rows, width = x_TI.shape
        size, rest = divmod(width, groups)
        if rest or len(weight_I) != width:
            raise ValueError(
                f"{width} columns are no {groups} groups, or have no weight of {len(weight_I)}"
            )
        gates = _columns(gate_TI, start, width)
        out = torch.empty_like(x_TI)
        block = triton.next_power_of_2(size)
        if rows:
            kernels.grouped_norm[(rows, groups)](
                x_TI,
                gates,
                gates.stride(0),
                weight_I,
                out,
                groups,
                size,
                eps,
                WEIGHT_WIDE=weight_I.dtype == torch.float32,
                BLOCK=block,
                num_warps=8 if block > 2048 else 4,
            )
        return out

    def gate_heads(self, x_THN: Tensor, gates_TI: Tensor, at: HeadGates) -> Tensor:
        if not {x_THN.dtype, gates_TI.dtype} <= {*DTYPES}:
            return super().gate_heads(x_THN, gates_TI, at)
        rows, heads, size = x_THN.shape
        last = at.start + at.stride * (heads - 1)
        gates = _columns(gates_TI, at.start, last + (1 if at.single else size) - at.start)
        if x_THN.stride(2) != 1:
            x_THN = x_THN.contiguous()
        out = x_THN.new_empty(x_THN.shape)
        if out.numel():
            kernels.gate_heads[(rows, triton.cdiv(heads, _HEADS))](
                x_THN,
                x_THN.stride(0),
                x_THN.stride(1),
                gates,
                gates.stride(0),
                out,
                heads,
                size,
                at.stride,
                SINGLE=at.single,
                GATE=at.function,
                HEADS=_HEADS,
                BLOCK=triton.next_power_of_2(size),
            )
        return out


def _columns(x_TI: Tensor, start: int, count: int) -> Tensor:
    """So many columns of x from `start`. Raises ValueError where they are not all there."""
    if not 0 <= start <= x_TI.shape[1] - count:
        raise ValueError(f"{count} columns from {start} are not all of {x_TI.shape[1]}")
    return x_TI[:, start : start + count]
