"""Numbers into the block formats of 256 (K-quants and IQ4_XS).

Sub-blocks get the best scales first (moebius.quantize.search). These become small integers in units
of what the whole block has, the codes are made anew for what is left of the scales, and then units,
integers and codes take turns in being the best for the others.

Weights are those that are usual where no activations were measured: where a number is large, so is
what comes of its error.

Suffixes: N blocks, S their sub-blocks, P numbers of a sub-block, E = S * P = 256, Y bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from moebius.ops.formats.blocks_of_32 import IQ4_VALUES
from moebius.quantize.packing import fields, half_bytes, inverse, nibbles, power_of_two
from moebius.quantize.search import Levels, nearest_affine, nearest_scale, summed

# How often units, integers and codes take turns.
_TURNS = 2


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks in units of a power of two, near their largest number, so that no sum of squares is
    too small for float32; numbers and weights (P, N, S)."""

    x_PNS: Tensor
    w_PNS: Tensor
    unit_N: Tensor

    def rounded(self, scale_N: Tensor) -> Tensor:
        """The blocks' own scale as float16 holds it."""
        return (scale_N * self.unit_N).half().float() / self.unit_N


def _blocks(x_NE: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sub-blocks of `size` (P, N, S), divided by a power of two, and this (N,)."""
    largest_N = x_NE.abs().amax(dim=1)
    # float16 has no scales for numbers that are smaller still.
    exponent_N = torch.frexp(largest_N).exponent.clamp(-60, 60)
    unit_N = power_of_two(exponent_N)
    x_NSP = (x_NE * power_of_two(-exponent_N).unsqueeze(1)).view(len(x_NE), -1, size)
    return x_NSP.permute(2, 0, 1).contiguous(), unit_N


def _per_sub_block(sums_M: Tensor, like_PNS: Tensor) -> Tensor:
    return sums_M.view(like_PNS.shape[1:])


def _in_rows(codes_PNS: Tensor) -> Tensor:
    """(N, 256) uint8, in the order of the numbers."""
    return codes_PNS.to(torch.uint8).permute(1, 2, 0).reshape(codes_PNS.shape[1], -1)


class _Affine(NamedTuple):
    """x = (d * scale) * code - least * minimum, with small integers as scales and minima."""

    d_N: Tensor
    least_N: Tensor
    scale_NS: Tensor
    minimum_NS: Tensor
    codes_PNS: Tensor
    error_N: Tensor


class _Scaled(NamedTuple):
    """x = (d * scale) * level, with small integers of either sign as scales."""

    d_N: Tensor
    scale_NS: Tensor
    levels_PNS: Tensor
    error_N: Tensor


_Fit = TypeVar("_Fit", _Affine, _Scaled)


def _refined(first: _Fit, turn: Callable[[_Fit], _Fit]) -> _Fit:
    """Of each block the best of the first fit and of what turns make of it."""
    best = first
    for _ in range(_TURNS):
        best = _better(best, turn(best))
    return best


def _better(one: _Fit, other: _Fit) -> _Fit:
    """Of each block the fit with the smaller error."""
    better_N = other.error_N < one.error_N
    better_N1 = better_N.unsqueeze(1)
    return type(one)(
        *(
            torch.where(better_N if mine.ndim == 1 else better_N1, theirs, mine)
            for mine, theirs in zip(one, other, strict=True)
        )
    )


@dataclass(frozen=True, slots=True)
class _AffineSearch:
    """codes from 0 to `most`; scales and minima from 0 to `units`."""

    blocks: _Blocks
    most: int
    units: int

    def found(self, steps: int) -> _Affine:
        x_PNS = self.blocks.x_PNS
        best = nearest_affine(x_PNS.flatten(1), self.blocks.w_PNS.flatten(1), self.most, steps)
        scale_NS = _per_sub_block(best.scale_M, x_PNS)
        minimum_NS = -_per_sub_block(best.low_M, x_PNS)
        d_N = self.blocks.rounded(scale_NS.amax(dim=1) / self.units)
        least_N = self.blocks.rounded(minimum_NS.amax(dim=1) / self.units)
        first = self._with(
            d_N, least_N, self._whole(scale_NS, d_N), self._whole(minimum_NS, least_N)
        )
        return _refined(first, self._turn)

    def _whole(self, numbers_NS: Tensor, unit_N: Tensor) -> Tensor:
        """Numbers in units, as far as integers go."""
        return (numbers_NS * inverse(unit_N).unsqueeze(1)).round_().clamp_(0, self.units)

    def _with(self, d_N: Tensor, least_N: Tensor, scale_NS: Tensor, minimum_NS: Tensor) -> _Affine:
        """The nearest codes for these scales, and what is wrong with them."""
        step_NS = d_N.unsqueeze(1) * scale_NS
        offset_NS = least_N.unsqueeze(1) * minimum_NS
        above_PNS = self.blocks.x_PNS + offset_NS
        codes_PNS = (above_PNS * inverse(step_NS)).round_().clamp_(0, self.most)
        wrong_PNS = above_PNS.sub_(codes_PNS * step_NS).square_().mul_(self.blocks.w_PNS)
        return _Affine(d_N, least_N, scale_NS, minimum_NS, codes_PNS, summed(wrong_PNS).sum(1))

    def _turn(self, before: _Affine) -> _Affine:
        """The best integers for these codes, the best units for both, the nearest codes for all."""
        x_PNS = self.blocks.x_PNS
        w_PNS = self.blocks.w_PNS
        wv_PNS = w_PNS * before.codes_PNS
        v_NS = summed(wv_PNS)
        vv_NS = summed(wv_PNS * before.codes_PNS)
        xv_NS = summed(wv_PNS * x_PNS)
        w_NS = summed(w_PNS)
        x_NS = summed(w_PNS * x_PNS)
        part_NS = inverse(w_NS * vv_NS - v_NS * v_NS)
        wish_NS = (w_NS * xv_NS - x_NS * v_NS) * part_NS
        scale_NS = self._whole(torch.where(wish_NS > 0, wish_NS, 0.0), before.d_N)
        scale_NS = torch.where(wish_NS > 0, scale_NS, before.scale_NS)
        step_NS = before.d_N.unsqueeze(1) * scale_NS
        minimum_NS = self._whole((step_NS * v_NS - x_NS) * inverse(w_NS), before.least_N)
        # Normal equations of d and least, over all sub-blocks.
        dd_N = (scale_NS * scale_NS * vv_NS).sum(1)
        dl_N = (scale_NS * minimum_NS * v_NS).sum(1)
        ll_N = (minimum_NS * minimum_NS * w_NS).sum(1)
        dx_N = (scale_NS * xv_NS).sum(1)
        lx_N = (minimum_NS * x_NS).sum(1)
        part_N = inverse(dd_N * ll_N - dl_N * dl_N)
        d_N = (dx_N * ll_N - dl_N * lx_N) * part_N
        least_N = (dl_N * dx_N - dd_N * lx_N) * part_N
        usable_N = (d_N > 0) & (least_N > 0)
        d_N = torch.where(usable_N, d_N, dx_N * inverse(dd_N))
        least_N = torch.where(usable_N, least_N, before.least_N)
        return self._with(
            self.blocks.rounded(d_N.clamp(min=0)),
            self.blocks.rounded(least_N),
            scale_NS,
            minimum_NS,
        )


def _affine(x_NE: Tensor, size: int, most: int, units: int, steps: int) -> tuple[_Affine, Tensor]:
    """The search's result for blocks, and the power of two that it is in units of."""
    x_PNS, unit_N = _blocks(x_NE, size)
    typical_NS = (summed(x_PNS * x_PNS) / size).sqrt()
    blocks = _Blocks(x_PNS, x_PNS.abs() + typical_NS, unit_N)
    return _AffineSearch(blocks, most, units).found(steps), unit_N


@dataclass(frozen=True, slots=True)
class _ScaleSearch:
    """Levels, and scales from -`units` to `units` - 1."""

    blocks: _Blocks
    levels: Levels
    units: int

    def found(self, steps: int, reach: float) -> _Scaled:
        x_PNS = self.blocks.x_PNS
        best_M = nearest_scale(
            x_PNS.flatten(1), self.blocks.w_PNS.flatten(1), self.levels, steps, reach
        )
        scale_NS = _per_sub_block(best_M, x_PNS)
        largest_N = scale_NS.gather(1, scale_NS.abs().argmax(dim=1, keepdim=True))[:, 0]
        d_N = self.blocks.rounded(largest_N / -self.units)
        return _refined(self._with(d_N, self._whole(scale_NS, d_N)), self._turn)

    def _whole(self, scale_NS: Tensor, d_N: Tensor) -> Tensor:
        whole_NS = (scale_NS * inverse(d_N).unsqueeze(1)).round_()
        return whole_NS.clamp_(-self.units, self.units - 1)

    def _with(self, d_N: Tensor, scale_NS: Tensor) -> _Scaled:
        """The nearest levels for these scales, and what is wrong with them."""
        step_NS = d_N.unsqueeze(1) * scale_NS
        levels_PNS = self.levels.nearest(self.blocks.x_PNS * inverse(step_NS))
        wrong_PNS = (levels_PNS * step_NS).sub_(self.blocks.x_PNS).square_()
        return _Scaled(d_N, scale_NS, levels_PNS, summed(wrong_PNS.mul_(self.blocks.w_PNS)).sum(1))

    def _turn(self, before: _Scaled) -> _Scaled:
        """The best integers for these levels, the best unit for both, the nearest levels."""
        wv_PNS = self.blocks.w_PNS * before.levels_PNS
        vv_NS = summed(wv_PNS * before.levels_PNS)
        xv_NS = summed(wv_PNS * self.blocks.x_PNS)
        scale_NS = self._whole(xv_NS * inverse(vv_NS), before.d_N)
        d_N = (scale_NS * xv_NS).sum(1) * inverse((scale_NS * scale_NS * vv_NS).sum(1))
        return self._with(self.blocks.rounded(d_N), scale_NS)


def _scaled(
    x_NE: Tensor, size: int, levels: Levels, units: int, steps: int, reach: float
) -> tuple[_Scaled, Tensor]:
    """The search's result for blocks, and the power of two that it is in units of."""
    x_PNS, unit_N = _blocks(x_NE, size)
    blocks = _Blocks(x_PNS, x_PNS * x_PNS, unit_N)
    return _ScaleSearch(blocks, levels, units).found(steps, reach), unit_N


def _d_bytes(d_N: Tensor, unit_N: Tensor) -> Tensor:
    return half_bytes((d_N * unit_N).unsqueeze(1))


def _six_bits(scales_NS: Tensor, minima_NS: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits in 12 bytes: the first four of each have a byte of
    their own, whose two high bits are those of the last four."""
    first_scales, last_scales = scales_NS.to(torch.uint8).chunk(2, dim=1)
    first_minima, last_minima = minima_NS.to(torch.uint8).chunk(2, dim=1)
    return torch.cat(
        (
            first_scales | ((last_scales >> 4) << 6),
            first_minima | ((last_minima >> 4) << 6),
            (last_scales & 15) | ((last_minima & 15) << 4),
        ),
        dim=1,
    )


def q2_k(x_NE: Tensor) -> Tensor:
    found, unit_N = _affine(x_NE, size=16, most=3, units=15, steps=5)
    both_NS = found.scale_NS.to(torch.uint8) | (found.minimum_NS.to(torch.uint8) << 4)
    codes = fields(_in_rows(found.codes_PNS), 32, 2)
    return torch.cat(
        (both_NS, codes, _d_bytes(found.d_N, unit_N), _d_bytes(found.least_N, unit_N)), dim=1
    )


def q3_k(x_NE: Tensor) -> Tensor:
    levels = Levels(range(-4, 4))
    found, unit_N = _scaled(x_NE, 16, levels, units=32, steps=9, reach=0.9)
    codes_NE = _in_rows(levels.codes(found.levels_PNS))
    scales_NS = (found.scale_NS + 32).to(torch.uint8)
    scales = torch.cat((nibbles(scales_NS, 8), fields(scales_NS >> 4, 4, 2)), dim=1)
    third = fields(codes_NE >> 2, 32, 1)
    return torch.cat(
        (third, fields(codes_NE & 3, 32, 2), scales, _d_bytes(found.d_N, unit_N)), dim=1
    )


def q4_k(x_NE: Tensor) -> Tensor:
    found, unit_N = _affine(x_NE, size=32, most=15, units=63, steps=5)
    return torch.cat(
        (
            _d_bytes(found.d_N, unit_N),
            _d_bytes(found.least_N, unit_N),
            _six_bits(found.scale_NS, found.minimum_NS),
            nibbles(_in_rows(found.codes_PNS), 32),
        ),
        dim=1,
    )


def q5_k(x_NE: Tensor) -> Tensor:
    found, unit_N = _affine(x_NE, size=32, most=31, units=63, steps=5)
    codes_NE = _in_rows(found.codes_PNS)
    return torch.cat(
        (
            _d_bytes(found.d_N, unit_N),
            _d_bytes(found.least_N, unit_N),
            _six_bits(found.scale_NS, found.minimum_NS),
            fields(codes_NE >> 4, 32, 1),
            nibbles(codes_NE, 32),
        ),
        dim=1,
    )


def q6_k(x_NE: Tensor) -> Tensor:
    levels = Levels(range(-32, 32))
    found, unit_N = _scaled(x_NE, 16, levels, units=128, steps=5, reach=0.9)
    codes_NE = _in_rows(levels.codes(found.levels_PNS))
    scales = found.scale_NS.to(torch.int8).view(torch.uint8)
    high = fields(codes_NE >> 4, 32, 2)
    return torch.cat((nibbles(codes_NE, 64), high, scales, _d_bytes(found.d_N, unit_N)), dim=1)


def iq4_xs(x_NE: Tensor) -> Tensor:
    levels = Levels(IQ4_VALUES)
    found, unit_N = _scaled(x_NE, 32, levels, units=32, steps=7, reach=7.0)
    codes_NE = _in_rows(levels.codes(found.levels_PNS))
    scales_NS = (found.scale_NS + 32).to(torch.uint8)
    return torch.cat(
        (
            _d_bytes(found.d_N, unit_N),
            fields(scales_NS >> 4, 1, 2),
            nibbles(scales_NS, 1),
            nibbles(codes_NE, 16),
        ),
        dim=1,
    )
