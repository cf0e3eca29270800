"""Routers: a program chooses a token's experts."""

import triton
import triton.language as tl

from moebius.ops.triton.language import sigmoid, span, tanh


@triton.jit
def _order(x):
    """Integers in the order of x, -0 equal to 0, and each NaN in a place of its own: int32."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _keys(x, index, count, inside):
    """Integers of x's order, equal numbers in that of falling indices, no two the same: int64.

    What is not `inside` has the least of all.
    """
    keys = (_order(x).to(tl.int64) << 32) + (count - 1 - index).to(tl.int64)
    return tl.where(inside, keys, -0x7FFFFFFFFFFFFFFF)


@triton.jit
def _softmax(x, inside, axis: tl.constexpr):
    x = tl.where(inside, x, float("-inf"))
    e = tl.exp(x - tl.max(x, axis))
    return e / tl.sum(e, axis)


@triton.jit
def _best_groups(
    choice, groups, size, MASKED: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """choice with MASKED for all but the experts of the KEPT best groups (DeepSeek-V2 and V3, arXiv
    2412.19437 section 2.1.2)."""
    by_group = tl.reshape(choice, (GROUPS, SIZE))
    at = tl.arange(0, SIZE)[None, :]
    here = at < size
    by_group = tl.where(here, by_group, float("-inf"))
    score = tl.max(by_group, 1)
    if TOP2:
        keys = _keys(by_group, at, SIZE, here)
        second = tl.where(keys == tl.max(keys, 1)[:, None], float("-inf"), by_group)
        score += tl.max(second, 1)
    group = tl.arange(0, GROUPS)
    keys = _keys(score, group, GROUPS, group < groups)
    kept = tl.zeros((GROUPS,), tl.int32)
    for _ in tl.static_range(KEPT):
        best = keys == tl.max(keys, 0)
        kept = tl.where(best, 1, kept)
        keys = tl.where(best, -0x7FFFFFFFFFFFFFFF, keys)
    by_group = tl.where(kept[:, None] != 0, by_group, MASKED)
    return tl.reshape(by_group, (GROUPS * SIZE,))


@triton.jit
def route(
    logits, stride, bias, expert_scale, weights, ids, groups, size, softcap, renorm_eps,
    renorm_least, scale,
    SCORE: tl.constexpr, WEIGHT: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr,
    SCALED: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, MASKED: tl.constexpr,
    TOP: tl.constexpr, TOP_PADDED: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """TOP experts and their weights of one row of logits, for `groups` groups of `size` experts.

    Numbers lie in GROUPS x SIZE places, powers of two, of which some are not `inside`.
    """
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, GROUPS * SIZE)
    expert = lane // SIZE * size + lane % SIZE
    inside = (lane // SIZE < groups) & (lane % SIZE < size)
    x = tl.load(logits + token * stride + expert, mask=inside, other=0.0)
    if CAPPED:
        x = softcap * tanh(x / softcap)
    if SCORE == "softmax":
        score = _softmax(x, inside, 0)
    elif SCORE == "sigmoid":
        score = sigmoid(x)
    else:
        score = x

    choice = score
    if BIASED:
        choice += tl.load(bias + expert, mask=inside, other=0.0).to(tl.float32)
    if GROUPS > 1:
        choice = _best_groups(choice, groups, size, MASKED, KEPT, TOP2, GROUPS, SIZE)
    keys = _keys(choice, expert, groups * size, inside)
    slot = tl.arange(0, TOP_PADDED)
    chosen = tl.zeros((TOP_PADDED,), tl.int64)
    values = tl.zeros((TOP_PADDED,), tl.float32)
    raw = WEIGHT == "raw" or WEIGHT == "renorm"
    of = score if raw else x
    for k in tl.static_range(TOP):
        best = keys == tl.max(keys, 0)
        here = slot == k
        chosen = tl.where(here, tl.sum(tl.where(best, expert, 0), 0), chosen)
        values = tl.where(here, tl.sum(tl.where(best, of, 0.0), 0), values)
        keys = tl.where(best, -0x7FFFFFFFFFFFFFFF, keys)

    there = slot < TOP
    if WEIGHT == "renorm":
        divisor = tl.sum(tl.where(there, values, 0.0), 0) + renorm_eps
        values = values / tl.where(divisor < renorm_least, renorm_least, divisor)
    elif WEIGHT == "softmax":
        values = _softmax(values, there, 0)
    elif WEIGHT == "sigmoid":
        values = sigmoid(values)
    values = values * scale
    if SCALED:
        values = values * tl.load(expert_scale + chosen, mask=there, other=0.0)
    tl.store(weights + token * TOP + slot, values, mask=there)
    tl.store(ids + token * TOP + slot, chosen, mask=there)


@triton.jit
def tally(
    logits, stride, ids, pairs, nats, experts, softcap,
    SIGMOID: tl.constexpr, CAPPED: tl.constexpr, TOP: tl.constexpr, TOP_PADDED: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """Counts one token's choices, and the entropy of its probabilities, which sigmoids are over
    their sum (DeepSeek-V3)."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    inside = expert < experts
    x = tl.load(logits + token * stride + expert, mask=inside, other=0.0)
    if CAPPED:
        x = softcap * tanh(x / softcap)
    if SIGMOID:
        p = tl.where(inside, sigmoid(x), 0.0)
        p = p / tl.sum(p, 0)
    else:
        p = _softmax(x, inside, 0)
    p = p.to(tl.float64)
    # 0 has none, and no number stays none.
    entropy = tl.where(p > 0, -p * tl.log(tl.where(p > 0, p, 1.0)), p)
    tl.store(nats + token, tl.sum(tl.where(inside, entropy, 0.0), 0))
    slot = tl.arange(0, TOP_PADDED)
    there = slot < TOP
    chosen = tl.load(ids + token * TOP + slot, mask=there, other=0)
    # Integers, whose sum has no order.
    tl.atomic_add(pairs + chosen, there.to(tl.int64), mask=there)


@triton.jit(do_not_specialize=["tokens"])
def tally_sums(nats, sums, tokens, BLOCK: tl.constexpr):
    """Adds the entropies of all tokens, in their order, and how many have one."""
    total = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.int32)
    for first in span(0, tokens, BLOCK):
        at = first + tl.arange(0, BLOCK)
        entropy = tl.load(nats + at, mask=at < tokens, other=float("nan"))
        finite = tl.abs(entropy) < float("inf")
        total += tl.sum(tl.where(finite, entropy, 0.0), 0)
        count += tl.sum(finite.to(tl.int32), 0)
    tl.store(sums, tl.load(sums) + total)
    tl.store(sums + 1, tl.load(sums + 1) + count.to(tl.float64))


@triton.jit
def within_capacity(
    weights, ids, starts, stops, out, top_k, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights of the first `capacity` choices of one expert in one sequence."""
    sequence = tl.program_id(0)
    expert = tl.program_id(1)
    end = tl.load(stops + sequence) * top_k
    taken = tl.zeros((), tl.int32)
    for first in span(tl.load(starts + sequence) * top_k, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mine = tl.load(ids + at, mask=at < end, other=-1) == expert
        place = taken + tl.cumsum(mine.to(tl.int32), 0) - 1
        fits = mine & (place < capacity)
        tl.store(out + at, tl.load(weights + at, mask=fits, other=0.0), mask=fits)
        taken += tl.sum(mine.to(tl.int32), 0)
