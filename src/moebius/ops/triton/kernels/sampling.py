"""From logits to tokens. A row is cut into parts of PART ids, wherever it stands: a program each of
them, then one for the row, which joins what is known of its parts.

Logits are float32 (L, size), contiguous; `rows` says which are asked about. What a part holds that
is not finite is NaN from there on.
"""

import triton
import triton.language as tl

from moebius.ops.sampling import ALL_BANNED, LOWEST, NOT_FINITE, UNDECIDED
from moebius.ops.triton.language import span

_INFINITY = tl.constexpr(float("inf"))
_NAN = tl.constexpr(float("nan"))
_NO_KEY = tl.constexpr(-(2**63))
_LOWEST = tl.constexpr(LOWEST)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_ALL_BANNED = tl.constexpr(ALL_BANNED)
_UNDECIDED = tl.constexpr(UNDECIDED)
# Arguments of `shape` that may begin anywhere in a tensor. Compiled once for all, it has the same
# roundings for few and for many.
_COLUMNS = ("places", "kept", "bias", "repetition", "penalty", "banned")


@triton.jit
def softmax_parts(
    logits, rows, heats, largest, ids, sums, size, parts, SUMS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Of each part the largest logit, its lowest id, and the sum of exp((logit - largest) / heat)
    in float64."""
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at, x = _part_of_row(logits, tl.load(rows + place), part, size, PART)
    top = tl.max(x, 0)
    first = tl.min(tl.where(x == top, at, size), 0)
    into = place * parts + part
    if SUMS:
        weights = tl.exp((x - top) / tl.load(heats + place))
        tl.store(sums + into, tl.sum(weights.to(tl.float64), 0))
    broken = tl.max(((at < size) & ~(tl.abs(x) < _INFINITY)).to(tl.int32), 0)
    tl.store(largest + into, tl.where(broken > 0, _NAN, top))
    tl.store(ids + into, first)


@triton.jit
def best(largest, ids, out, parts, PARTS: tl.constexpr):
    """The id of the largest logit, the lowest of several; or why there is none."""
    place = tl.program_id(0).to(tl.int64)
    _, top, broken = _tops(largest, place, parts, PARTS)
    part = tl.arange(0, PARTS)
    tops = tl.load(largest + place * parts + part, mask=part < parts, other=-_INFINITY)
    first = tl.load(ids + place * parts + part, mask=part < parts, other=0)
    id = tl.min(tl.where(tops == top, first, 2**31 - 1), 0)
    tl.store(out + place, _drawn(id, top, broken))


@triton.jit
def log_sum(largest, sums, heats, out, parts, PARTS: tl.constexpr):
    """logsumexp(logits / heat) in float64; NaN where a logit is not finite."""
    place = tl.program_id(0).to(tl.int64)
    tops, top, broken = _tops(largest, place, parts, PARTS)
    heat = tl.load(heats + place)
    total = tl.sum(_weights(sums, place, tops, top, heat, parts, PARTS), 0)
    value = top.to(tl.float64) / heat.to(tl.float64) + tl.log(total)
    tl.store(out + place, tl.where(broken, _NAN, value))


@triton.jit
def draw(
    logits, rows, heats, uniforms, largest, sums, out, size, parts,
    PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """First the part, then the id in it, at which the running sum exceeds uniform * all."""
    place = tl.program_id(0).to(tl.int64)
    tops, top, broken = _tops(largest, place, parts, PARTS)
    heat = tl.load(heats + place)
    weights = _weights(sums, place, tops, top, heat, parts, PARTS)
    wanted = tl.load(uniforms + place) * tl.sum(weights, 0)
    running = tl.cumsum(weights, 0)
    part = _first_above(running, weights, wanted, PARTS)
    before = tl.max(tl.where(tl.arange(0, PARTS) < part, running, 0.0), 0)
    # As the part's own sum was made, or it might hold nothing of what is looked for in it.
    own_top = tl.max(tl.where(tl.arange(0, PARTS) == part, tops, -_INFINITY), 0)
    _, x = _part_of_row(logits, tl.load(rows + place), part, size, PART)
    weights = tl.exp((x - own_top) / heat).to(tl.float64)
    weights *= tl.exp(((own_top - top) / heat).to(tl.float64))
    inside = _first_above(before + tl.cumsum(weights, 0), weights, wanted, PART)
    tl.store(out + place, _drawn(part * PART + inside, top, broken))


@triton.jit
def draw_of_top(
    values, ids, starts, counts, log_sums, numbers, out, size, BLOCK: tl.constexpr,
):  # fmt: skip
    """As moebius.ops.draws, from up to BLOCK candidates a row. `numbers` (rows, 5) float64:
    temperature, uniform, top_p, min_p, and 1 where there are no other candidates."""
    place = tl.program_id(0).to(tl.int64)
    own = numbers + place * 5
    heat = tl.load(own)
    uniform = tl.load(own + 1)
    top_p = tl.load(own + 2)
    min_p = tl.load(own + 3)
    count = tl.load(counts + place)
    whole = (tl.load(own + 4) > 0) | (count == size)
    at = tl.arange(0, BLOCK)
    from_here = tl.load(starts + place) + at
    x = tl.load(values + from_here, mask=at < count, other=-_INFINITY)
    id = tl.load(ids + from_here, mask=at < count, other=0)
    top = tl.max(x, 0)
    weights = tl.exp((x.to(tl.float64) - top) / heat)
    running = tl.cumsum(weights, 0)
    last = tl.sum(tl.where(at == count - 1, weights, 0.0), 0)
    log_sum = tl.load(log_sums + place)
    most = tl.log(tl.full([], size, tl.float64))
    behind = tl.minimum(tl.maximum(log_sum - top.to(tl.float64) / heat, 0.0), most)
    total = tl.where(whole | (last == 0), tl.sum(weights, 0), tl.exp(behind))
    kept = (at < count) & (running - weights < top_p * total) & (weights >= min_p)
    number = tl.sum(kept.to(tl.int32), 0)
    wanted = uniform * tl.max(tl.where(kept, running, 0.0), 0)
    before = tl.sum((kept & (running <= wanted)).to(tl.int32), 0)
    found = tl.sum(tl.where(at == tl.minimum(before, number - 1), id, 0), 0)
    found = tl.where((number == count) & ~whole, _UNDECIDED, found)
    tl.store(out + place, _drawn(found, top, log_sum != log_sum))


@triton.jit
def _drawn(id, top, broken):
    """The id, or what stands for it where none is drawn."""
    id = tl.where(top == _LOWEST, _ALL_BANNED, id)
    return tl.where(broken, _NOT_FINITE, id)


@triton.jit
def top_parts(logits, rows, counts, keys, size, parts, most, PART: tl.constexpr):
    """The `counts` largest logits of each part as keys, largest first, in room for `most`."""
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at, x = _part_of_row(logits, tl.load(rows + place), part, size, PART)
    # Bits made to order like integers, then the id counted backwards: no two keys are equal, and
    # of equal logits the lowest id comes first. Adding 0 makes -0.0 equal to 0.0.
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    left = tl.where(at < size, (ordered << 32) + (size - 1 - at), _NO_KEY)
    into = keys + (place * parts + part) * most
    count = tl.load(counts + place)
    for rank in span(0, count):
        key = tl.max(left, 0)
        tl.store(into + rank, key)
        left = tl.where(left == key, _NO_KEY, left)


@triton.jit
def top_of_parts(
    keys, logits, rows, starts, counts, values, ids, size, parts, most, MANY: tl.constexpr,
):  # fmt: skip
    """The `counts` largest of the keys of a row's parts: their logits and ids, from `starts` on."""
    place = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + place)
    at = tl.arange(0, MANY)
    there = (at < parts * most) & (at % most < count)
    left = tl.load(keys + place * parts * most + at, mask=there, other=_NO_KEY)
    row = logits + tl.load(rows + place) * size
    into = tl.load(starts + place)
    for rank in span(0, count):
        key = tl.max(left, 0)
        left = tl.where(left == key, _NO_KEY, left)
        id = size - 1 - (key & 0xFFFFFFFF)
        tl.store(ids + into + rank, id)
        tl.store(values + into + rank, tl.load(row + id))


