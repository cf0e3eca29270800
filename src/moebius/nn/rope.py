"""Rotary position embedding: frequencies for each published length-independent scaling.

Formulas as transformers 5.23 has them: `linear` divides all frequencies, `llama3` divides the low
ones and blends in between, `yarn` (arXiv 2309.00071) blends by the number of rotations and scales
cos and sin.
"""

import math

import torch
from torch import Tensor

from moebius.config import RopeConfig
from moebius.ops import Ops


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies (R,) float32 in radians a position, and what cos and sin are multiplied
    by."""
    inverse = 1.0 / (
        rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    )
    if rope.scaling == "linear":
        return inverse / rope.factor, 1.0
    if rope.scaling == "llama3":
        return _llama3(inverse, rope), 1.0
    if rope.scaling == "yarn":
        return _yarn(inverse, rope, head_dim), _yarn_attention_factor(rope)
    return inverse, 1.0


def _llama3(inverse: Tensor, rope: RopeConfig) -> Tensor:
    turns = rope.original_max_position * inverse / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = torch.where(turns < rope.low_freq_factor, inverse / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, inverse, scaled)


def _yarn(inverse: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    def dimension(turns: float) -> float:
        """The dimension whose frequency makes so many turns over the original context."""
        return (
            head_dim
            * math.log(rope.original_max_position / (turns * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (
        (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    ).clamp(0, 1)
    return inverse / rope.factor * ramp + inverse * (1 - ramp)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


class Rotary:
    """cos and sin of a step's positions, worked out once for all layers, in float32."""

    def __init__(self, rope: RopeConfig, head_dim: int, ops: Ops) -> None:
        self._ops = ops
        self._inverse_R, self._factor = frequencies(rope, head_dim)

    def __call__(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (T, R)."""
        if self._inverse_R.device != positions_T.device and not positions_T.is_meta:
            self._inverse_R = self._inverse_R.to(positions_T.device)
        return self._ops.rotation(positions_T, self._inverse_R, self._factor)
