"""Routers and experts by the CPU's kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.capability import Feature, Operation
from moebius.ops.config import Activation, ClampedSwiGLU, RouterConfig
from moebius.ops.cpu.base import (
    FORMATS,
    CpuBase,
    Held,
    address,
    check_shape,
    common_dtype,
    native_matrix,
    require_dtype,
    require_no_gradient,
)
from moebius.ops.cpu.recurrent import CpuStatePlan
from moebius.ops.formats import dtype_name
from moebius.ops.prepared import PreparedExperts, StatePlan, own
from moebius.ops.steps import ExpertWeights, Pair, RouterTally
from moebius.ops.weights import Matrix, Weight

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 5}
_CLAMPED_SWIGLU = 4
_SCORES = {"softmax": 0, "sigmoid": 1, "logits": 2}
_WEIGHTS = {"raw": 0, "renorm": 1, "softmax": 2, "sigmoid": 3}


@dataclass(slots=True, eq=False)
class CpuExperts(PreparedExperts):
    """One layer's experts: a table of addresses, and what lies there."""

    table: _cpu.Experts
    dtype: torch.dtype
    hidden: int
    width: int
    held: Held
    features: frozenset[Feature] = frozenset()

    def is_of(self, weights: ExpertWeights) -> bool:
        return self.held.is_of(weights.tensors())

    def become(self, other: PreparedExperts) -> bool:
        made = own(other, CpuExperts)
        if made.dtype != self.dtype:
            return False
        self.table.assign(made.table)
        self.held = made.held
        return True


