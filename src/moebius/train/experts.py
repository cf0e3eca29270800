"""Experts that are trained, on a CUDA device: by grouped products that wait for nothing.

Elsewhere, and for weights that those do not take, moebius.ops.reference.experts computes them.

Shape legend: T tokens, K choices a token, P = T * K pairs of both, sorted by expert; D hidden
size, F an expert's width, E experts.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebius.ops.config import Activation
from moebius.ops.prepared import PreparedExperts
from moebius.ops.reference import ReferenceOps
from moebius.ops.reference.choices import in_choices, to_experts
from moebius.ops.reference.experts import ReferenceExperts, inner_values
from moebius.ops.steps import ExpertWeights
from moebius.ops.triton_usable import why_not
from moebius.ops.weights import Weight

if TYPE_CHECKING:  # they import triton, which is not everywhere
    from moebius.ops.triton.grouped import Groups, Matrices
    from moebius.ops.triton.weights import Held

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class GroupedExperts(ReferenceExperts):
    """With what grouped products are told of each kind of weights: gate, up and down, then their
    biases, vectors that count as matrices of one column; None where there are none."""

    matrices: "tuple[Matrices | None, ...]"
    held: "Held"

    def is_of(self, weights: ExpertWeights) -> bool:
        same = ReferenceExperts.is_of(self, weights)
        return same and self.held.is_of(weights.tensors())


class TrainedExpertOps(ReferenceOps):
    """Reference operations, but for experts on a CUDA device.

    kernels   experts are computed by moebius.ops.triton.grouped
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.kernels = has_kernels(torch.device(device))

    def prepare_experts(
        self,
        weights: ExpertWeights,
        activation: Activation,
        dtype: torch.dtype | None = None,
        *,
        on_disk: bool = False,
    ) -> PreparedExperts:
        plain = super().prepare_experts(weights, activation, dtype, on_disk=on_disk)
        if not self.kernels or not _fits(weights):
            return plain
        from moebius.ops.triton.grouped import Matrices
        from moebius.ops.triton.weights import Held

        kinds = (_tensors(kind) for kind in weights)
        matrices = tuple(Matrices.of(kind) if kind else None for kind in kinds)
        return GroupedExperts(weights, activation, matrices, Held.of(weights.tensors()))

    def _rows(
        self, x_TD: Tensor, ids_TK: Tensor, prepared: ReferenceExperts, *, drops: bool
    ) -> Tensor:
        """Each choice's output (T, K, D); those that no expert here computes are zeros."""
        first = next(weight for weight in prepared.weights.gate_FD if weight is not None)
        ours = isinstance(first, Tensor) and first.dtype == x_TD.dtype
        if not (ours and isinstance(prepared, GroupedExperts)):
            return super()._rows(x_TD, ids_TK, prepared, drops=drops)
        from moebius.ops.triton.grouped import Groups

        k = ids_TK.shape[1]
        ids_P = ids_TK.reshape(-1)
        order_P = torch.argsort(ids_P, stable=True)
        groups = Groups.of(ids_P[order_P], len(prepared.weights.gate_FD))
        rows_PD = to_experts(x_TD, order_P, k)
        mask_PF = self.dropout_mask(rows_PD, prepared.weights.width, routed=True)
        gate, up, down, *biases = prepared.matrices
        assert gate is not None and down is not None, "only up may be missing"
        gate_PF = _product(rows_PD, groups, gate, biases[0])
        up_PF = None if up is None else _product(rows_PD, groups, up, biases[1])
        inner_PF = inner_values(gate_PF, up_PF, prepared.activation, mask_PF)
        return in_choices(_product(inner_PF, groups, down, biases[2]), order_P, k)


def has_kernels(device: torch.device) -> bool:
    """Whether kernels are for this device. Says in the log why they are not for a CUDA one."""
    if device.type != "cuda":
        return False
    reason = why_not(device)
    if reason:
        log.warning(
            "experts are computed one after the other, and each layer waits for the device: %s",
            reason,
        )
    return not reason


def _fits(weights: ExpertWeights) -> bool:
    """Whether they are plain numbers of one dtype, on a device, that kernels read in place."""
    every = [each for kind in weights for each in kind if each is not None]
    tensors = [each for each in every if isinstance(each, Tensor)]
    plain = len(tensors) == len(every) and all(each.is_contiguous() for each in tensors)
    return plain and len({each.dtype for each in tensors}) == 1 and not tensors[0].is_meta


def _tensors(kind: Sequence[Weight | None]) -> list[Tensor | None]:
    return [each if isinstance(each, Tensor) else None for each in kind]


def _product(
    x_PI: Tensor, groups: "Groups", matrices: "Matrices", columns: "Matrices | None"
) -> Tensor:
    """Each row by its expert's matrix, and its bias; rows of no expert stay zeros."""
    from moebius.ops.triton.grouped import grouped_product

    out_PO = grouped_product(x_PI, groups, matrices)
    if columns is None:
        return out_PO
    # A bias is a product with 1, whose gradient is summed in order like any other.
    columns = columns._replace(held=tuple(bias_O.unsqueeze(1) for bias_O in columns.held))
    return out_PO + grouped_product(x_PI.new_ones(len(x_PI), 1), groups, columns)
