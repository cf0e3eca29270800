"""Scales of blocks by weighted least squares.

What a block's number x becomes is scale * v, or scale * v + low, with v one of a few levels. For
given levels of all its numbers the best scale (and low) is linear least squares; for a given scale
the best level of each number is the nearest. So candidates of the scale are tried, a range of them
round the one that just covers the block, and for each the least squares of its levels; the best of
all is refined by taking turns (Lloyd's algorithm).

The weighted error is sum w x^2 less a `gain` that is computed from five sums, so no candidate needs
the errors themselves.

Suffixes: M blocks, P their numbers. P comes first: a sum over a block adds whole rows, in one order
on every processor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from moebius.quantize.packing import inverse

# Twice the largest number that a table may hold.
_FURTHEST = 256


def columns(x_MP: Tensor) -> Tensor:
    """The same numbers, those of a block one below the other: (P, M)."""
    return x_MP.t().contiguous()


def summed(x_PM: Tensor) -> Tensor:
    """Sums over blocks (M,), by halves. P is a power of two."""
    while len(x_PM) > 1:
        half = len(x_PM) // 2
        x_PM = x_PM[:half] + x_PM[half:]
    return x_PM[0]


class Levels:
    """The numbers that a code stands for, in units of a scale.

    values: in order, within +-128; whole numbers without a gap, or a table.
    """

    def __init__(self, values: Sequence[int]) -> None:
        self.lowest = float(values[0])
        self.highest = float(values[-1])
        self._table: Tensor | None = None
        if len(values) != values[-1] - values[0] + 1:
            self._table = torch.tensor(values, dtype=torch.float32)
            # Half way between whole numbers is a multiple of a half: the level of each of these.
            halves = torch.arange(-_FURTHEST, _FURTHEST + 1) / 2
            between = (self._table[1:] + self._table[:-1]) / 2
            self._near = self._table[torch.bucketize(halves, between)]

    @property
    def lopsided(self) -> bool:
        """Whether one end is further from 0 than the other by more than some percent."""
        return abs(self.lowest + self.highest) > 0.05 * abs(self.lowest)

    def nearest(self, x: Tensor) -> Tensor:
        """The level of each number, float32. x may be changed."""
        if self._table is None:
            return x.round_().clamp_(self.lowest, self.highest)
        at = (x * 2).ceil_().clamp_(-_FURTHEST, _FURTHEST).add_(_FURTHEST)
        return self._near[at.long()]

    def codes(self, levels: Tensor) -> Tensor:
        """The place of each level among all, uint8."""
        if self._table is None:
            return (levels - self.lowest).to(torch.uint8)
        return torch.searchsorted(self._table, levels).to(torch.uint8)


@dataclass(frozen=True)
class Block:
    """Numbers and their weights (P, M), with the sums that no levels change."""

    x_PM: Tensor
    w_PM: Tensor

    @cached_property
    def wx_PM(self) -> Tensor:
        return self.w_PM * self.x_PM

    @cached_property
    def w_M(self) -> Tensor:
        return summed(self.w_PM)

    @cached_property
    def wx_M(self) -> Tensor:
        return summed(self.wx_PM)


@dataclass(frozen=True, slots=True)
class Sums:
    """Of a block's levels v: sums of w v, w v v, and w x v, (M,) each."""

    v_M: Tensor
    vv_M: Tensor
    xv_M: Tensor

    @classmethod
    def of(cls, block: Block, v_PM: Tensor) -> "Sums":
        wv_PM = block.w_PM * v_PM
        vv_M = summed(wv_PM * v_PM)
        return cls(summed(wv_PM), vv_M, summed(block.wx_PM * v_PM))


def _scale_for(block: Block, v_PM: Tensor) -> tuple[Tensor, Tensor]:
    """The best scale for given levels, and its gain."""
    vv_M = summed(block.w_PM * v_PM * v_PM)
    xv_M = summed(block.wx_PM * v_PM)
    scale_M = xv_M * inverse(vv_M)
    return scale_M, scale_M * xv_M


