"""Products of activations quantised to eight bits with weights in blocks, computed slowly in numpy.

The arithmetic is csrc/block_kernels.h's, written down anew: whole numbers in int64, and float32
steps that are each computed in float64 and rounded once (a product of two float32 numbers is exact
in float64; a fused multiply-add is rounded to odd there, so that rounding again is right). Codes
and scales are taken out of the blocks by `moebius.ops.formats`, whose numbers are gguf-py's.

Beside the result there is how far it may be from a product in float64 of the same weights with the
activations as they were: half a step of a code for each element, and what float32 sums are off.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebius.ops import Matrix
from moebius.ops.formats import format_named
from ops.formats.blocks import BLOCKS, HALVES_AT

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

LANES = 16
SMALLEST = np.float32(2.0**-126)


class Quantised(NamedTuple):
    """Rows of activations: codes (T, blocks, B), and a scale a block (T, blocks)."""

    codes: Integers
    scales: Floats


class Weights(NamedTuple):
    """Rows of weights in blocks of S sub-blocks of P: scale * factors * codes - least * minima.

    codes (N, blocks, S, P), factors and minima (N, blocks, S); scales and least (N, blocks).
    minima is None where a format has none.
    """

    codes: Integers
    factors: Integers
    minima: Integers | None
    scales: Floats
    least: Floats


class Product(NamedTuple):
    """The result (T, N), and its largest distance from the product in float64 of what was given."""

    out: Tensor
    exact: Tensor
    bound: Tensor


def flushed(x: Floats) -> Floats:
    """Subnormal numbers are zeros in the kernels' threads."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def quantised(x_TI: Tensor, elements: int) -> Quantised:
    """c = x * (127 / a), ties to even, and a / 127, for the largest |x| of a block."""
    x = x_TI.float().numpy().reshape(len(x_TI), -1, elements)
    a = np.abs(x).max(-1)
    with np.errstate(all="ignore"):
        counts = a >= np.float32(2.0**-100)
        inverse = np.where(counts & np.isfinite(a), np.float32(127) / a, np.float32(0))
        finite = np.isfinite(x).all(-1)
        scaled = np.where(finite[..., None], x, np.float32(0)) * inverse[..., None]
        codes = np.rint(scaled).astype(np.int64)
        scales = np.where(counts, a / np.float32(127), np.float32(0))
    return Quantised(codes, np.where(finite, scales, np.float32(np.nan)))


def elements_of(matrix: Matrix) -> int:
    """Of a block."""
    return BLOCKS[matrix.format.name].elements if matrix.format.name in BLOCKS else 32


