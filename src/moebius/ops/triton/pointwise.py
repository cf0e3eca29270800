"""Norms, rotation and residuals by Triton kernels."""

import torch
import triton
from torch import Tensor

from moebius.ops.capability import Operation
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Pair, Rotation
from moebius.ops.triton.kernels import pointwise as kernels
from moebius.ops.triton.weights import DTYPES

OPERATIONS = frozenset(
    {
        Operation.RMS_NORM,
        Operation.ADD_RMS_NORM,
        Operation.RMS_NORM_PART,
        Operation.CLIP,
        Operation.SOFTCAP,
        Operation.DIVIDE,
        Operation.ROTATION,
        Operation.ROTARY,
        Operation.ADD_GATED,
    }
)
# Values of one program where each is computed by itself, and heads of one where they turn.
_VALUES = 1024
_HEADS = 4


class PointwiseOps(ReferenceOps):
    def rms_norm(
        self, x_TD: Tensor, weight_D: Tensor, eps: float, *, less_mean: bool = False
    ) -> Tensor:
        if x_TD.dtype not in DTYPES:
            return super().rms_norm(x_TD, weight_D, eps, less_mean=less_mean)
        x = x_TD.reshape(-1, x_TD.shape[-1])
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _norm(x, weight_D, out, eps, less_mean=less_mean)
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
        if x_TD.dtype not in DTYPES:
            return super().add_rms_norm(
                x_TD, update_TD, multiplier, weight_D, eps, less_mean=less_mean, scale_1=scale_1
            )
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

    def rms_norm_part(self, x_TI: Tensor, start: int, weight_D: Tensor, eps: float) -> Tensor:
        if x_TI.dtype not in DTYPES:
            return super().rms_norm_part(x_TI, start, weight_D, eps)
        stop = start + len(weight_D)
        if not 0 <= start <= stop <= x_TI.shape[1]:
            raise ValueError(f"{stop - start} columns from {start} are not all of {x_TI.shape[1]}")
        part = x_TI[:, start:stop]
        _norm(part, weight_D, part, eps)
        return x_TI

    def clip(self, x_TD: Tensor, limit: float) -> Tensor:
        if x_TD.dtype not in DTYPES:
            return super().clip(x_TD, limit)
        return _each(kernels.clip, x_TD, limit)

    def softcap(self, x_LV: Tensor, cap: float) -> Tensor:
        if x_LV.dtype != torch.float32:
            return super().softcap(x_LV, cap)
        return _each(kernels.softcap, x_LV, cap)

    def divide(self, x_LV: Tensor, divisor: float) -> Tensor:
        if x_LV.dtype != torch.float32:
            return super().divide(x_LV, divisor)
        return _each(kernels.divide, x_LV, divisor)

    def rotation(self, positions_T: Tensor, inverse_R: Tensor, factor: float) -> Pair:
        if inverse_R.dtype != torch.float32:
            return super().rotation(positions_T, inverse_R, factor)
        rows = len(positions_T)
        half = len(inverse_R)
        cos = inverse_R.new_empty((rows, half))
        sin = torch.empty_like(cos)
        if cos.numel():
            kernels.rotation[(rows,)](
                positions_T,
                inverse_R,
                cos,
                sin,
                half,
                factor,
                BLOCK=triton.next_power_of_2(half),
            )
        return cos, sin

    def rotary(self, x_THN: Tensor, rotation: Rotation) -> Tensor:
        if x_THN.dtype not in DTYPES:
            return super().rotary(x_THN, rotation)
        rows, heads, size = x_THN.shape
        half = rotation.cos_TR.shape[-1]
        if not half:  # a head that knows no positions
            return x_THN.clone()
        if x_THN.stride(2) != 1:
            x_THN = x_THN.contiguous()
        out = x_THN.new_empty(x_THN.shape)
        if out.numel():
            kernels.rotary[(rows, triton.cdiv(heads, _HEADS))](
                x_THN,
                x_THN.stride(0),
                x_THN.stride(1),
                rotation.cos_TR.contiguous(),
                rotation.sin_TR.contiguous(),
                out,
                heads,
                half,
                size,
                INTERLEAVED=rotation.interleaved,
                HEADS=_HEADS,
                HALF=triton.next_power_of_2(half),
                REST=triton.next_power_of_2(size - 2 * half) if size > 2 * half else 0,
            )
        return out

    def add_gated(self, a_TD: Tensor, b_TD: Tensor, gate_T1: Tensor | None = None) -> Tensor:
        if a_TD.dtype not in DTYPES:
            return super().add_gated(a_TD, b_TD, gate_T1)
        rows, size = a_TD.shape
        out = torch.empty_like(a_TD)
        if out.numel():
            kernels.add_gated[(rows, triton.cdiv(size, _VALUES))](
                a_TD,
                b_TD,
                a_TD if gate_T1 is None else gate_T1,
                out,
                size,
                GATED=gate_T1 is not None,
                BLOCK=_VALUES,
            )
        return out


def _norm(
    x_TD: Tensor, weight_D: Tensor, out_TD: Tensor, eps: float, *, less_mean: bool = False
) -> None:
    """Rows of x, which may lie apart, normed into those of `out`."""
    rows, size = x_TD.shape
    if rows:
        kernels.rms_norm[(rows,)](
            x_TD,
            x_TD.stride(0),
            weight_D,
            out_TD,
            out_TD.stride(0),
            size,
            eps,
            WEIGHT_WIDE=weight_D.dtype == torch.float32,
            LESS_MEAN=less_mean,
            BLOCK=triton.next_power_of_2(size),
        )


def _each(kernel: triton.JITFunction, x: Tensor, number: float) -> Tensor:
    """What a kernel makes of each value of x by itself."""
    out = torch.empty_like(x)
    count = x.numel()
    if count:
        kernel[(triton.cdiv(count, _VALUES),)](x, out, count, number, BLOCK=_VALUES)
    return out
