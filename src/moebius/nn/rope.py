"""Rotary position embedding: frequencies for each published length-independent scaling.

Formulas as transformers 5.23 has them: `linear` divides all frequencies, `llama3` divides the low
ones and blends in between, `yarn` (arXiv 2309.00071) blends by the number of rotations and scales
cos and sin.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.ops import Ops, Rotation


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base `theta` and a scaling (arXiv 2104.09864; yarn 2309.00071).

    original_max_position is the context before scaling, in tokens. partial is the share of a head's
    values that turn, the first ones; the others stay as they are. divisors are of each pair's
    frequency, once it is scaled; None for none. interleaved: the pairs that turn are 2i and 2i + 1,
    else i and i + half.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial: float = 1.0
    divisors: tuple[float, ...] | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not (self.theta > 0 and math.isfinite(self.theta)):
            raise ConfigError(f"rope_theta is {self.theta}; it must be positive")
        if not 1.0 <= self.factor < 2**32:
            raise ConfigError(
                f"the rope scaling factor is {self.factor}; it must be at least 1, less than 2^32"
            )
        for name in ("beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"the rope's {name} is {getattr(self, name)}; it must be positive"
                )
        if self.scaling == "yarn" and self.theta == 1:
            raise ConfigError(
                "rope_theta is 1, where yarn finds no frequencies; it must be another"
            )
        if not 0 < self.partial <= 1:
            raise ConfigError(
                f"partial_rotary_factor is {self.partial}; it must be positive and at most 1"
            )

    def size(self, head_dim: int) -> int:
        """How many of a head's values turn. Raises ConfigError where they are not pairs."""
        size = int(head_dim * self.partial)
        if size % 2:
            what = "head_dim"
            if self.partial != 1:
                what += f" = {head_dim} times partial_rotary_factor = {self.partial}"
            raise ConfigError(f"{what} is {size}; rotary embedding needs an even one")
        if self.divisors is not None and len(self.divisors) != size // 2:
            raise ConfigError(
                f"there are {len(self.divisors)} divisors of frequencies; {size // 2} pairs turn"
            )
        return size


def frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies (R,) float32 in radians a position, and the factor of cos and sin."""
    inverse_R, factor = _scaled(rope, rope.size(head_dim))
    if rope.divisors is not None:
        inverse_R = inverse_R / torch.tensor(rope.divisors, dtype=torch.float32, device="cpu")
    return inverse_R, factor


def _scaled(rope: RopeConfig, size: int) -> tuple[Tensor, float]:
    steps_R = torch.arange(0, size, 2, dtype=torch.float32, device="cpu")
    inverse_R = 1.0 / (rope.theta ** (steps_R / size))
    if rope.scaling == "linear":
        return inverse_R / rope.factor, 1.0
    if rope.scaling == "llama3":
        return _llama3(inverse_R, rope), 1.0
    if rope.scaling == "yarn":
        return _yarn(inverse_R, rope, size), _yarn_attention_factor(rope)
    return inverse_R, rope.attention_factor or 1.0


def _llama3(inverse_R: Tensor, rope: RopeConfig) -> Tensor:
    turns = rope.original_max_position * inverse_R / (2 * math.pi)
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inverse_R / rope.factor + smooth * inverse_R
    scaled = torch.where(turns < rope.low_freq_factor, inverse_R / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, inverse_R, scaled)


def _yarn(inverse_R: Tensor, rope: RopeConfig, size: int) -> Tensor:
    def dimension(turns: float) -> float:
        """The dimension whose frequency makes so many turns over the original context."""
        of_base = 2 * math.log(rope.theta)
        return size * math.log(rope.original_max_position / (turns * 2 * math.pi)) / of_base

    low = dimension(rope.beta_fast)
    high = dimension(rope.beta_slow)
    if rope.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, size - 1)
    if low == high:
        high += 0.001
    steps_R = torch.arange(size // 2, dtype=torch.float32, device="cpu")
    ramp_R = ((steps_R - low) / (high - low)).clamp(0, 1)
    return inverse_R / rope.factor * ramp_R + inverse_R * (1 - ramp_R)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


class Rotary:
    """The rotation of a step's positions for all layers with this rope; None turns nothing."""

    def __init__(self, rope: RopeConfig | None, head_dim: int, ops: Ops) -> None:
        self._ops = ops
        self._inverse_R = torch.empty(0, dtype=torch.float32, device="cpu")
        self._factor = 1.0
        self._interleaved = rope is not None and rope.interleaved
        if rope is not None:
            self._inverse_R, self._factor = frequencies(rope, head_dim)

    def __call__(self, positions_T: Tensor) -> Rotation:
        """How rows at these positions turn."""
        if self._inverse_R.device != positions_T.device and not positions_T.is_meta:
            self._inverse_R = self._inverse_R.to(positions_T.device)
        cos_TR, sin_TR = self._ops.rotation(positions_T, self._inverse_R, self._factor)
        return Rotation(cos_TR, sin_TR, self._interleaved)


class Positions:
    """The positions of a step's rows; a rotation is worked out when a layer first asks for it."""

    def __init__(self, positions_T: Tensor) -> None:
        self.positions_T = positions_T
        self._rotations: dict[Rotary, Rotation] = {}

    def rotation(self, rotary: Rotary) -> Rotation:
        """How the step's rows turn."""
        if rotary not in self._rotations:
            self._rotations[rotary] = rotary(self.positions_T)
        return self._rotations[rotary]