@triton.jit
def count_before(logits, rows, tokens, counts, size, parts, PART: tl.constexpr):
    """How many ids of a part come before a row's token: the larger ones, and lower ids of the
    same."""
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = tl.load(rows + place)
    token = tl.load(tokens + place)
    at, x = _part_of_row(logits, row, part, size, PART)
    own = tl.load(logits + row * size + token)
    before = (x > own) | ((x == own) & (at < token))
    tl.store(counts + place * parts + part, tl.sum((before & (at < size)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=_COLUMNS)
def shape(
    logits, places, kept, bias, repetition, penalty, banned, count, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts at `places`, each there once, what becomes of the logits `kept`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(kept + at, mask=inside, other=0.0).to(tl.float64)
    x += tl.load(bias + at, mask=inside, other=0.0)
    factor = tl.load(repetition + at, mask=inside, other=1.0)
    x = tl.where(x > 0, x / factor, x * factor)
    after = (x - tl.load(penalty + at, mask=inside, other=0.0)).to(tl.float32)
    after = tl.where(tl.load(banned + at, mask=inside, other=0.0) != 0, _LOWEST, after)
    tl.store(logits + tl.load(places + at, mask=inside, other=0), after, mask=inside)


@triton.jit
def allow(logits, rows, words, kept, size, num_words, PART: tl.constexpr):
    """Keeps the rows, and bounds all logits by LOWEST but those whose bit is set."""
    place = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = tl.load(rows + place)
    at, x = _part_of_row(logits, row, part, size, PART)
    inside = at < size
    tl.store(kept + place * size + at, x, mask=inside)
    word = tl.load(words + place * num_words + at // 32, mask=inside, other=0)
    allowed = ((word >> (at % 32)) & 1) != 0
    # NaN is not above, and stays.
    bounded = tl.where((x > _LOWEST) & ~allowed, _LOWEST, x)
    tl.store(logits + row * size + at, bounded, mask=inside)


@triton.jit
def _part_of_row(logits, row, part, size, PART: tl.constexpr):
    """Ids of a part of a row and their logits, -infinity where there are none."""
    at = part * PART + tl.arange(0, PART)
    return at, tl.load(logits + row * size + at, mask=at < size, other=-_INFINITY)


@triton.jit
def _tops(largest, place, parts, PARTS: tl.constexpr):
    """The largest logit of each part and of all, and whether any is not finite."""
    part = tl.arange(0, PARTS)
    tops = tl.load(largest + place * parts + part, mask=part < parts, other=-_INFINITY)
    broken = tl.max((tops != tops).to(tl.int32), 0) > 0
    return tops, tl.max(tops, 0), broken


@triton.jit
def _weights(sums, place, tops, top, heat, parts, PARTS: tl.constexpr):
    """The sums of parts, from their own largest logits to that of the row."""
    part = tl.arange(0, PARTS)
    own = tl.load(sums + place * parts + part, mask=part < parts, other=0.0)
    return own * tl.exp(((tops - top) / heat).to(tl.float64))


@triton.jit
def _first_above(running, weights, wanted, BLOCK: tl.constexpr):
    """The first place with a weight whose running sum exceeds `wanted`; where rounding leaves all
    sums just short of it, the last with a weight."""
    at = tl.arange(0, BLOCK)
    first = tl.min(tl.where((running > wanted) & (weights > 0), at, BLOCK), 0)
    last = tl.max(tl.where(weights > 0, at, 0), 0)
    return tl.where(first < BLOCK, first, last)
