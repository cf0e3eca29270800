"""Routers and experts by the CPU's kernels."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.config import Activation, RouterConfig
from moebius.ops.cpu.base import (
    CpuBase,
    Held,
    address,
    common_dtype,
    native_matrix,
    require_dtype,
    require_no_gradient,
)
from moebius.ops.prepared import PreparedExperts, own
from moebius.ops.reference.experts import ReferenceExperts
from moebius.ops.steps import ExpertWeights, Pair, RouterTally

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_SCORES = {"softmax": 0, "sigmoid": 1, "logits": 2}
_WEIGHTS = {"raw": 0, "renorm": 1, "softmax": 2, "sigmoid": 3}


@dataclass(frozen=True, slots=True, eq=False)
class CpuExperts(PreparedExperts):
    """One layer's experts: a table of addresses, and what lies there."""

    table: _cpu.Experts
    dtype: torch.dtype
    held: Held

    def is_of(self, weights: ExpertWeights) -> bool:
        return self.held.is_of(weights.tensors())


class ExpertOps(CpuBase):
    """Experts of two matrices, which nothing serves, are left to the reference."""

    def route(
        self,
        logits_TE: Tensor,
        config: RouterConfig,
        selection_bias_E: Tensor | None = None,
        tally: RouterTally | None = None,
    ) -> Pair:
        rows = len(logits_TE)
        weights = self._empty((rows, config.top_k), torch.float32)
        ids = self._empty((rows, config.top_k), torch.int64)
        bias = (
            selection_bias_E.float()
            if config.selection_bias and selection_bias_E is not None
            else None
        )
        at, bias_at = address(logits_TE, torch.float32), address(bias)
        pairs, sums = (None, None) if tally is None else tally
        counts = address(pairs, torch.int64), address(sums, torch.float64)
        self._native.route(
            _router_settings(config), at, rows, bias_at, weights.data_ptr(), ids.data_ptr(), *counts
        )
        return weights, ids

    def prepare_experts(
        self, weights: ExpertWeights, activation: Activation, dtype: torch.dtype | None = None
    ) -> PreparedExperts:
        if not weights.up_FD:
            return self._fallback.prepare_experts(weights, activation, dtype)
        tensors = weights.tensors()
        require_no_gradient(*tensors)
        kinds = (weights.gate_FD, weights.up_FD, weights.down_DF)
        biases = (weights.gate_bias_F, weights.up_bias_F, weights.down_bias_D)
        dtype = dtype or common_dtype(weight for kind in kinds for weight in kind)
        number = require_dtype(dtype, *(bias for kind in biases for bias in kind))
        gate, up, down = ([native_matrix(weight, dtype) for weight in kind] for kind in kinds)
        gate_bias, up_bias, down_bias = ([address(bias) for bias in kind] for kind in biases)
        width, hidden = weights.gate_FD[0].shape
        table = _cpu.Experts(
            number,
            hidden,
            width,
            _ACTIVATIONS[activation],
            gate,
            up,
            down,
            gate_bias,
            up_bias,
            down_bias,
        )
        return CpuExperts(table, dtype, Held(tensors))

    def experts(
        self,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        expert_ids_TK: Tensor | None,
        experts: PreparedExperts,
    ) -> Tensor:
        if isinstance(experts, ReferenceExperts):
            return self._fallback.experts(x_TD, weights_TK, expert_ids_TK, experts)
        prepared = own(experts, CpuExperts)
        if x_TD.dtype != prepared.dtype:
            raise ValueError(
                f"the CPU kernels want one dtype, not {x_TD.dtype} and {prepared.dtype}"
            )
        out = self._empty(x_TD.shape, x_TD.dtype)
        top_k = 1 if expert_ids_TK is None else expert_ids_TK.shape[1]
        routing = (address(weights_TK, torch.float32), address(expert_ids_TK, torch.int64), top_k)
        self._native.experts(prepared.table, address(x_TD), len(x_TD), *routing, out.data_ptr())
        return out


@cache
def _router_settings(r: RouterConfig) -> _cpu.RouterSettings:
    return _cpu.RouterSettings(
        r.num_experts,
        r.top_k,
        _SCORES[r.score],
        _WEIGHTS[r.weight],
        r.num_groups,
        r.groups_kept,
        int(r.group_score == "top2"),
        r.masked_score,
        r.renorm_eps,
        r.scale,
        r.logit_softcap or 0.0,
    )
