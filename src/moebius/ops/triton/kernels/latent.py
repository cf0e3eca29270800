"""Latent attention's own operations."""

import triton
import triton.language as tl

from moebius.ops.triton.kernels.rows import norm_and_store, turn
from moebius.ops.triton.language import dot, narrow, unlike_numbers


@triton.jit
def head_products(
    x, row_stride, head_stride, weight, out, rows, heads, outs, width,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A tile of one head's product: ROWS rows of x by OUTS rows of its matrix (outs, COLUMNS)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    of_out = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    head = tl.program_id(2).to(tl.int64)
    total = tl.zeros((ROWS, OUTS), tl.float32)
    for first in range(0, COLUMNS, AT_ONCE):
        column = first + tl.arange(0, AT_ONCE)[None, :]
        inside = column < COLUMNS
        values = x + row * row_stride + head * head_stride + column
        factors = weight + (head * outs + of_out[:, None]) * COLUMNS + column
        a = tl.load(values, mask=(row < rows) & inside, other=0.0)
        b = tl.load(factors, mask=(of_out[:, None] < outs) & inside, other=0.0)
        total = dot(a, tl.trans(b), total)
    into = out + (row * heads + head) * width + of_out[None, :]
    there = (row < rows) & (of_out[None, :] < outs)
    tl.store(into, narrow(total, out.dtype.element_ty), mask=there)


@triton.jit
def turn_queries(
    q, row_stride, head_stride, cos, sin, factors, heads, half, size, width,
    HEATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one row in place: of the values behind the first `size` as many turn as there
    are angles for (none if HALF is 0); then, if HEATED, all `width` are multiplied by the row's
    factor."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    there = head < heads
    x = q + row * row_stride + head * head_stride
    if HALF:
        turn(x + size, x + size, there, cos, sin, row, half, INTERLEAVED, HEADS, HALF)
    if HEATED:
        # What turned is read again by other threads than those that wrote it.
        tl.debug_barrier()
        at = tl.arange(0, BLOCK)[None, :]
        inside = there & (at < width)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * tl.load(factors + row)
        tl.store(x + at, narrow(value, q.dtype.element_ty), mask=inside)


@triton.jit
def store_latents(
    latent, row_stride, weight, cos, sin, slots, cache, block_stride, token_stride, block_size,
    size, half, width, eps,
    WEIGHT_WIDE: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's latent, normed, and its key into its slot of the cache; nowhere where it has none
    (below 0). The key's first 2 * half values turn (none if HALF is 0), and what is behind them, up
    to `width` values in all, is as it is (nothing if REST is 0).

    A latent that is not finite is zeros, under a key that is no number: see kernels/store.py.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        into = cache + slot // block_size * block_stride + slot % block_size * token_stride
        own = latent + row * row_stride
        at = tl.arange(0, BLOCK)
        value = tl.load(own + at, mask=at < size, other=0.0).to(tl.float32)
        broken = tl.max(unlike_numbers(value), 0) > 0
        value = tl.where(broken, 0.0, value)
        norm_and_store(value, weight, into, size, eps, WEIGHT_WIDE, False, BLOCK)
        if broken:
            behind = size + tl.arange(0, KEY)
            tl.store(into + behind, float("nan"), mask=behind < width)
        else:
            if HALF:
                one = tl.zeros((1, 1), tl.int32)
                x = own + size + one
                turn(x, into + size + one, one == 0, cos, sin, row, half, INTERLEAVED, 1, HALF)
            if REST:
                behind = size + 2 * half + tl.arange(0, REST)
                rest = tl.load(own + behind, mask=behind < width, other=0.0)
                tl.store(into + behind, rest, mask=behind < width)