class ExpertOps(CpuBase):
    """Every operation of the interface, in bfloat16 and float32."""

    def route(
        self,
        logits_TE: Tensor,
        config: RouterConfig,
        selection_bias_E: Tensor | None = None,
        tally: RouterTally | None = None,
        expert_scale_E: Tensor | None = None,
    ) -> Pair:
        check_shape("a router's logits", logits_TE, len(logits_TE), config.num_experts)
        check_shape("a scale of experts", expert_scale_E, config.num_experts)
        weights = self._empty(logits_TE, (config.top_k,), torch.float32)
        ids = self._empty(logits_TE, (config.top_k,), torch.int64)
        bias = selection_bias_E if config.selection_bias else None
        if config.selection_bias and bias is None:
            raise ValueError("this router chooses with a selection bias, and none is given")
        check_shape("a selection bias", bias, config.num_experts)
        if tally is not None:
            check_shape("a tally", tally.pairs_E, config.num_experts)
            check_shape("a tally's sums", tally.sums, 2)
        settings = _router_settings(config)
        call = _cpu.Route(
            settings=settings,
            logits=self._at(logits_TE, torch.float32),
            bias=self._at(bias, torch.float32),
            weights=self._at(weights),
            ids=self._at(ids),
            pairs=self._at(None if tally is None else tally.pairs_E, torch.int64),
            sums=self._at(None if tally is None else tally.sums, torch.float64),
            expert_scale=self._at(expert_scale_E, torch.float32),
        )
        self._run(Operation.ROUTE, call, logits_TE, len(logits_TE), settings)
        return weights, ids

    def within_capacity(
        self,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        num_experts: int,
        capacity: int,
        plan: StatePlan,
    ) -> Tensor:
        planned = own(plan, CpuStatePlan)
        rows, top_k = expert_ids_TK.shape
        check_shape("weights of experts", weights_TK, rows, top_k)
        out = self._empty(weights_TK, (top_k,), torch.float32)
        call = _cpu.WithinCapacity(
            step=planned.step,
            weights=self._at(weights_TK, torch.float32),
            ids=self._at(expert_ids_TK, torch.int64),
            top_k=top_k,
            experts=num_experts,
            capacity=capacity,
            out=self._at(out),
        )
        self._run(Operation.WITHIN_CAPACITY, call, weights_TK, rows, planned)
        return out

    def prepare_experts(
        self,
        weights: ExpertWeights,
        activation: Activation,
        dtype: torch.dtype | None = None,
        *,
        on_disk: bool = False,
    ) -> PreparedExperts:
        if isinstance(activation, ClampedSwiGLU) and not weights.up_FD:
            raise ValueError("ClampedSwiGLU joins two matrices, and these experts have only a gate")
        tensors = weights.tensors()
        with self._looking_at(tensors):
            return self._prepared(weights, activation, dtype, tensors, on_disk=on_disk)

    def _prepared(
        self,
        weights: ExpertWeights,
        activation: Activation,
        dtype: torch.dtype | None,
        tensors: Sequence[Tensor | None],
        *,
        on_disk: bool,
    ) -> PreparedExperts:
        require_no_gradient(*tensors)
        kinds = (weights.gate_FD, weights.up_FD, weights.down_DF)
        biases = (weights.gate_bias_F, weights.up_bias_F, weights.down_bias_D)
        held = [weight for kind in kinds for weight in kind if weight is not None]
        if not held:
            raise ValueError("none of a layer's experts is held here; a rank needs at least one")
        dtype = dtype or common_dtype(held)
        number = require_dtype(dtype, *(bias for kind in biases for bias in kind))
        width, hidden = held[0].shape
        _check_biases(weights, hidden, width)
        shape = (width, hidden)
        gate: Sequence[Weight | None] = weights.gate_FD
        up: Sequence[Weight | None] = weights.up_FD
        interleaved = any(map(_take_turns, gate, up))
        if interleaved:
            shape = (2 * width, hidden)
            gate = list(map(_both, gate, up))
            up = []
        table = _cpu.Experts(
            dtype=number,
            hidden=hidden,
            width=width,
            **_activation(activation),
            gate=_matrices(gate, shape, dtype),
            up=_matrices(up, shape, dtype),
            down=_matrices(weights.down_DF, (hidden, width), dtype),
            gate_bias=[address(bias) for bias in weights.gate_bias_F],
            up_bias=[address(bias) for bias in weights.up_bias_F],
            down_bias=[address(bias) for bias in weights.down_bias_D],
            on_disk=on_disk,
            interleaved=interleaved,
        )
        features = frozenset(() if weights.up_FD else {Feature.TWO_MATRICES})
        return CpuExperts(table, dtype, hidden, width, Held(tensors), features)

    def experts(
        self,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        expert_ids_TK: Tensor | None,
        experts: PreparedExperts,
    ) -> Tensor:
        prepared = _own(experts, x_TD)
        top_k = 1
        if weights_TK is not None and expert_ids_TK is not None:
            top_k = expert_ids_TK.shape[1]
            check_shape("ids of experts", expert_ids_TK, len(x_TD), top_k)
            check_shape("weights of experts", weights_TK, len(x_TD), top_k)
        elif weights_TK is not expert_ids_TK:
            raise ValueError("of weights and ids of experts there are both or neither")
        out = self._empty(x_TD, (prepared.hidden,), x_TD.dtype)
        inner = self._empty(x_TD, (top_k, prepared.width), x_TD.dtype)
        outer = None
        if expert_ids_TK is not None:
            outer = self._empty(x_TD, (top_k, prepared.hidden), x_TD.dtype)
        call = _cpu.ExpertsCall(
            experts=prepared.table,
            x=self._at(x_TD),
            weights=self._at(weights_TK, torch.float32),
            ids=self._at(expert_ids_TK, torch.int64),
            top_k=top_k,
            inner=self._at(inner),
            outer=self._at(outer),
            out=self._at(out),
        )
        use = Operation.EXPERTS
        self._run(use, call, x_TD, len(x_TD), prepared, features=prepared.features)
        return out

    def expert_rows(self, x_RD: Tensor, expert_ids_RK: Tensor, experts: PreparedExperts) -> Tensor:
        prepared = _own(experts, x_RD)
        top_k = expert_ids_RK.shape[1]
        check_shape("ids of experts", expert_ids_RK, len(x_RD), top_k)
        out = self._empty(x_RD, (top_k, *x_RD.shape[1:]), x_RD.dtype)
        inner = self._empty(x_RD, (top_k, prepared.width), x_RD.dtype)
        call = _cpu.ExpertRows(
            experts=prepared.table,
            x=self._at(x_RD),
            ids=self._at(expert_ids_RK, torch.int64),
            top_k=top_k,
            inner=self._at(inner),
            out=self._at(out),
        )
        use = Operation.EXPERT_ROWS
        self._run(use, call, x_RD, len(x_RD), prepared, features=prepared.features)
        return out

    def combine(self, x_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        rows, top_k, size = x_TKD.shape
        check_shape("weights of experts", weights_TK, rows, top_k)
        out = self._empty(x_TKD, (size,), x_TKD.dtype)
        call = _cpu.Combine(
            dtype=require_dtype(x_TKD.dtype),
            x=self._at(x_TKD),
            weights=self._at(weights_TK, torch.float32),
            top_k=top_k,
            size=size,
            out=self._at(out),
        )
        self._run(Operation.COMBINE, call, x_TKD, rows)
        return out


def _own(experts: PreparedExperts, x: Tensor) -> CpuExperts:
    """This backend's experts, for rows of x's dtype. Raises ValueError for those of another."""
    prepared = own(experts, CpuExperts)
    if x.dtype != prepared.dtype:
        raise ValueError(f"the CPU kernels want one dtype, not {x.dtype} and {prepared.dtype}")
    check_shape("rows for experts", x, len(x), prepared.hidden)
    return prepared


def _activation(activation: Activation) -> dict[str, Any]:
    """What the kernels are told of it."""
    if isinstance(activation, ClampedSwiGLU):
        numbers = {"alpha": activation.alpha, "limit": activation.limit}
        return {"activation": _CLAMPED_SWIGLU, **numbers}
    return {"activation": _ACTIVATIONS[activation]}


def _matrices(
    weights: Sequence[Weight | None], shape: tuple[int, int], dtype: torch.dtype
) -> list[_cpu.Matrix]:
    """Each weight where it lies; a hole's lies nowhere."""
    rows, columns = shape
    hole = _cpu.Matrix(format=FORMATS[dtype_name(dtype)], rows=rows, columns=columns, data=0)
    return [hole if weight is None else native_matrix(weight, dtype) for weight in weights]


def _take_turns(gate: Weight | None, up: Weight | None) -> bool:
    """Whether rows of both lie in turn, from one of gate's on."""
    if not (isinstance(gate, Matrix) and isinstance(up, Matrix)):
        return False
    return all(
        first.shape == second.shape
        and first.stride() == second.stride() == (2 * first.shape[1], 1)
        and second.data_ptr() - first.data_ptr() == first.shape[1] * first.itemsize
        for first, second in zip(gate.planes, up.planes, strict=True)
    )


def _both(gate: Weight | None, up: Weight | None) -> Matrix | None:
    """The matrix of both, whose rows take turns; None for a hole."""
    if gate is None and up is None:
        return None
    if not (isinstance(gate, Matrix) and _take_turns(gate, up)):
        raise ValueError("rows of gate and up take turns in some experts of a layer, not in all")
    rows, columns = gate.shape
    planes = []
    for plane in gate.planes:
        size = plane.shape[1]
        planes.append(plane.as_strided((2 * rows, size), (size, 1), plane.storage_offset()))
    return Matrix(gate.format, (2 * rows, columns), tuple(planes))


def _check_biases(weights: ExpertWeights, hidden: int, width: int) -> None:
    """Raises ValueError for a bias of another size."""
    for bias in (*weights.gate_bias_F, *weights.up_bias_F):
        check_shape("an expert's bias", bias, width)
    for bias in weights.down_bias_D:
        check_shape("an expert's bias", bias, hidden)


@cache
def _router_settings(r: RouterConfig) -> _cpu.RouterSettings:
    return _cpu.RouterSettings(
        num_experts=r.num_experts,
        top_k=r.top_k,
        score=_SCORES[r.score],
        weight=_WEIGHTS[r.weight],
        num_groups=r.num_groups,
        groups_kept=r.groups_kept,
        group_top2=int(r.group_score == "top2"),
        group_fill=r.masked_score,
        renorm_eps=r.renorm_eps,
        scale=r.scale,
        softcap=r.logit_softcap or 0.0,
        renorm_least=r.renorm_least,
    )
