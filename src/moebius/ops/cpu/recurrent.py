"""Recurrent operations: plain PyTorch's, until the kernels are there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.ops.config import DeltaSizes, GateFunction, HeadGates
from moebius.ops.cpu.base import CpuBase
from moebius.ops.prepared import StatePlan
from moebius.ops.steps import Step


class RecurrentOps(CpuBase):
    def plan_states(self, step: Step) -> StatePlan:
        if self._recorder is not None:
            raise self._recorder.refuse("recurrent operations are not recorded")
        return self._fallback.plan_states(step)

    def plan_documents(
        self, starts: Sequence[int], device: torch.device | str = "cpu"
    ) -> StatePlan:
        return self._fallback.plan_documents(starts, device)

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
        return self._fallback.causal_conv(x_TI, start, weight_CJ, state, plan, bias_C, silu=silu)

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
        return self._fallback.gated_delta(
            qkv_TC, gates_TI, start, decay_H, dt_bias_H, state, plan, sizes
        )

    def gated_norm(
        self,
        x_TI: Tensor,
        gate_TI: Tensor,
        start: int,
        weight_N: Tensor,
        eps: float,
        gate: GateFunction = "silu",
    ) -> Tensor:
        return self._fallback.gated_norm(x_TI, gate_TI, start, weight_N, eps, gate)

    def gate_heads(self, x_THN: Tensor, gates_TI: Tensor, at: HeadGates) -> Tensor:
        return self._fallback.gate_heads(x_THN, gates_TI, at)
