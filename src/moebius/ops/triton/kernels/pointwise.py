"""Norms, rotation and residuals: a program a row, or a part of one."""

import triton
import triton.language as tl

from moebius.ops.triton.kernels.rows import norm_and_store, turn
from moebius.ops.triton.language import narrow, rounded, sigmoid, tanh


@triton.jit
def rms_norm(
    x, stride, weight, out, out_stride, size, eps,
    WEIGHT_WIDE: tl.constexpr, LESS_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x / sqrt(mean(x^2) + eps) * weight of one row, `size` <= BLOCK values in one tile; `out` may
    be x."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    into = out + row * out_stride
    norm_and_store(value, weight, into, size, eps, WEIGHT_WIDE, LESS_MEAN, BLOCK)


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
    norm_and_store(value, weight, out + row * size, size, eps, WEIGHT_WIDE, LESS_MEAN, BLOCK)


@triton.jit
def clip(x, out, count, limit, BLOCK: tl.constexpr):
    at, inside = _part(count, BLOCK)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # NaN is neither above nor below.
    value = tl.where(value > limit, limit, value)
    value = tl.where(value < -limit, -limit, value)
    tl.store(out + at, narrow(value, out.dtype.element_ty), mask=inside)


@triton.jit
def softcap(x, out, count, cap, BLOCK: tl.constexpr):
    at, inside = _part(count, BLOCK)
    value = tl.load(x + at, mask=inside, other=0.0)
    tl.store(out + at, cap * tanh(value / cap), mask=inside)


@triton.jit
def divide(x, out, count, divisor, BLOCK: tl.constexpr):
    """Rounded as IEEE 754 has it, which `/` is not on a GPU."""
    at, inside = _part(count, BLOCK)
    value = tl.load(x + at, mask=inside, other=0.0)
    # A tile of divisors, as the compiler takes no number beside a tile here.
    tl.store(out + at, tl.div_rn(value, tl.zeros_like(value) + divisor), mask=inside)


@triton.jit
def _part(count, BLOCK: tl.constexpr):
    """Which of `count` values are this program's, and whether they are there."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < count


@triton.jit
def rotation(positions, inverse, cos, sin, half, factor, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < half
    angle = tl.load(positions + row).to(tl.float32) * tl.load(inverse + at, mask=inside, other=0.0)
    tl.store(cos + row * half + at, tl.cos(angle) * factor, mask=inside)
    tl.store(sin + row * half + at, tl.sin(angle) * factor, mask=inside)


@triton.jit
def rotary(
    x, row_stride, head_stride, cos, sin, out, heads, half, size,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one row: 2 * half values turn, and size - 2 * half are copied."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    there = head < heads
    x += row * row_stride + head * head_stride
    out += (row * heads + head) * size
    turn(x, out, there, cos, sin, row, half, INTERLEAVED, HEADS, HALF)
    if REST > 0:
        at = 2 * half + tl.arange(0, REST)[None, :]
        inside = there & (at < size)
        tl.store(out + at, tl.load(x + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def add_gated(a, b, gate, out, size, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(a + row * size + at, mask=inside, other=0.0).to(tl.float32)
    more = tl.load(b + row * size + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        more = rounded(more * sigmoid(tl.load(gate + row)), b)
    tl.store(out + row * size + at, narrow(value + more, out.dtype.element_ty), mask=inside)
