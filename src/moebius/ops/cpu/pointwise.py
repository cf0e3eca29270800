"""Norms, rotation and residuals by the CPU's kernels."""

import torch
from torch import Tensor

from moebius.ops.cpu.base import CpuBase, address, require_dtype
from moebius.ops.steps import Pair


class PointwiseOps(CpuBase):
    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return self._rms_norm(x_TD, None, 1.0, weight_D, eps)[1]

    def add_rms_norm(
        self, x_TD: Tensor, update_TD: Tensor, multiplier: float, weight_D: Tensor, eps: float
    ) -> Pair:
        return self._rms_norm(x_TD, update_TD, multiplier, weight_D, eps)

    def _rms_norm(
        self, x: Tensor, update: Tensor | None, multiplier: float, weight: Tensor, eps: float
    ) -> Pair:
        dtype = require_dtype(x.dtype, update, weight)
        size = x.shape[-1]
        total = x if update is None else self._empty(x.shape, x.dtype)
        out = self._empty(x.shape, x.dtype)
        rows = x.numel() // size
        given = (address(x), address(update), multiplier, address(weight))
        into = (total.data_ptr(), out.data_ptr())
        self._native.rms_norm(dtype, *given, rows, size, size, eps, *into)
        return total, out

    def rms_norm_part(self, x_TI: Tensor, start: int, weight_D: Tensor, eps: float) -> Tensor:
        dtype = require_dtype(x_TI.dtype, weight_D)
        rows, width = x_TI.shape
        size = len(weight_D)
        at = address(x_TI) + start * x_TI.element_size()
        self._native.rms_norm(dtype, at, 0, 1.0, address(weight_D), rows, size, width, eps, 0, at)
        return x_TI

    def rotation(self, positions_T: Tensor, inverse_R: Tensor, factor: float) -> Pair:
        rows = len(positions_T)
        half = len(inverse_R)
        cos = self._empty((rows, half), torch.float32)
        sin = self._empty((rows, half), torch.float32)
        at = address(positions_T, torch.int64)
        inverse = address(inverse_R, torch.float32)
        self._native.rotation(at, rows, inverse, half, factor, cos.data_ptr(), sin.data_ptr())
        return cos, sin

    def rotary(self, x_THN: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        # Serving rotates in rotate_and_store.
        return self._fallback.rotary(x_THN, cos_TR, sin_TR)

    def add_gated(self, a_TD: Tensor, b_TD: Tensor, gate_T1: Tensor | None = None) -> Tensor:
        dtype = require_dtype(a_TD.dtype, b_TD)
        rows, size = a_TD.shape
        gate = address(gate_T1, torch.float32)
        out = self._empty(a_TD.shape, a_TD.dtype)
        self._native.add_gated(
            dtype, address(a_TD), address(b_TD), gate, rows, size, out.data_ptr()
        )
        return out
