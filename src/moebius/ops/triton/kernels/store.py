"""Heads of a row normed, rotated and written: queries as a result, keys and values to the cache."""

import triton
import triton.language as tl

from moebius.ops.triton.language import narrow, rounded, unlike_numbers

_MOST_CODE = tl.constexpr(127.0)
_LARGEST = tl.constexpr(3.4028234663852886e38)
# Added to a float32 between -2^22 and 2^22 and taken off again, it leaves the nearest integer.
_TO_INTEGERS = tl.constexpr(1.5 * 2**23)


@triton.jit
def rotate_and_store(
    qkv, row_stride, cos, sin, q_norm, k_norm, eps, slots, key_offset, q_out, k, v, k_scale,
    v_scale, q_heads, key_heads, q_tiles, key_tiles, k_block, v_block, scale_block,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr, Q_STEP: tl.constexpr, TURNED_FIRST: tl.constexpr,
    KEYS_AS_VALUES: tl.constexpr, NORMED_VALUES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Up to HEADS heads of one row: query heads in the first `q_tiles` programs of the row, key
    heads in the next `key_tiles`, and value heads in as many more. A row of no slot (below 0) is
    written nowhere.

    Attention meets keys and values tile by tile, and a row gives those that it does not see no
    weight: a score is passed over, but a weight of 0 times what is not finite is no number. So a
    head whose values are not all finite is written as zeros, under a key that is no number: who
    sees it has none to show, and nobody else is told.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    x = qkv + row * row_stride
    keys = x + q_heads * Q_STEP
    values = keys
    if not KEYS_AS_VALUES:
        values = keys + key_heads * KEY_SIZE
    if tile < q_tiles:
        head_H = tile * HEADS + tl.arange(0, HEADS)
        value = _turned(
            x + head_H * Q_STEP, head_H < q_heads, row, cos, sin, q_norm, eps,
            KEY_SIZE, KEY_TILE, HALF, INTERLEAVED, TURNED_FIRST,
        )  # fmt: skip
        q_H = q_out + (row * q_heads + head_H) * KEY_SIZE
        _store(value, q_H, head_H < q_heads, KEY_SIZE, KEY_TILE)
    elif tile < q_tiles + key_tiles:
        _store_keys(
            (tile - q_tiles) * HEADS + tl.arange(0, HEADS), keys, row, tl.load(slots + row), cos,
            sin, k_norm, eps, key_offset, k, k_scale, key_heads, k_block, scale_block, values,
            KEY_SIZE, KEY_TILE, VALUE_SIZE, VALUE_TILE, HALF, BLOCK_SIZE, INTERLEAVED,
            TURNED_FIRST,
        )  # fmt: skip
    else:
        _store_values(
            (tile - q_tiles - key_tiles) * HEADS + tl.arange(0, HEADS), values,
            tl.load(slots + row), eps, v, v_scale, key_heads, v_block, scale_block,
            VALUE_SIZE, VALUE_TILE, BLOCK_SIZE, NORMED_VALUES,
        )  # fmt: skip


@triton.jit
def _store_keys(
    head_H, x, row, slot, cos, sin, norm, eps, offset, plane, scale, heads, block, scale_block,
    values, SIZE: tl.constexpr, TILE: tl.constexpr, VALUE_SIZE: tl.constexpr,
    VALUE_TILE: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr, TURNED_FIRST: tl.constexpr,
):  # fmt: skip
    inside_H = (head_H < heads) & (slot >= 0)
    value = _turned(
        x + head_H * SIZE, inside_H, row, cos, sin, norm, eps, SIZE, TILE, HALF, INTERLEAVED,
        TURNED_FIRST,
    )  # fmt: skip
    if offset is not None:
        at = tl.arange(0, TILE)
        mask = inside_H[:, None] & (at < SIZE)[None, :]
        offset_H = offset + head_H * SIZE
        value -= tl.load(offset_H[:, None] + at[None, :], mask=mask, other=0.0)
    entry_H = slot % BLOCK_SIZE * heads + head_H
    plane_H = plane + slot // BLOCK_SIZE * block + entry_H * SIZE
    if scale is None:
        its = _read(values + head_H * VALUE_SIZE, inside_H, VALUE_SIZE, VALUE_TILE)
        value = tl.where(_broken(its), float("nan"), value)
        _store(value, plane_H, inside_H, SIZE, TILE)
    else:
        scale_H = scale + slot // BLOCK_SIZE * scale_block + entry_H
        _store_codes(value, plane_H, scale_H, inside_H, SIZE, TILE)


@triton.jit
def _store_values(
    head_H, x, slot, eps, plane, scale, heads, block, scale_block,
    SIZE: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    inside_H = (head_H < heads) & (slot >= 0)
    value = _read(x + head_H * SIZE, inside_H, SIZE, TILE)
    broken = _broken(value)
    if NORMED:
        value = rounded(value * _factor(value, eps, SIZE), x)
    entry_H = slot % BLOCK_SIZE * heads + head_H
    plane_H = plane + slot // BLOCK_SIZE * block + entry_H * SIZE
    if scale is None:
        value = tl.where(broken, 0.0, value)
        _store(value, plane_H, inside_H, SIZE, TILE)
    else:
        scale_H = scale + slot // BLOCK_SIZE * scale_block + entry_H
        _store_codes(value, plane_H, scale_H, inside_H, SIZE, TILE)


@triton.jit
def _turned(
    x_H, inside_H, row, cos, sin, norm, eps, SIZE: tl.constexpr, TILE: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, TURNED_FIRST: tl.constexpr,
):  # fmt: skip
    """Heads (HEADS, TILE) in float32, normed where there is a norm, and rotated: not rounded after
    what comes last, but after all that comes before."""
    at = tl.arange(0, TILE)
    turns = at < 2 * HALF
    if INTERLEAVED:
        pair = at // 2
        is_first = at % 2 == 0
        partner = at + 1 - 2 * (at % 2)
    else:
        is_first = at < HALF
        pair = tl.where(is_first, at, at - HALF)
        partner = tl.where(is_first, at + HALF, at - HALF)
    partner = tl.where(turns, partner, at)
    mask = inside_H[:, None] & (at < SIZE)[None, :]
    value = _read(x_H, inside_H, SIZE, TILE)
    # The other of its pair: read again, from the caches nearby.
    other = tl.load(x_H[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    its_cos = tl.load(cos + row * HALF + pair, mask=turns, other=1.0)
    its_sin = tl.load(sin + row * HALF + pair, mask=turns, other=0.0)
    its_sin = tl.where(is_first, -its_sin, its_sin)
    if norm is not None and not TURNED_FIRST:
        factor = _factor(value, eps, SIZE)
        value = _weighted(value * factor, norm + at, at < SIZE, x_H)
        other = _weighted(other * factor, norm + partner, at < SIZE, x_H)
    turned = value * its_cos[None, :] + other * its_sin[None, :]
    value = tl.where(turns[None, :], turned, value)
    if TURNED_FIRST:
        value = rounded(value, x_H)
        if norm is not None:
            value = _weighted(value * _factor(value, eps, SIZE), norm + at, at < SIZE, x_H)
    return value


@triton.jit
def _read(x_H, inside_H, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Heads (HEADS, TILE) in float32; zeros behind their SIZE, and where there is none."""
    at = tl.arange(0, TILE)
    mask = inside_H[:, None] & (at < SIZE)[None, :]
    return tl.load(x_H[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _broken(value):
    """Whether a head's values are not all finite, (HEADS, 1)."""
    return tl.max(unlike_numbers(value), 1)[:, None] > 0


@triton.jit
def _factor(value, eps, SIZE: tl.constexpr):
    """What makes heads' mean squares 1."""
    return (1.0 / tl.sqrt(tl.sum(value * value, 1) / SIZE + eps))[:, None]


@triton.jit
def _weighted(value, weight_at, inside, like):
    """Normed values times a weight, rounded as Ops.rms_norm says."""
    weight = tl.load(weight_at, mask=inside, other=0.0)[None, :]
    if weight.dtype == tl.float32:
        return rounded(value * weight, like)
    return rounded(rounded(value, like) * rounded(weight.to(tl.float32), like), like)


@triton.jit
def _store(value, to_H, inside_H, SIZE: tl.constexpr, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    tl.store(
        to_H[:, None] + at[None, :],
        narrow(value, to_H.dtype.element_ty),
        mask=inside_H[:, None] & (at < SIZE)[None, :],
    )


@triton.jit
def _store_codes(value, to_H, scale_H, inside_H, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Codes and scales as moebius.ops.reference.codes makes them, to the bit."""
    size = tl.abs(value)
    wrong_H = tl.sum(tl.where(size <= _LARGEST, 0, 1), 1)
    most_H = tl.max(tl.where(size <= _LARGEST, size, 0.0), 1)
    half_H = tl.div_rn(most_H, tl.full(most_H.shape, _MOST_CODE, tl.float32)).to(tl.float16)
    wide_H = half_H.to(tl.float32)
    held_H = (wrong_H == 0) & (wide_H <= _LARGEST)
    divisor_H = tl.where(wide_H > 0, wide_H, 1.0)
    inverse_H = tl.where(
        wide_H > 0, tl.div_rn(tl.full(wide_H.shape, 1.0, tl.float32), divisor_H), 0.0
    )
    codes = (value * inverse_H[:, None] + _TO_INTEGERS) - _TO_INTEGERS
    codes = tl.minimum(tl.maximum(codes, -_MOST_CODE), _MOST_CODE)
    codes = tl.where(held_H[:, None], codes, 0.0).to(tl.int8)
    at = tl.arange(0, TILE)
    mask = inside_H[:, None] & (at < SIZE)[None, :]
    tl.store(to_H[:, None] + at[None, :], codes, mask=mask)
    tl.store(scale_H, tl.where(held_H, half_H, float("nan")).to(tl.float16), mask=inside_H)
