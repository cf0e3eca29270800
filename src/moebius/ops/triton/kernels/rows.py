"""What kernels of several operations do with a row: parts of theirs, none of which is launched."""

import triton
import triton.language as tl

from moebius.ops.triton.language import narrow, rounded


@triton.jit
def norm_and_store(
    value, weight, out, size, eps, WEIGHT_WIDE: tl.constexpr, LESS_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's float32 values, of which `size` <= BLOCK are there and the others 0, normed."""
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


@triton.jit
def turn(
    x, out, there, cos, sin, row, half,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotates the 2 * half values behind each of x, (HEADS, 1) pointers, into `out`, which may be
    x. cos and sin are (rows, half); `there` says which heads are."""
    pair = tl.arange(0, HALF)[None, :]
    of_pair = pair < half
    c = tl.load(cos + row * half + pair, mask=of_pair, other=0.0)
    s = tl.load(sin + row * half + pair, mask=of_pair, other=0.0)
    if INTERLEAVED:
        # Both of a pair in one load of neighbours, and apart only then.
        at = tl.arange(0, 2 * HALF)[None, :]
        inside = there & (at < 2 * half)
        both = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (HEADS, HALF, 2)))
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (HEADS, 2 * HALF))
        tl.store(out + at, narrow(turned, out.dtype.element_ty), mask=inside)
    else:
        inside = there & of_pair
        a = tl.load(x + pair, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + half + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + pair, narrow(a * c - b * s, out.dtype.element_ty), mask=inside)
        tl.store(out + half + pair, narrow(b * c + a * s, out.dtype.element_ty), mask=inside)
