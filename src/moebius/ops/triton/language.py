"""What all of our kernels in Triton say in the same words, and where they run.

Triton runs a kernel on a GPU, or, where TRITON_INTERPRET=1 was set before this module was imported,
step by step on the CPU: that proves its values, not its bits and not its speed.

Rules of these kernels, by which a row's bits depend on the row alone (promise P1):
    - a tile's sizes are constants of the kernel or of the chip; where the number of rows chooses
      between two, both go through a sum in the same steps, by the same instructions, and a card has
      shown that a row's bits are the same (moebius.ops.triton.tiles);
    - a sum goes over a dimension in one order, in one program, or is split at fixed places;
    - where the same lines stand in two kernels, or beside others, what is fused is written out;
    - no atomics on floats, and no tuning at run time that could choose another order.
"""

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
_WIDE = tl.constexpr(INTERPRETED)
# Whether there are instructions for two numbers of 16 bits: a card's own, which no interpreter
# knows.
PACKED = tl.constexpr(not INTERPRETED)


def _interpreted_range(*bounds):
    """tl.range in the interpreter, whose numbers are tensors of one element: current versions of
    NumPy make no index of these."""
    return range(*(x.handle.data.item() if isinstance(x, tl.tensor) else int(x) for x in bounds))


# For loops with bounds that are known to the kernel alone.
span = _interpreted_range if INTERPRETED else tl.range


@triton.jit
def dot(a, b, acc):
    """acc + a b, products exact and sums in float32.

    The interpreter keeps bfloat16 as its bits and would multiply those: it gets float32 instead,
    which holds the same numbers.
    """
    if _WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Float32 x in `dtype`, rounded to nearest, ties to even: what is stored goes through here.

    The interpreter would cut a bfloat16 off instead.
    """
    if _WIDE and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        cut = (even & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, cut, x)
    return x.to(dtype)


@triton.jit
def rounded(x, like):
    """x rounded to the dtype of what the pointer `like` points to, and widened again."""
    return narrow(x, like.dtype.element_ty).to(tl.float32)


@triton.jit
def unlike_numbers(x):
    """1 for NaN and infinities, 0 for all else."""
    return (~(tl.abs(x) < float("inf"))).to(tl.int32)


@triton.jit
def tanh(x):
    """The hyperbolic tangent of float32, to some units in the last place, near 0 too."""
    size = tl.abs(x)
    square = x * x
    # Lambert's continued fraction, cut where it is still exact to 2^-24 up to 1.
    near = size * (945 + square * (105 + square)) / (945 + square * (420 + square * 15))
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    value = tl.where(size < 1, near, far)
    return tl.where(x < 0, -value, value)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) of float32, by a power of e that is never above 1."""
    power = tl.exp(-tl.abs(x))
    return tl.where(x < 0, power, 1.0) / (1.0 + power)


@triton.jit
def group_of_tile(starts, groups, t, GROUPS: tl.constexpr, M: tl.constexpr):
    """Of the tile of rows number t: the group that it is of, its first row, and where the group's
    rows end. Behind the last tile that is there is no group, and its first row is not before the
    end.

    starts: where the rows of each of `groups` begin, and where the last ones end.
    """
    lane = tl.arange(0, GROUPS)
    begin = tl.load(starts + lane, mask=lane < groups, other=0)
    end = tl.load(starts + lane + 1, mask=lane < groups, other=0)
    tiles = (end - begin + M - 1) // M
    stops = tl.cumsum(tiles, 0)
    group = tl.sum((stops <= t).to(tl.int32), 0)
    mine = lane == group
    first = tl.sum(tl.where(mine, begin + (t - stops + tiles) * M, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)
    return group, first, last