def of_groups(matrix: Matrix) -> Weights:
    """Codes whose scales lie in a plane of their own: whole numbers are those with scales of one,
    E2M1's with two; each block of 32 has its group's scale, MXFP4's half of it."""
    codes, scales, *rest = matrix.planes
    rows, columns = matrix.shape
    powers = matrix.format.name == "mxfp4_planes"
    affine = matrix.format.name.startswith("affine")
    ones = torch.full_like(scales, 128 if powers else 1)
    # Codes of eight bits are signed in products: 128 less, with as many scales more in the bias.
    shift = 128 if matrix.format.name.startswith("affine8") else 0
    others = [torch.full_like(scales, -shift)] if affine else rest
    whole = Matrix(matrix.format, matrix.shape, (codes, ones, *others)).widened(torch.float64)
    if powers:
        e = scales.numpy().astype(np.int64)
        wide = np.where(e == 255, np.float32(np.nan), np.ldexp(np.float32(1), e - 128))
    else:
        wide = scales.float().numpy()
    count = columns // 32
    shape = (rows, count, 1)
    ones_NS = np.ones(shape, dtype=np.int64)
    least = rest[0].float().numpy() + wide * np.float32(shift) if affine else np.zeros_like(wide)

    def of_blocks(of_groups: Floats) -> Floats:
        return np.repeat(of_groups, count // of_groups.shape[1], axis=1).astype(np.float32)

    return Weights(
        whole.numpy().astype(np.int64).reshape(*shape, 32),
        ones_NS,
        ones_NS if affine else None,
        of_blocks(wide),
        of_blocks(least),
    )


def unpacked(matrix: Matrix) -> Weights:
    """Whole numbers and scales of each block, from the numbers of blocks whose scales are one."""
    name = matrix.format.name
    if name not in BLOCKS:
        return of_groups(matrix)
    format = BLOCKS[name]
    (bytes_RY,) = matrix.planes
    rows = len(bytes_RY)
    blocks = bytes_RY.reshape(-1, format.nbytes)
    count = len(blocks) // rows
    taken = [_half(blocks, at).reshape(rows, count) for at in HALVES_AT[name]]
    if name == "mxfp4":
        e = blocks[:, 0].numpy().astype(np.int64)
        taken = [np.ldexp(np.float32(1), e - 128).astype(np.float32).reshape(rows, count)]
    ones = blocks.clone()
    for at in HALVES_AT[name]:
        ones[:, at : at + 2] = torch.ones(1, dtype=torch.float16).view(torch.uint8)
    if name == "mxfp4":
        ones[:, 0] = 128
    scales_NS, codes_NSP, added_NS = format.unpack(ones)
    sub_blocks, size = codes_NSP.shape[1:]
    shape = (rows, count, sub_blocks)
    factors = scales_NS.expand(-1, sub_blocks).numpy().astype(np.int64).reshape(shape)
    minima = None
    if added_NS is not None:
        # In blocks of 32 the minimum is added, in those of 256 it is taken off.
        minima = added_NS.expand(-1, sub_blocks).numpy().astype(np.int64).reshape(shape)
    codes = codes_NSP.numpy().astype(np.int64).reshape(*shape, size)
    least = taken[1] if len(taken) > 1 else np.zeros((rows, count), dtype=np.float32)
    return Weights(codes, factors, minima, taken[0], least)


def _half(blocks: Tensor, at: int) -> Floats:
    numbers = blocks[:, at : at + 2].clone().view(torch.float16).float().numpy()
    return np.asarray(numbers, dtype=np.float32)


def product(x_TI: Tensor, matrix: Matrix) -> Product:
    """x w^T as the kernels compute it, in float32."""
    if "_ordered" in matrix.format.name:
        *planes, columns_I = matrix.planes
        as_stored = format_named(matrix.format.name.replace("_ordered", ""))
        x_TI = x_TI[:, columns_I.long()]
        matrix = Matrix(as_stored, matrix.shape, tuple(planes))
    x, w = quantised(x_TI, elements_of(matrix)), unpacked(matrix)
    rows, count = x.scales.shape
    codes = x.codes.reshape(rows, count, *w.codes.shape[2:])
    dots = whole_sums(codes, w.codes * w.factors[..., None])
    minima = None if w.minima is None else whole_sums(codes.sum(-1), w.minima)
    lanes = np.zeros((*dots.shape[:2], LANES), dtype=np.float32)
    with np.errstate(all="ignore"):
        for b in range(count):
            lane = lanes[..., b % LANES]
            d_x = x.scales[:, None, b]
            lane[...] = fused(rounded(dots[..., b]), times(w.scales[None, :, b], d_x), lane)
            if minima is not None:
                least = times(w.least[None, :, b], d_x)
                lane[...] = fused(rounded(minima[..., b]), least, lane)
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = flushed(lanes[..., :half] + lanes[..., half:])
    return Product(torch.from_numpy(lanes[..., 0].copy()), *_bound(x_TI, x, matrix))


def _bound(x_TI: Tensor, x: Quantised, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """The product in float64 of x itself, and how far from it one of its codes may be."""
    numbers = matrix.widened(torch.float64)
    given = x_TI.double()
    steps = torch.from_numpy(x.scales.astype(np.float64)).repeat_interleave(
        x.codes.shape[-1], dim=1
    )
    terms = (given.abs() + steps) @ numbers.abs().T
    # Blocks that are too small to count are off by all that they have.
    lost = torch.where(steps == 0, given.abs(), steps * (0.5 + 2.0**-16))
    off = lost @ numbers.abs().T + 2.0**-120
    # float32's numbers of K-quants are rounded twice each, and sums of large and small ones once
    # for each block.
    return given @ numbers.T, off + 2.0**-18 * terms


def whole_sums(x: Integers, w: Integers) -> Integers:
    """Of each block, over all that it has: (T, N, blocks). In float64, which is exact here."""
    x_BTE = x.reshape(*x.shape[:2], -1).swapaxes(0, 1).astype(np.float64)
    w_BNE = w.reshape(*w.shape[:2], -1).swapaxes(0, 1).astype(np.float64)
    return (x_BTE @ w_BNE.swapaxes(1, 2)).transpose(1, 2, 0).astype(np.int64)


def times(a: Floats, b: Floats) -> Floats:
    return flushed(flushed(a) * flushed(b))


def rounded(whole: Integers) -> Floats:
    return whole.astype(np.float32)


def fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c rounded once. In float64 the product is exact; the sum is rounded to odd."""
    exact = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    total = exact + wide
    # What rounding took away (Knuth's sum): where something, the last bit is made odd.
    part = total - exact
    lost = (exact - (total - part)) + (wide - part)
    bits = total.view(np.int64)
    even = (bits & 1) == 0
    # Towards what was lost, one step of the last place.
    step = np.where((lost > 0) == (total > 0), 1, -1)
    inexact = (lost != 0) & np.isfinite(total) & even
    odd = np.where(inexact, bits + step, bits).view(np.float64)
    return flushed(odd.astype(np.float32))
