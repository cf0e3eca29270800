"""Latent attention's own operations by Triton kernels, but for attention itself."""

import torch
import triton
from torch import Tensor

from moebius.ops.capability import Operation
from moebius.ops.config import Temperature
from moebius.ops.prepared import LayerCache, PreparedHeads, own
from moebius.ops.reference import ReferenceOps
from moebius.ops.reference.attention import ReferenceCache
from moebius.ops.reference.latent import ReferenceHeads
from moebius.ops.reference.linear import widened_for
from moebius.ops.steps import Rotation
from moebius.ops.triton.kernels import latent as kernels
from moebius.ops.triton.weights import DTYPES

OPERATIONS = frozenset({Operation.HEAD_PRODUCTS, Operation.ROTATE_AND_STORE_LATENT})
# The tile of one program's products, and columns that it sums at a time: part of every sum's
# order, so never a question of how many rows there are.
_ROWS = 64
_OUTS = 64
_AT_ONCE = 32
# Heads of one program where they turn.
_HEADS = 4


class LatentOps(ReferenceOps):
    def head_products(self, x_THN: Tensor, heads: PreparedHeads) -> Tensor:
        """Weights of other formats than x's dtype are widened for each product."""
        prepared = own(heads, ReferenceHeads)
        weight = widened_for(x_THN, prepared.weight)
        if weight.dtype != x_THN.dtype or x_THN.dtype not in DTYPES:
            return super().head_products(x_THN, heads)
        rows, count, size = x_THN.shape
        outs = weight.shape[0] // prepared.heads
        columns = weight.shape[1]
        if x_THN.stride(2) != 1:
            x_THN = x_THN.contiguous()
        out = x_THN.new_empty((rows, count, outs + size - columns))
        out[..., outs:] = x_THN[..., columns:]
        if rows:
            kernels.head_products[(triton.cdiv(rows, _ROWS), triton.cdiv(outs, _OUTS), count)](
                x_THN,
                x_THN.stride(0),
                x_THN.stride(1),
                weight.contiguous(),
                out,
                rows,
                count,
                outs,
                out.shape[2],
                COLUMNS=columns,
                ROWS=_ROWS,
                OUTS=_OUTS,
                AT_ONCE=_AT_ONCE,
            )
        return out

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
        """Plain PyTorch has the word where a cache holds another dtype than is computed in."""
        held = own(cache, ReferenceCache)
        if held.k.dtype != latent_TI.dtype or latent_TI.dtype not in DTYPES:
            return super().rotate_and_store_latent(
                q_THN,
                latent_TI,
                rotation,
                cache,
                slot_mapping_T,
                norm_C,
                eps,
                temperature=temperature,
                positions_T=positions_T,
            )
        if len(latent_TI):
            _store(latent_TI, rotation, held, slot_mapping_T, norm_C, eps)
        if q_THN.stride(2) != 1:
            q_THN = q_THN.contiguous()
        factors_T = _factors(temperature, positions_T)
        if q_THN.numel() and (rotation.cos_TR.shape[1] or factors_T is not None):
            _turn(q_THN, len(norm_C), rotation, factors_T)
        return q_THN


def _store(
    latent_TI: Tensor,
    rotation: Rotation,
    held: ReferenceCache,
    slots_T: Tensor,
    norm_C: Tensor,
    eps: float,
) -> None:
    half = rotation.cos_TR.shape[1]
    width = latent_TI.shape[1]
    rest = width - len(norm_C) - 2 * half
    kernels.store_latents[(len(latent_TI),)](
        latent_TI,
        latent_TI.stride(0),
        norm_C,
        rotation.cos_TR.contiguous(),
        rotation.sin_TR.contiguous(),
        slots_T,
        held.k,
        held.k.stride(0),
        held.k.stride(1),
        held.block_size,
        len(norm_C),
        half,
        width,
        eps,
        WEIGHT_WIDE=norm_C.dtype == torch.float32,
        INTERLEAVED=rotation.interleaved,
        HALF=_lanes(half),
        REST=_lanes(rest),
        KEY=_lanes(width - len(norm_C)),
        BLOCK=triton.next_power_of_2(len(norm_C)),
    )


def _turn(q_THN: Tensor, size: int, rotation: Rotation, factors_T: Tensor | None) -> None:
    """Queries in place, of which what is behind the first `size` values turns."""
    rows, heads, width = q_THN.shape
    half = rotation.cos_TR.shape[1]
    kernels.turn_queries[(rows, triton.cdiv(heads, _HEADS))](
        q_THN,
        q_THN.stride(0),
        q_THN.stride(1),
        rotation.cos_TR.contiguous(),
        rotation.sin_TR.contiguous(),
        rotation.cos_TR if factors_T is None else factors_T,
        heads,
        half,
        size,
        width,
        HEATED=factors_T is not None,
        INTERLEAVED=rotation.interleaved,
        HEADS=_HEADS,
        HALF=_lanes(half),
        BLOCK=triton.next_power_of_2(width),
    )


def _lanes(count: int) -> int:
    """Of a program for so many values; 0 for none, which is compiled away."""
    return triton.next_power_of_2(count) if count else 0


def _factors(temperature: Temperature | None, positions_T: Tensor | None) -> Tensor | None:
    """What each row's queries grow by, float32."""
    if temperature is None or positions_T is None:
        return None
    periods_T = (positions_T // temperature.original).float()
    return 1 + temperature.beta * torch.log1p(periods_T)
