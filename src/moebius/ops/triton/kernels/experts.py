"""Experts: their rows are sorted, then a program computes a tile of one expert's."""

import triton
import triton.language as tl

from moebius.ops.triton.kernels.weights import plain, product, tile
from moebius.ops.triton.language import dot, group_of_tile, narrow, rounded, sigmoid, span


@triton.jit(do_not_specialize=["count"])
def sort(ids, order, starts, count, BLOCK: tl.constexpr):
    """The places of all choices of one expert, in their order, behind those of the experts before.

    A program an expert, and one more, which only says where the last one's end. An id that is no
    expert's has no place.
    """
    expert = tl.program_id(0)
    place = tl.zeros((), tl.int32)
    for p in span(0, count, BLOCK):
        at = p + tl.arange(0, BLOCK)
        chosen = tl.load(ids + at, mask=at < count, other=expert)
        place += tl.sum((chosen < expert).to(tl.int32), 0)
    tl.store(starts + expert, place)
    if expert < tl.num_programs(0) - 1:
        for p in span(0, count, BLOCK):
            at = p + tl.arange(0, BLOCK)
            mine = (tl.load(ids + at, mask=at < count, other=-1) == expert).to(tl.int32)
            behind = place + tl.cumsum(mine, 0) - 1
            tl.store(order + behind, at, mask=mine != 0)
            place += tl.sum(mine, 0)


@triton.jit
def _rows(
    starts, order, rows, experts, ROUTED: tl.constexpr, EXPERTS: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """What the tile of rows is of: an expert, places among the sorted choices (M,), which of them
    are there, the choices, and whether there are any. Not ROUTED: the only expert, which serves
    every row."""
    t = tl.program_id(0)
    if ROUTED:
        expert, first, last = group_of_tile(starts, experts, t, EXPERTS, M)
    else:
        expert = t * 0
        first = t * M
        last = rows
    place = (first + tl.arange(0, M)).to(tl.int64)
    inside = place < last
    choice = place
    if ROUTED:
        choice = tl.load(order + place, mask=inside, other=0).to(tl.int64)
    return expert, place, inside, choice, first < last


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        out = gate * sigmoid(gate)
    elif ACTIVATION == "relu":
        out = tl.where(gate < 0, 0.0, gate)
    elif ACTIVATION == "relu_squared":
        out = tl.where(gate < 0, 0.0, gate * gate)
    elif ACTIVATION == "gelu":
        out = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # (1 + tanh z) / 2 is sigmoid 2z.
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        out = gate * sigmoid(2.0 * z)
    return out


@triton.jit
def _clamped_swiglu(gate, up, alpha, limit):
    """The nonlinearity of gpt-oss (arXiv 2508.10925); NaN stays NaN."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return (up + 1.0) * (gate * sigmoid(alpha * gate))


@triton.jit
def _with_bias(acc, address, row, inside, BIAS: tl.constexpr):
    if BIAS != "":
        found = tl.load(plain(address, BIAS, False) + row, mask=inside, other=0.0)
        acc += found.to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["rows"])
def gate_up(
    x, table, starts, order, inner, rows, experts, top_k, hidden, width, x_stride,
    stride, scale_stride, alpha, limit,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr, UP: tl.constexpr, ROUTED: tl.constexpr, EXPERTS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """act(gate x) * up x, rounded like x at each step, of M sorted choices and N inner columns.

    table: nine addresses an expert: those of gate's, up's and down's two planes, and of the biases.
    """
    expert, place, inside_m, choice, any_here = _rows(
        starts, order, rows, experts, ROUTED, EXPERTS, M
    )
    entry = table + expert * 9
    # A hole has no address, and behind the last tile there is no expert.
    if tl.load(entry, mask=any_here, other=0) != 0:
        lane = tl.program_id(1) * N + tl.arange(0, N)
        row_n = lane.to(tl.int64)
        inside_n = lane < width
        from_m = x + choice // top_k * x_stride
        gate_codes = tl.load(entry)
        gate_scales = tl.load(entry + 1)
        up_codes = tl.load(entry + 2)
        up_scales = tl.load(entry + 3)
        gate = tl.zeros((M, N), tl.float32)
        up = tl.zeros((M, N), tl.float32)
        for k in span(0, hidden, K):
            at = k + tl.arange(0, K)
            here = inside_m[:, None] & (at < hidden)[None, :]
            a = tl.load(from_m[:, None] + at[None, :], mask=here, other=0.0).to(DTYPE)
            b = tile(
                gate_codes, gate_scales, row_n, inside_n, k, hidden, stride, scale_stride,
                FORMAT, SCALE, SCALE_ROWS, SCALE_COLUMNS, ALIGNED, DTYPE, N, K,
            )  # fmt: skip
            gate = dot(a, tl.trans(b), gate)
            if UP:
                b = tile(
                    up_codes, up_scales, row_n, inside_n, k, hidden, stride, scale_stride,
                    FORMAT, SCALE, SCALE_ROWS, SCALE_COLUMNS, ALIGNED, DTYPE, N, K,
                )  # fmt: skip
                up = dot(a, tl.trans(b), up)
        gate = rounded(_with_bias(gate, tl.load(entry + 6), row_n, inside_n, BIAS), inner)
        if UP:
            up = rounded(_with_bias(up, tl.load(entry + 7), row_n, inside_n, BIAS), inner)
        if ACTIVATION == "clamped_swiglu":
            out = _clamped_swiglu(gate, up, alpha, limit)
        else:
            out = rounded(_activated(gate, ACTIVATION), inner)
            if UP:
                out = out * up
        to = inner + place[:, None] * width + lane[None, :]
        here = inside_m[:, None] & inside_n[None, :]
        tl.store(to, narrow(out, inner.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def down(
    inner, table, starts, order, out, rows, experts, hidden, width, stride, scale_stride,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    ROUTED: tl.constexpr, EXPERTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """What gate_up made times down, of M sorted choices and N columns, in the choices' places."""
    expert, place, inside_m, choice, any_here = _rows(
        starts, order, rows, experts, ROUTED, EXPERTS, M
    )
    entry = table + expert * 9
    # A hole has no address, and behind the last tile there is no expert.
    if tl.load(entry, mask=any_here, other=0) != 0:
        lane = tl.program_id(1) * N + tl.arange(0, N)
        row_n = lane.to(tl.int64)
        inside_n = lane < hidden
        acc = product(
            inner + place * width, inside_m, tl.load(entry + 4), tl.load(entry + 5), row_n,
            inside_n, 0, width, width, stride, scale_stride,
            FORMAT, SCALE, SCALE_ROWS, SCALE_COLUMNS, ALIGNED, DTYPE, M, N, K,
        )  # fmt: skip
        acc = _with_bias(acc, tl.load(entry + 8), row_n, inside_n, BIAS)
        to = out + choice[:, None] * hidden + lane[None, :]
        here = inside_m[:, None] & inside_n[None, :]
        tl.store(to, narrow(acc, out.dtype.element_ty), mask=here)


@triton.jit
def combine(x, weights, out, top_k, size, BLOCK: tl.constexpr):
    """The sum over k, in that order, of weights times rows: BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for k in span(top_k):
        row = tl.load(x + (token * top_k + k) * size + at, mask=inside, other=0.0)
        total += row.to(tl.float32) * tl.load(weights + token * top_k + k)
    tl.store(out + token * size + at, narrow(total, out.dtype.element_ty), mask=inside)
