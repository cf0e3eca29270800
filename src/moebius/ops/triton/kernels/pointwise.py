"""Norms, rotation and residuals: a program a row, or a part of one."""

import triton
import triton.language as tl

from moebius.ops.triton.language import narrow, rounded


@triton.jit
def rms_norm(
    x, stride, weight, out, size, eps, WEIGHT_WIDE: tl.constexpr, LESS_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x / sqrt(mean(x^2) + eps) * weight of one row, `size` <= BLOCK values in one tile."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    _norm_and_store(value, weight, out + row * size, size, eps, WEIGHT_WIDE, LESS_MEAN, BLOCK)


@triton.jit
def add_rms_norm(
    x, update, multiplier, scale, weight, stream, out, size, eps,
    SCALED: tl.constexpr, WEIGHT_WIDE: tl.constexpr, LESS_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The residual stream x + multiplier * update, and its norm."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    more = tl.load(update + row * size + at, mask=inside, other=0.0).to(tl.float32)
    if multiplier != 1.0:
        more = rounded(more * multiplier, x)
    value = rounded(value + more, x)
    if SCALED:
        value = rounded(value * tl.load(scale), x)
    tl.store(stream + row * size + at, narrow(value, stream.dtype.element_ty), mask=inside)
    _norm_and_store(value, weight, out + row * size, size, eps, WEIGHT_WIDE, LESS_MEAN, BLOCK)


@triton.jit
def _norm_and_store(
    value, weight, out, size, eps, WEIGHT_WIDE: tl.constexpr, LESS_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < size
    if LESS_MEAN:
        value = tl.where(inside, value - tl.sum(value, 0) / size, 0.0)
    value = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / size + eps))
    factor = tl.load(weight + at, mask=inside, other=0.0)
    if WEIGHT_WIDE:
        value = value * factor
    else:
        value = rounded(value, out) * rounded(factor.to(tl.float32), out)
    tl.store(out + at, narrow(value, out.dtype.element_ty), mask=inside)
