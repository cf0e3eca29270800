"""Norms, rotation and residuals in plain PyTorch."""

import torch
from torch import Tensor

from moebius.ops.interface import Ops
from moebius.ops.steps import Pair, Rotation


class PointwiseOps(Ops):
    def rms_norm(
        self, x_TD: Tensor, weight_D: Tensor, eps: float, *, less_mean: bool = False
    ) -> Tensor:
        x = x_TD.float()
        if less_mean:
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        if weight_D.dtype == torch.float32:
            return (x * weight_D).to(x_TD.dtype)
        return x.to(x_TD.dtype) * weight_D.to(x_TD.dtype)

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
        x_TD = x_TD + (update_TD if multiplier == 1.0 else update_TD * multiplier)
        if scale_1 is not None:
            x_TD = (x_TD * scale_1).to(x_TD.dtype)
        return x_TD, self.rms_norm(x_TD, weight_D, eps, less_mean=less_mean)

    def rms_norm_part(self, x_TI: Tensor, start: int, weight_D: Tensor, eps: float) -> Tensor:
        before_TI, part_TD, after_TI = torch.tensor_split(
            x_TI, (start, start + len(weight_D)), dim=1
        )
        return torch.cat((before_TI, self.rms_norm(part_TD, weight_D, eps), after_TI), dim=1)

    def clip(self, x_TD: Tensor, limit: float) -> Tensor:
        return x_TD.clamp(-limit, limit)

    def softcap(self, x_LV: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x_LV / cap)

    def divide(self, x_LV: Tensor, divisor: float) -> Tensor:
        return x_LV / divisor

    def rotation(self, positions_T: Tensor, inverse_R: Tensor, factor: float) -> Pair:
        angles_TR = positions_T.float().unsqueeze(1) * inverse_R
        return angles_TR.cos() * factor, angles_TR.sin() * factor

    def rotary(self, x_THN: Tensor, rotation: Rotation) -> Tensor:
        half = rotation.cos_TR.shape[-1]
        cos = rotation.cos_TR.unsqueeze(1)
        sin = rotation.sin_TR.unsqueeze(1)
        turned = x_THN[..., : 2 * half]
        rest = x_THN[..., 2 * half :]
        if rotation.interleaved:
            a = turned[..., 0::2]
            b = turned[..., 1::2]
            pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
            rotated = pairs.flatten(-2).to(x_THN.dtype)
        else:
            a = turned[..., :half]
            b = turned[..., half:]
            rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_THN.dtype)
        return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated

    def add_gated(self, a_TD: Tensor, b_TD: Tensor, gate_T1: Tensor | None = None) -> Tensor:
        return a_TD + (b_TD if gate_T1 is None else (torch.sigmoid(gate_T1) * b_TD).to(b_TD.dtype))
