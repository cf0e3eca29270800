"""Norms, rotation and residuals by the CPU's kernels."""

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.capability import Operation, Use
from moebius.ops.cpu.base import CpuBase, check_shape, norm_dtype, require_dtype
from moebius.ops.steps import Pair, Rotation


class PointwiseOps(CpuBase):
    """`rotary`, which serving does in rotate_and_store, is left to the reference."""

    def rms_norm(
        self, x_TD: Tensor, weight_D: Tensor, eps: float, *, less_mean: bool = False
    ) -> Tensor:
        size = x_TD.shape[-1]
        check_shape("a norm's weight", weight_D, size)
        out = self._empty(x_TD, x_TD.shape[1:], x_TD.dtype)
        call = _cpu.RmsNorm(
            dtype=require_dtype(x_TD.dtype),
            x=self._at(x_TD),
            update=0,
            multiplier=1.0,
            weight=self._at(weight_D),
            weight_dtype=norm_dtype(x_TD.dtype, weight_D),
            size=size,
            stride=size,
            eps=eps,
            sum=0,
            out=self._at(out),
            less_mean=less_mean,
        )
        self._run(Operation.RMS_NORM, call, x_TD, x_TD.numel() // size)
        return out

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
        check_shape("a stream's scale", scale_1, 1)
        check_shape("an update", update_TD, *x_TD.shape)
        check_shape("a norm's weight", weight_D, size)
        total = self._empty(x_TD, x_TD.shape[1:], x_TD.dtype)
        out = self._empty(x_TD, x_TD.shape[1:], x_TD.dtype)
        call = _cpu.RmsNorm(
            dtype=require_dtype(x_TD.dtype, update_TD),
            x=self._at(x_TD),
            update=self._at(update_TD),
            multiplier=multiplier,
            weight=self._at(weight_D),
            weight_dtype=norm_dtype(x_TD.dtype, weight_D),
            size=size,
            stride=size,
            eps=eps,
            sum=self._at(total),
            out=self._at(out),
            less_mean=less_mean,
            scale=self._at(scale_1, torch.float32),
        )
        self._run(Operation.ADD_RMS_NORM, call, x_TD, x_TD.numel() // size)
        return total, out

    def rms_norm_part(self, x_TI: Tensor, start: int, weight_D: Tensor, eps: float) -> Tensor:
        rows, width = x_TI.shape
        if not 0 <= start <= width - len(weight_D):
            raise ValueError(f"{len(weight_D)} columns from {start} are not all of {width}")
        at = self._at(x_TI) + start * x_TI.element_size()
        call = _cpu.RmsNorm(
            dtype=require_dtype(x_TI.dtype),
            x=at,
            update=0,
            multiplier=1.0,
            weight=self._at(weight_D),
            weight_dtype=norm_dtype(x_TI.dtype, weight_D),
            size=len(weight_D),
            stride=width,
            eps=eps,
            sum=0,
            out=at,
        )
        self._run(Operation.RMS_NORM_PART, call, x_TI, rows)
        return x_TI

    def clip(self, x_TD: Tensor, limit: float) -> Tensor:
        out = self._empty(x_TD, x_TD.shape[1:], x_TD.dtype)
        call = _cpu.Clip(
            dtype=require_dtype(x_TD.dtype),
            x=self._at(x_TD),
            size=x_TD.shape[-1],
            limit=limit,
            out=self._at(out),
        )
        self._run(Operation.CLIP, call, x_TD, x_TD.numel() // x_TD.shape[-1])
        return out

    def softcap(self, x_LV: Tensor, cap: float) -> Tensor:
        out = self._empty(x_LV, x_LV.shape[1:], x_LV.dtype)
        call = _cpu.Softcap(
            x=self._at(x_LV, torch.float32), size=x_LV.shape[-1], cap=cap, out=self._at(out)
        )
        self._run(Operation.SOFTCAP, call, x_LV, x_LV.numel() // x_LV.shape[-1])
        return out

    def divide(self, x_LV: Tensor, divisor: float) -> Tensor:
        out = self._empty(x_LV, x_LV.shape[1:], x_LV.dtype)
        call = _cpu.Divide(
            x=self._at(x_LV, torch.float32),
            size=x_LV.shape[-1],
            divisor=divisor,
            out=self._at(out),
        )
        self._run(Operation.DIVIDE, call, x_LV, x_LV.numel() // x_LV.shape[-1])
        return out

    def rotation(self, positions_T: Tensor, inverse_R: Tensor, factor: float) -> Pair:
        check_shape("positions", positions_T, len(positions_T))
        check_shape("frequencies", inverse_R, len(inverse_R))
        cos = self._empty(positions_T, inverse_R.shape, torch.float32)
        sin = self._empty(positions_T, inverse_R.shape, torch.float32)
        call = _cpu.Rotation(
            positions=self._at(positions_T, torch.int64),
            inverse=self._at(inverse_R, torch.float32),
            half=len(inverse_R),
            factor=factor,
            cos=self._at(cos),
            sin=self._at(sin),
        )
        self._run(Operation.ROTATION, call, positions_T, len(positions_T), dtype=torch.float32)
        return cos, sin

    def rotary(self, x_THN: Tensor, rotation: Rotation) -> Tensor:
        self._lacks(Use(Operation.ROTARY, x_THN.dtype))
        return self._fallback.rotary(x_THN, rotation)

    def add_gated(self, a_TD: Tensor, b_TD: Tensor, gate_T1: Tensor | None = None) -> Tensor:
        rows, size = a_TD.shape
        check_shape("what is added", b_TD, rows, size)
        check_shape("gates", gate_T1, rows, 1)
        out = self._empty(a_TD, (size,), a_TD.dtype)
        call = _cpu.AddGated(
            dtype=require_dtype(a_TD.dtype, b_TD),
            a=self._at(a_TD),
            b=self._at(b_TD),
            gate=self._at(gate_T1, torch.float32),
            size=size,
            out=self._at(out),
        )
        self._run(Operation.ADD_GATED, call, a_TD, rows)
        return out
