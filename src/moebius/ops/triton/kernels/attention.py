"""Paged attention: tiles of a sequence's rows, and of the query heads that share a key head, over
tiles of keys, by a running softmax (FlashAttention-2, arXiv 2307.08691).

Keys are split at fixed positions. What a row finds in a split depends on the row alone, and what it
finds in all of them is joined from the first to the last, by the same operations whether one
program goes through all splits, or a program takes each of them and another joins the parts: so
either may serve a row. All of the scores are in units of log 2.

A weight of 0 times a value that is not finite would be no number: none is in the cache, whose keys
say so in its place (kernels/store.py).

Numbers that differ from step to step are not specialised, so that all steps run one program.

A tile has M entries, of `HEADS` query heads each: entry m is head m % HEADS of row m // HEADS.
"""

import triton
import triton.language as tl

from moebius.ops.triton.language import dot, narrow, span

_LOG2_E = tl.constexpr(1.4426950408889634)
_TWICE_LOG2_E = tl.constexpr(2 * 1.4426950408889634)
# Columns of what the plan says of a tile of rows, as moebius.ops.triton.attention makes it.
_TILE_COLUMNS = tl.constexpr(6)


@triton.jit(do_not_specialize=["table_width"])
def attend_in_order(
    q, k, v, k_scale, v_scale, key_offset, sinks, bias, table, tiles, rows_seen, out,
    scale, softcap, reach, heads, table_width, k_block, v_block, scale_block, key_heads, share,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_MAIN: tl.constexpr,
    KEY_REST: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    VALUE_STEP: tl.constexpr, SHARED: tl.constexpr, M: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """All splits of a tile of rows, one after the other: what these rows give."""
    sequence, first_row, rows, low, high, _ = _tile(tiles)
    group, row_M, head_M, inside_M = _entries(first_row, rows, share, M, HEADS)
    low_M, high_M, position_M = _seen(rows_seen, row_M, inside_M)
    main, rest = _queries(q, row_M, head_M, inside_M, heads, KEY_SIZE, KEY_MAIN, KEY_REST)
    shift_M = None
    if key_offset is not None:
        shift_M = _shift(main, rest, key_offset, group, KEY_SIZE, KEY_MAIN, KEY_REST)
    all_from, all_to = _seen_by_all(low_M, high_M, low, high)
    acc, best_M, total_M = _nothing(M, VALUE_TILE)
    part_acc, part_best_M, part_total_M = _nothing(M, VALUE_TILE)
    # One loop over all tiles of keys, so that those of the next split are on their way already.
    for first in span(low // KEYS * KEYS, high, KEYS):
        if first % SPLIT == 0:
            acc, best_M, total_M = _join(acc, best_M, total_M, part_acc, part_best_M, part_total_M)
            part_acc, part_best_M, part_total_M = _nothing(M, VALUE_TILE)
        part_acc, part_best_M, part_total_M = _more_keys(
            part_acc, part_best_M, part_total_M, first, low, high, all_from, all_to,
            main, rest, shift_M, low_M, high_M, position_M, head_M, group,
            k, v, k_scale, v_scale, bias, table + sequence * table_width,
            scale, softcap, reach, k_block, v_block, scale_block, key_heads,
            KEY_SIZE, VALUE_SIZE, KEY_MAIN, KEY_REST, VALUE_TILE, BLOCK_SIZE,
            VALUE_STEP, SHARED, M, KEYS,
        )  # fmt: skip
    acc, best_M, total_M = _join(acc, best_M, total_M, part_acc, part_best_M, part_total_M)
    _finish(
        acc, best_M, total_M, sinks, row_M, head_M, inside_M, out, heads, VALUE_SIZE, VALUE_TILE
    )


@triton.jit(do_not_specialize=["table_width"])
def attend_split(
    q, k, v, k_scale, v_scale, key_offset, bias, table, tiles, rows_seen, part_acc, part_sums,
    scale, softcap, reach, heads, table_width, k_block, v_block, scale_block, key_heads, share,
    KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_MAIN: tl.constexpr,
    KEY_REST: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    VALUE_STEP: tl.constexpr, SHARED: tl.constexpr, M: tl.constexpr, HEADS: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One split of a tile of rows: a part for `join_splits`."""
    sequence, first_row, rows, low, high, part_row = _tile(tiles)
    group, row_M, head_M, inside_M = _entries(first_row, rows, share, M, HEADS)
    low_M, high_M, position_M = _seen(rows_seen, row_M, inside_M)
    main, rest = _queries(q, row_M, head_M, inside_M, heads, KEY_SIZE, KEY_MAIN, KEY_REST)
    shift_M = None
    if key_offset is not None:
        shift_M = _shift(main, rest, key_offset, group, KEY_SIZE, KEY_MAIN, KEY_REST)
    split = low // SPLIT + tl.program_id(2)
    begin = tl.maximum(low, split * SPLIT)
    end = tl.minimum(high, split * SPLIT + SPLIT)
    all_from, all_to = _seen_by_all(low_M, high_M, low, high)
    acc, best_M, total_M = _nothing(M, VALUE_TILE)
    for first in span(begin // KEYS * KEYS, end, KEYS):
        acc, best_M, total_M = _more_keys(
            acc, best_M, total_M, first, low, high, all_from, all_to,
            main, rest, shift_M, low_M, high_M, position_M, head_M, group,
            k, v, k_scale, v_scale, bias, table + sequence * table_width,
            scale, softcap, reach, k_block, v_block, scale_block, key_heads,
            KEY_SIZE, VALUE_SIZE, KEY_MAIN, KEY_REST, VALUE_TILE, BLOCK_SIZE,
            VALUE_STEP, SHARED, M, KEYS,
        )  # fmt: skip
    inside_M = inside_M & (split * SPLIT < high)
    part_M = (part_row + row_M - first_row) * heads + head_M
    part_M = part_M * tl.num_programs(2) + tl.program_id(2)
    at = tl.arange(0, VALUE_TILE)
    tl.store(
        part_acc + part_M[:, None] * VALUE_SIZE + at[None, :],
        acc,
        mask=inside_M[:, None] & (at < VALUE_SIZE)[None, :],
    )
    tl.store(part_sums + part_M * 2, best_M, mask=inside_M)
    tl.store(part_sums + part_M * 2 + 1, total_M, mask=inside_M)


@triton.jit(do_not_specialize=["splits"])
def join_splits(
    part_acc, part_sums, sinks, tiles, out, heads, splits,
    VALUE_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What one head of one row gives, from the parts of its tile's splits."""
    _, first_row, rows, low, high, part_row = _tile(tiles)
    one = tl.arange(0, 1)
    row_1 = first_row + tl.program_id(2) + one
    head_1 = tl.program_id(1) + one
    inside_1 = tl.program_id(2) + one < rows
    at = tl.arange(0, VALUE_TILE)
    mask = inside_1[:, None] & (at < VALUE_SIZE)[None, :]
    acc, best_1, total_1 = _nothing(1, VALUE_TILE)
    part_1 = ((part_row + row_1 - first_row) * heads + head_1) * splits
    for _i in span(0, (high + SPLIT - 1) // SPLIT - low // SPLIT):
        its_acc = tl.load(
            part_acc + part_1[:, None] * VALUE_SIZE + at[None, :], mask=mask, other=0.0
        )
        its_best_1 = tl.load(part_sums + part_1 * 2, mask=inside_1, other=float("-inf"))
        its_total_1 = tl.load(part_sums + part_1 * 2 + 1, mask=inside_1, other=0.0)
        acc, best_1, total_1 = _join(acc, best_1, total_1, its_acc, its_best_1, its_total_1)
        part_1 += 1
    _finish(
        acc, best_1, total_1, sinks, row_1, head_1, inside_1, out, heads, VALUE_SIZE, VALUE_TILE
    )


@triton.jit
def _tile(tiles):
    """Of this program's tile of rows: its sequence, first row, how many, the keys that they see,
    and the first of its rows among those with parts of this launch."""
    tile = tiles + tl.program_id(0).to(tl.int64) * _TILE_COLUMNS
    sequence = tl.load(tile).to(tl.int64)
    first_row = tl.load(tile + 1).to(tl.int64)
    rows = tl.load(tile + 2)
    low = tl.load(tile + 3)
    high = tl.load(tile + 4)
    part_row = (tl.load(tile + 5) - tl.load(tiles + 5)).to(tl.int64)
    return sequence, first_row, rows, low, high, part_row


@triton.jit
def _entries(first_row, rows, share, M: tl.constexpr, HEADS: tl.constexpr):
    """This program's key head; its entries' rows and query heads, and which of them there are."""
    tiles_of_group = tl.cdiv(share, HEADS)
    group = tl.program_id(1) // tiles_of_group
    at_M = tl.arange(0, M)
    row_M = at_M // HEADS
    head_M = tl.program_id(1) % tiles_of_group * HEADS + at_M % HEADS
    inside_M = (row_M < rows) & (head_M < share)
    return group, first_row + row_M, group * share + head_M, inside_M


@triton.jit
def _seen(rows_seen, row_M, inside_M):
    """The keys that each row sees, from `low` to before `high`, none where there is no row; and its
    own position."""
    low_M = tl.load(rows_seen + row_M * 3, mask=inside_M, other=0)
    high_M = tl.load(rows_seen + row_M * 3 + 1, mask=inside_M, other=0)
    position_M = tl.load(rows_seen + row_M * 3 + 2, mask=inside_M, other=0)
    return low_M, high_M, position_M


@triton.jit
def _queries(
    q, row_M, head_M, inside_M, heads, KEY_SIZE: tl.constexpr, KEY_MAIN: tl.constexpr,
    KEY_REST: tl.constexpr,
):  # fmt: skip
    """A tile's queries: the first KEY_MAIN values of each, and the rest, where there is one."""
    q_M = q + (row_M * heads + head_M) * KEY_SIZE
    at = tl.arange(0, KEY_MAIN)
    mask = inside_M[:, None] & (at < KEY_SIZE)[None, :]
    main = tl.load(q_M[:, None] + at[None, :], mask=mask, other=0.0)
    rest = main
    if KEY_REST > 0:
        at = KEY_MAIN + tl.arange(0, KEY_REST)
        mask = inside_M[:, None] & (at < KEY_SIZE)[None, :]
        rest = tl.load(q_M[:, None] + at[None, :], mask=mask, other=0.0)
    return main, rest


@triton.jit
def _shift(
    main, rest, key_offset, group, KEY_SIZE: tl.constexpr, KEY_MAIN: tl.constexpr,
    KEY_REST: tl.constexpr,
):  # fmt: skip
    """Each query's product with what keys are held less."""
    at = tl.arange(0, KEY_MAIN)
    offset = tl.load(key_offset + group * KEY_SIZE + at, mask=at < KEY_SIZE, other=0.0)
    shift_M = tl.sum(main.to(tl.float32) * offset[None, :], 1)
    if KEY_REST > 0:
        at = KEY_MAIN + tl.arange(0, KEY_REST)
        offset = tl.load(key_offset + group * KEY_SIZE + at, mask=at < KEY_SIZE, other=0.0)
        shift_M += tl.sum(rest.to(tl.float32) * offset[None, :], 1)
    return shift_M


@triton.jit
def _nothing(M: tl.constexpr, VALUE_TILE: tl.constexpr):
    """What was found where no key was seen: sums of values, best scores, sums of weights."""
    acc = tl.zeros((M, VALUE_TILE), tl.float32)
    return acc, tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)


@triton.jit
def _seen_by_all(low_M, high_M, low, high):
    """The keys that all rows see, of those that see any."""
    all_from = tl.maximum(tl.max(low_M, 0), low)
    all_to = tl.min(tl.where(high_M > low_M, high_M, 0x7FFFFFFF), 0)
    return all_from, tl.minimum(all_to, high)


@triton.jit
def _sees(at_S, held_S, low_M, high_M):
    """Which keys each row sees, (M, S)."""
    sees = (at_S[None, :] >= low_M[:, None]) & (at_S[None, :] < high_M[:, None])
    return sees & held_S[None, :]


@triton.jit
def _more_keys(
    acc, best_M, total_M, first, low, high, all_from, all_to,
    main, rest, shift_M, low_M, high_M, position_M, head_M, group,
    k, v, k_scale, v_scale, bias, blocks, scale, softcap, reach, k_block, v_block, scale_block,
    key_heads, KEY_SIZE: tl.constexpr, VALUE_SIZE: tl.constexpr, KEY_MAIN: tl.constexpr,
    KEY_REST: tl.constexpr, VALUE_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    VALUE_STEP: tl.constexpr, SHARED: tl.constexpr, M: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """With a tile of keys from `first` on: the sum of values by weights 2^(score - best), the best
    score, and the sum of the weights. Of the cache nothing is read that is not between `low` and
    `high`.

    What a row does not see is looked at only where there is such a thing, which changes no bit of
    what it does see.
    """
    # Weights times scales of codes may be too small for a float16.
    WEIGHTS: tl.constexpr = (
        tl.bfloat16 if v_scale is not None and main.dtype == tl.float16 else main.dtype
    )
    partly = (first < all_from) | (first + KEYS > all_to)
    at_S = first + tl.arange(0, KEYS)
    held_S = (at_S >= low) & (at_S < high)
    block_S = tl.load(blocks + at_S // BLOCK_SIZE, mask=held_S, other=0).to(tl.int64)
    # What is nowhere is not read, whoever asks for it.
    held_S = held_S & (block_S >= 0)
    inner_S = at_S % BLOCK_SIZE * key_heads + group
    k_S = k + block_S * k_block + inner_S * KEY_SIZE
    key_main = _keys(k_S, held_S, 0, KEY_SIZE, KEY_MAIN, main.dtype)
    scores = dot(main, key_main, tl.zeros((M, KEYS), tl.float32))
    if KEY_REST > 0:
        key_rest = _keys(k_S, held_S, KEY_MAIN, KEY_SIZE, KEY_REST, main.dtype)
        scores = dot(rest, key_rest, scores)
    if k_scale is not None:
        scale_S = block_S * scale_block + inner_S
        its = tl.load(k_scale + scale_S, mask=held_S, other=0.0).to(tl.float32)
        scores = scores * its[None, :]
    scores, unit = _scored(
        scores, at_S, held_S, shift_M, low_M, high_M, position_M, head_M, bias, scale, softcap,
        reach,
    )  # fmt: skip
    if partly:
        scores = tl.where(_sees(at_S, held_S, low_M, high_M), scores, float("-inf"))

    weights, best_M, total_M, kept_M = _weighed(scores, unit, best_M, total_M)
    if SHARED:
        value = tl.trans(key_main)
    else:
        v_S = v + block_S * v_block + inner_S * VALUE_STEP
        value = _values(v_S, held_S, VALUE_SIZE, VALUE_TILE, WEIGHTS)
    if v_scale is not None:
        its = tl.load(v_scale + scale_S, mask=held_S, other=0.0).to(tl.float32)
        weights = weights * its[None, :]
        if partly:
            weights = tl.where(_sees(at_S, held_S, low_M, high_M), weights, 0.0)
    weights = narrow(weights, WEIGHTS)
    acc = dot(weights, value, acc * kept_M[:, None])
    return acc, best_M, total_M


@triton.jit
def _scored(
    scores, at_S, held_S, shift_M, low_M, high_M, position_M, head_M, bias, scale, softcap, reach
):  # fmt: skip
    """Scores, capped, and with what is added for each distance; and what they are yet to be
    multiplied with."""
    unit = scale
    if shift_M is not None:
        scores = scores + shift_M[:, None]
    if softcap is not None or bias is not None:
        scores = scores * scale
        unit = 1.0
    if softcap is not None:
        # softcap * tanh(scores / softcap), by exp(2 x) = 2^(2 x log2(e))
        scores = softcap - 2.0 * softcap / (tl.exp2(scores * _TWICE_LOG2_E / softcap) + 1.0)
    if bias is not None:
        far = tl.minimum(tl.maximum(at_S[None, :] - position_M[:, None], -reach), reach)
        its_bias = bias + head_M[:, None] * (2 * reach + 1) + reach + far
        sees = _sees(at_S, held_S, low_M, high_M)
        scores += tl.load(its_bias, mask=sees, other=0.0) * _LOG2_E
    return scores, unit


@triton.jit
def _weighed(scores, unit, best_M, total_M):
    """Weights 2^(unit * score - best); the best score so far and the sum of weights, these
    included; and what those before are worth now. unit is above 0."""
    better_M = tl.maximum(best_M, tl.max(scores, 1) * unit)
    finite_M = tl.where(better_M == float("-inf"), 0.0, better_M)
    weights = tl.exp2(tl.fma(scores, unit, -finite_M[:, None]))
    kept_M = tl.exp2(best_M - finite_M)
    return weights, better_M, tl.fma(total_M, kept_M, tl.sum(weights, 1)), kept_M


@triton.jit
def _keys(
    k_S, held_S, FIRST: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr
):
    """Values FIRST onward of keys, (TILE, S)."""
    at = FIRST + tl.arange(0, TILE)
    mask = held_S[None, :] & (at < SIZE)[:, None]
    return _as(tl.load(k_S[None, :] + at[:, None], mask=mask, other=0.0), dtype)


@triton.jit
def _values(v_S, held_S, SIZE: tl.constexpr, TILE: tl.constexpr, dtype: tl.constexpr):
    """(S, TILE)."""
    at = tl.arange(0, TILE)
    mask = held_S[:, None] & (at < SIZE)[None, :]
    return _as(tl.load(v_S[:, None] + at[None, :], mask=mask, other=0.0), dtype)


@triton.jit
def _as(held, dtype: tl.constexpr):
    """What the cache holds in the queries' dtype; codes are small enough to be exact there."""
    if held.dtype == tl.int8:
        held = held.to(tl.float32)
    return held.to(dtype)


@triton.jit
def _join(acc, best_M, total_M, part_acc, part_best_M, part_total_M):
    """What was found so far, with the next split's part. A part without a key changes no bit. Fused
    sums are named, so that the compiler makes the same of them wherever this stands."""
    better_M = tl.maximum(best_M, part_best_M)
    finite_M = tl.where(better_M == float("-inf"), 0.0, better_M)
    kept_M = tl.exp2(best_M - finite_M)
    its_M = tl.exp2(part_best_M - finite_M)
    found_M = part_best_M != float("-inf")
    joined = tl.fma(acc, kept_M[:, None] + tl.zeros_like(acc), part_acc * its_M[:, None])
    acc = tl.where(found_M[:, None], joined, acc)
    joined_M = tl.fma(total_M, kept_M, part_total_M * its_M)
    total_M = tl.where(found_M, joined_M, total_M)
    return acc, better_M, total_M


@triton.jit
def _finish(
    acc, best_M, total_M, sinks, row_M, head_M, inside_M, out, heads,
    VALUE_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr,
):  # fmt: skip
    """Divides by the sum of the weights, to which a sink adds, and stores: zeros for a row that
    sees nothing."""
    if sinks is not None:
        sink_M = tl.load(sinks + head_M, mask=inside_M, other=0.0) * _LOG2_E
        better_M = tl.maximum(best_M, sink_M)
        kept_M = tl.exp2(best_M - better_M)
        total_M = tl.fma(total_M, kept_M, tl.exp2(sink_M - better_M))
        acc = acc * kept_M[:, None]
    at = tl.arange(0, VALUE_TILE)
    acc = tl.where((total_M == 0)[:, None], 0.0, acc / total_M[:, None])
    tl.store(
        out + (row_M * heads + head_M)[:, None] * VALUE_SIZE + at[None, :],
        narrow(acc, out.dtype.element_ty),
        mask=inside_M[:, None] & (at < VALUE_SIZE)[None, :],
    )