def nearest_scale(x_PM: Tensor, w_PM: Tensor, levels: Levels, steps: int, reach: float) -> Tensor:
    """A scale of each block (M,), for x = scale * level; of either sign.

    Candidates let the largest number meet the lowest level, and up to `reach` beyond and before it
    in so many steps; and the highest level likewise, where the two are not of nearly one size.
    """
    block = Block(x_PM, w_PM)
    largest_M = x_PM.gather(0, x_PM.abs().argmax(dim=0, keepdim=True))[0]
    per_largest_M = inverse(largest_M)
    best_M = largest_M / levels.lowest
    gain_M = torch.full_like(best_M, -torch.inf)
    ends = [levels.lowest, levels.highest] if levels.lopsided else [levels.lowest]
    for end, step in product(ends, range(-steps, steps + 1)):
        factor_M = per_largest_M * (end + reach * step / steps)
        scale_M, found_M = _scale_for(block, levels.nearest(x_PM * factor_M))
        better_M = found_M > gain_M
        best_M = torch.where(better_M, scale_M, best_M)
        gain_M = torch.where(better_M, found_M, gain_M)
    return best_M


@dataclass(frozen=True, slots=True)
class Affine:
    """x = scale * code + low, with low of at most 0: (M,) each."""

    scale_M: Tensor
    low_M: Tensor


def _affine_for(block: Block, sums: Sums) -> Affine:
    """The best for given codes: the normal equations of two unknowns, or of one where low is 0."""
    determinant_M = block.w_M * sums.vv_M - sums.v_M * sums.v_M
    part_M = inverse(determinant_M)
    scale_M = (block.w_M * sums.xv_M - block.wx_M * sums.v_M) * part_M
    low_M = (sums.vv_M * block.wx_M - sums.v_M * sums.xv_M) * part_M
    alone_M = sums.xv_M * inverse(sums.vv_M)
    positive_M = low_M > 0
    return Affine(torch.where(positive_M, alone_M, scale_M), torch.where(positive_M, 0.0, low_M))


def _gain(block: Block, sums: Sums, found: Affine) -> Tensor:
    """By how much the error is less than that of nothing but zeros (M,)."""
    scale_M = found.scale_M
    low_M = found.low_M
    linear_M = scale_M * (2 * sums.xv_M - scale_M * sums.vv_M)
    constant_M = low_M * (2 * block.wx_M - low_M * block.w_M)
    return linear_M + constant_M - 2 * scale_M * low_M * sums.v_M


def nearest_affine(x_PM: Tensor, w_PM: Tensor, most: int, steps: int) -> Affine:
    """Scale and low of each block, for codes from 0 to `most`.

    The range of the block is divided into as many parts, or into up to one more or less, in so many
    steps either way; the best is refined once.
    """
    block = Block(x_PM, w_PM)
    low_M = x_PM.amin(dim=0).clamp_(max=0)
    range_M = x_PM.amax(dim=0).clamp_(min=0) - low_M
    above_PM = x_PM - low_M
    per_range_M = inverse(range_M)
    best = Affine(range_M / most, low_M)
    gain_M = torch.full_like(low_M, -torch.inf)
    for step in range(-steps, steps + 1):
        factor_M = per_range_M * (most + step / steps)
        best, gain_M = _better(block, above_PM * factor_M, most, best, gain_M)
    again_PM = above_PM.copy_(x_PM).sub_(best.low_M).mul_(inverse(best.scale_M))
    best, _ = _better(block, again_PM, most, best, gain_M)
    return best


def _better(
    block: Block, scaled_PM: Tensor, most: int, best: Affine, gain_M: Tensor
) -> tuple[Affine, Tensor]:
    """Of each block the best so far, or that of these numbers' nearest codes; and its gain."""
    sums = Sums.of(block, scaled_PM.round_().clamp_(0, most))
    found = _affine_for(block, sums)
    found_M = _gain(block, sums, found)
    # A scale of 0 or less has lost the order of the codes.
    better_M = (found_M > gain_M) & (found.scale_M > 0)
    chosen = Affine(
        torch.where(better_M, found.scale_M, best.scale_M),
        torch.where(better_M, found.low_M, best.low_M),
    )
    return chosen, torch.where(better_M, found_M, gain_M)
