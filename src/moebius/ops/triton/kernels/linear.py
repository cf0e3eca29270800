"""Rows of tables, and linear layers: a program a tile of the result."""

import triton
import triton.language as tl

from moebius.ops.triton.kernels.weights import plain, product, tile
from moebius.ops.triton.language import narrow, span


@triton.jit
def embed(
    ids, codes, scales, multiplier, out, rows, columns, stride, scale_stride,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """multiplier * table[id], K columns of one token; zeros for an id outside the table's rows."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * K
    row = tl.load(ids + token) + tl.zeros((1,), tl.int64)
    wide = tile(
        codes, scales, row, (row >= 0) & (row < rows), k, columns, stride, scale_stride,
        FORMAT, SCALE, SCALE_ROWS, SCALE_COLUMNS, ALIGNED, tl.float32, 1, K,
    )  # fmt: skip
    if multiplier != 1.0:
        wide = wide * multiplier
    at = k + tl.arange(0, K)[None, :]
    out += token * columns
    tl.store(out + at, narrow(wide, out.dtype.element_ty), mask=at < columns)


@triton.jit(do_not_specialize=["rows"])
def linear(
    x, tiles, out, rows, columns, x_stride, out_stride, stride, scale_stride,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x W^T + b of M rows and N columns, summed over `columns` in steps of K in one order; where
    there is a SPLIT, over each so many columns by themselves, and then over these sums.

    tiles: of each tile of columns six numbers: the addresses of the planes that its weights lie in,
    the first of its rows there, how many it has, the address of the biases, and the first of its
    columns in the result. GROUP of these take turns over the same rows.
    """
    n, m = tl.swizzle2d(
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP
    )
    entry = tiles + n * 6
    lane = tl.arange(0, N)
    row_n = tl.load(entry + 2) + lane
    inside_n = lane < tl.load(entry + 3)
    row_m = (m * M + tl.arange(0, M)).to(tl.int64)
    inside_m = row_m < rows
    first = x + row_m * x_stride
    if SPLIT == 0:
        acc = product(
            first, inside_m, tl.load(entry), tl.load(entry + 1), row_n, inside_n, 0, columns,
            columns, stride, scale_stride,
            FORMAT, SCALE, SCALE_ROWS, SCALE_COLUMNS, ALIGNED, DTYPE, M, N, K,
        )  # fmt: skip
    else:
        acc = tl.zeros((M, N), tl.float32)
        for begin in span(0, columns, SPLIT):
            acc += product(
                first, inside_m, tl.load(entry), tl.load(entry + 1), row_n, inside_n, begin,
                tl.minimum(begin + SPLIT, columns), columns, stride, scale_stride,
                FORMAT, SCALE, SCALE_ROWS, SCALE_COLUMNS, ALIGNED, DTYPE, M, N, K,
            )  # fmt: skip
    acc = _biased(acc, entry, row_n, inside_n, BIAS)
    at = row_m[:, None] * out_stride + (tl.load(entry + 5) + lane)[None, :]
    here = inside_m[:, None] & inside_n[None, :]
    tl.store(out + at, narrow(acc, out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def linear_split(
    x, tiles, parts, rows, columns, x_stride, width, stride, scale_stride,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, SPLIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """What one split of columns adds to a tile of up to M rows, the only one: a part (splits, rows,
    width) for `join_splits`. By the operations of `linear`, so that either may serve a row."""
    entry = tiles + tl.program_id(0) * 6
    split = tl.program_id(1)
    lane = tl.arange(0, N)
    row_n = tl.load(entry + 2) + lane
    inside_n = lane < tl.load(entry + 3)
    row_m = tl.arange(0, M).to(tl.int64)
    inside_m = row_m < rows
    acc = product(
        x + row_m * x_stride, inside_m, tl.load(entry), tl.load(entry + 1), row_n, inside_n,
        split * SPLIT, tl.minimum(split * SPLIT + SPLIT, columns), columns, stride, scale_stride,
        FORMAT, SCALE, SCALE_ROWS, SCALE_COLUMNS, ALIGNED, DTYPE, M, N, K,
    )  # fmt: skip
    at = (split * rows + row_m)[:, None] * width + (tl.load(entry + 5) + lane)[None, :]
    tl.store(parts + at, acc, mask=inside_m[:, None] & inside_n[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def join_splits(
    parts, tiles, out, rows, splits, width, out_stride, BIAS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The splits' sums of one row and N columns, from the first to the last, and the bias."""
    row = tl.program_id(0).to(tl.int64)
    entry = tiles + tl.program_id(1) * 6
    lane = tl.arange(0, N)
    inside = lane < tl.load(entry + 3)
    at = tl.load(entry + 5) + lane
    acc = tl.zeros((1, N), tl.float32)
    for split in span(splits):
        part = parts + (split * rows + row) * width + at
        acc += tl.load(part, mask=inside, other=0.0)[None, :]
    acc = _biased(acc, entry, tl.load(entry + 2) + lane, inside, BIAS)
    to = out + row * out_stride + at[None, :]
    tl.store(to, narrow(acc, out.dtype.element_ty), mask=inside[None, :])


@triton.jit
def _biased(acc, entry, row_n, inside_n, BIAS: tl.constexpr):
    if BIAS != "":
        bias = plain(tl.load(entry + 4), BIAS, False)
        acc += tl.load(bias + row_n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    return acc
