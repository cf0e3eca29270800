"""Norms, rotation and residuals by Triton kernels."""

import torch
import triton
from torch import Tensor

from moebius.ops.capability import Operation
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Pair
from moebius.ops.triton.kernels import pointwise as kernels

OPERATIONS = frozenset({Operation.RMS_NORM, Operation.ADD_RMS_NORM})


class PointwiseOps(ReferenceOps):
    def rms_norm(
        self, x_TD: Tensor, weight_D: Tensor, eps: float, *, less_mean: bool = False
    ) -> Tensor:
        size = x_TD.shape[-1]
        x = x_TD.reshape(-1, size)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if len(x):
            kernels.rms_norm[(len(x),)](
                x,
                x.stride(0),
                weight_D,
                out,
                size,
                eps,
                WEIGHT_WIDE=weight_D.dtype == torch.float32,
                LESS_MEAN=less_mean,
                BLOCK=triton.next_power_of_2(size),
            )
        return out.view(x_TD.shape)

    def add_rms_norm(
        self,
        x_TD: Tensor,
        update_TD: Tensor,
        multiplier: float,
        weight_D: Tensor,
        eps: float,
        *,
        less_mean: bool = False,
        scale_1: Tensor | None = None,
    ) -> Pair:
        size = x_TD.shape[-1]
        stream = torch.empty_like(x_TD)
        out = torch.empty_like(x_TD)
        if len(x_TD):
            kernels.add_rms_norm[(len(x_TD),)](
                x_TD,
                update_TD,
                multiplier,
                x_TD if scale_1 is None else scale_1,
                weight_D,
                stream,
                out,
                size,
                eps,
                SCALED=scale_1 is not None,
                WEIGHT_WIDE=weight_D.dtype == torch.float32,
                LESS_MEAN=less_mean,
                BLOCK=triton.next_power_of_2(size),
            )
        return stream, out
