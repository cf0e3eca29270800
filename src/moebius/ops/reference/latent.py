"""Latent attention's own operations in plain PyTorch; they are differentiable."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.ops.config import Temperature
from moebius.ops.interface import Ops
from moebius.ops.prepared import LayerCache, PreparedHeads, own
from moebius.ops.reference.attention import ReferenceCache
from moebius.ops.reference.linear import widened_for
from moebius.ops.steps import Rotation
from moebius.ops.weights import Weight


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceHeads(PreparedHeads):
    """Heads' own matrices (H * O, I), one below the other."""

    weight: Weight
    heads: int

    def is_of(self, weight: Weight) -> bool:
        return weight is self.weight


class LatentOps(Ops):
    def prepare_heads(
        self, weight: Weight, heads: int, dtype: torch.dtype | None = None
    ) -> PreparedHeads:
        return ReferenceHeads(weight, heads)

    def head_products(self, x_THN: Tensor, heads: PreparedHeads) -> Tensor:
        prepared = own(heads, ReferenceHeads)
        rows, columns = prepared.weight.shape
        weight = widened_for(x_THN, prepared.weight)
        weight_HOI = weight.view(prepared.heads, rows // prepared.heads, columns)
        out_HTO = x_THN[..., :columns].transpose(0, 1) @ weight_HOI.transpose(1, 2)
        return torch.cat((out_HTO.transpose(0, 1), x_THN[..., columns:]), dim=-1)

    def rotate_and_store_latent(
        self,
        q_THN: Tensor,
        latent_TI: Tensor,
        rotation: Rotation,
        cache: LayerCache,
        slot_mapping_T: Tensor,
        norm_C: Tensor,
        eps: float,
        *,
        temperature: Temperature | None = None,
        positions_T: Tensor | None = None,
    ) -> Tensor:
        held = own(cache, ReferenceCache)
        q_THN = turned_queries(self, q_THN, len(norm_C), rotation, temperature, positions_T)
        k_TGN = latent_keys(self, latent_TI, norm_C, eps, rotation)
        held.write(k_TGN, k_TGN[..., : len(norm_C)], slot_mapping_T)
        return q_THN


def turned_queries(
    ops: Ops,
    q_THN: Tensor,
    size: int,
    rotation: Rotation,
    temperature: Temperature | None,
    positions_T: Tensor | None,
) -> Tensor:
    """Queries whose values behind the first `size` turn, at their temperature."""
    q_THN = _tail_turned(ops, q_THN, size, rotation)
    if temperature is None or positions_T is None:
        return q_THN
    periods_T = (positions_T // temperature.original).float()
    factors_T = 1 + temperature.beta * torch.log1p(periods_T)
    return (q_THN * factors_T[:, None, None]).to(q_THN.dtype)


def latent_keys(
    ops: Ops, latent_TI: Tensor, norm_C: Tensor, eps: float, rotation: Rotation
) -> Tensor:
    """The one key head (T, 1, C + P): normed latents, and what turned of a key."""
    size = len(norm_C)
    latent_TC = ops.rms_norm(latent_TI[:, :size].contiguous(), norm_C, eps)
    key_T1N = torch.cat((latent_TC, latent_TI[:, size:]), dim=1).unsqueeze(1)
    return _tail_turned(ops, key_T1N, size, rotation)


def _tail_turned(ops: Ops, x_THN: Tensor, size: int, rotation: Rotation) -> Tensor:
    plain, turning = torch.tensor_split(x_THN, (size,), dim=-1)
    return torch.cat((plain, ops.rotary(turning, rotation)), dim=-1)
