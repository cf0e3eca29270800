"""Grouped products for training: each group of rows by a matrix of its own, and its gradients.

Sums go over a dimension in one order, in one program, and nothing is added up by atomics: a step is
the same bits each time on one card.

Shape legend: P rows that are sorted by group, O outputs, I inputs, E groups that have a matrix.
"""

import triton
import triton.language as tl

from moebius.ops.triton.kernels.weights import plain
from moebius.ops.triton.language import dot, group_of_tile, narrow, span


@triton.jit(do_not_specialize=["groups"])
def rows_by_matrix(
    x, table, starts, out, groups, inner, outer, x_stride, from_inner, from_outer,
    NAME: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, GROUPS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[p, o] = sum over i of x[p, i] * matrix[i, o], of M rows and N outputs.

    table: the address of each group's matrix, numbers of the dtype NAME, whose elements are
    from_inner and from_outer apart along i and along o. An address of 0 stands for no matrix: its
    rows are zeros. starts as in group_of_tile.
    """
    group, first, last = group_of_tile(starts, groups, tl.program_id(0), GROUPS, M)
    if first < last:
        place = (first + tl.arange(0, M)).to(tl.int64)
        inside_m = place < last
        column = tl.program_id(1) * N + tl.arange(0, N)
        inside_n = column < outer
        from_n = column.to(tl.int64) * from_outer
        address = tl.load(table + group)
        matrix = plain(address, NAME, ALIGNED)
        acc = tl.zeros((M, N), tl.float32)
        for i in span(0, tl.where(address != 0, inner, 0), K):
            at = i + tl.arange(0, K)
            inside_k = at < inner
            a = tl.load(
                x + place[:, None] * x_stride + at[None, :],
                mask=inside_m[:, None] & inside_k[None, :],
                other=0.0,
            )
            b = tl.load(
                matrix + at.to(tl.int64)[:, None] * from_inner + from_n[None, :],
                mask=inside_k[:, None] & inside_n[None, :],
                other=0.0,
            )
            acc = dot(a.to(DTYPE), b.to(DTYPE), acc)
        to = out + place[:, None] * outer + column[None, :]
        here = inside_m[:, None] & inside_n[None, :]
        tl.store(to, narrow(acc, out.dtype.element_ty), mask=here)


@triton.jit
def rows_by_rows(
    left, right, starts, out, outer, inner, left_stride, right_stride,
    DTYPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[e, o, i] = sum over the rows p of group e of left[p, o] * right[p, i], of M by N of them.

    Rows are added in their order; a group without any gets zeros.
    """
    columns = tl.cdiv(inner, N)
    tile = tl.program_id(0)
    group = tl.program_id(1)
    at_m = tile // columns * M + tl.arange(0, M)
    at_n = tile % columns * N + tl.arange(0, N)
    inside_m = at_m < outer
    inside_n = at_n < inner
    end = tl.load(starts + group + 1)
    acc = tl.zeros((M, N), tl.float32)
    for p in span(tl.load(starts + group), end, K):
        place = (p + tl.arange(0, K)).to(tl.int64)
        inside_k = place < end
        a = tl.load(
            left + place[None, :] * left_stride + at_m[:, None],
            mask=inside_m[:, None] & inside_k[None, :],
            other=0.0,
        )
        b = tl.load(
            right + place[:, None] * right_stride + at_n[None, :],
            mask=inside_k[:, None] & inside_n[None, :],
            other=0.0,
        )
        acc = dot(a.to(DTYPE), b.to(DTYPE), acc)
    row = group.to(tl.int64) * outer + at_m
    to = out + row[:, None] * inner + at_n[None, :]
    tl.store(to, narrow(acc, out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])
