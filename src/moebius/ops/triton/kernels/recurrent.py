"""Recurrent layers: a sequence's tokens one after the other, whatever step they came in.

`starts` and `stops` are a sequence's rows, `slots` where its state lies; without KEPT, and for a
sequence of no slot (below 0), it is zeros at first, and forgotten.
"""

import triton
import triton.language as tl

from moebius.ops.triton.kernels.rows import norm_and_store
from moebius.ops.triton.language import narrow, rounded, sigmoid, span


@triton.jit
def causal_conv(
    x, x_stride, weight, bias, state, state_stride, sequences, starts, slots, out, columns,
    KEPT: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row: a sum over the rows before it, and before these over the state."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    sequence = tl.load(sequences + row)
    since = row - tl.load(starts + sequence)
    total = tl.zeros((BLOCK,), tl.float32)
    if BIASED:
        total += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS):
        back = TAPS - 1 - tap
        value = tl.load(x + (row - back) * x_stride + at, mask=inside & (since >= back), other=0.0)
        if KEPT and back > 0:
            # The state's row `since + tap` is `back` rows before this one.
            slot = tl.load(slots + sequence)
            kept = state + slot * state_stride + (since + tap) * columns
            value += tl.load(kept + at, mask=inside & (since < back) & (slot >= 0), other=0.0)
        factor = tl.load(weight + at * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        total += factor * value.to(tl.float32)
    if SILU:
        total = rounded(total, out)
        total = total * sigmoid(total)
    tl.store(out + row * columns + at, narrow(total, out.dtype.element_ty), mask=inside)


@triton.jit
def keep_inputs(
    x, x_stride, state, state_stride, starts, stops, slots, columns, TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The last TAPS - 1 inputs of a sequence, oldest first, of which the state may hold some."""
    sequence = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + sequence)
    inside = (at < columns) & (slot >= 0)
    stop = tl.load(stops + sequence)
    count = stop - tl.load(starts + sequence)
    kept = state + slot * state_stride + at
    for place in tl.static_range(TAPS - 1):
        back = TAPS - 1 - place
        new = tl.load(x + (stop - back) * x_stride + at, mask=inside & (count >= back), other=0.0)
        # Read before it is written: it lies behind `place`.
        old = tl.load(kept + (count + place) * columns, mask=inside & (count < back), other=0.0)
        tl.store(kept + place * columns, tl.where(count >= back, new, old), mask=inside)


@triton.jit
def gated_delta(
    qkv, qkv_stride, gates, gates_stride, decay, dt_bias, state, state_stride, starts, stops, slots,
    out, key_heads, value_heads, key_dim, value_dim, scale,
    KEPT: tl.constexpr, TILED: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """V columns of one head's state of one sequence, which stay in registers all the while."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    v_at = tl.program_id(2) * V + tl.arange(0, V)
    place, held = _place(slots + sequence, state_stride, head, key_dim, value_dim, v_at, KEPT, K)
    S = _state(state + place, held, KEPT, K, V)
    key_head = _key_head(head, key_heads, value_heads, TILED)
    rate = tl.load(decay + head)
    bias = tl.load(dt_bias + head)
    for row in span(tl.load(starts + sequence), tl.load(stops + sequence)):
        q, k, v = _heads(
            qkv + row * qkv_stride, key_head, key_heads, head, key_dim, value_dim, v_at, scale, K
        )
        b = tl.load(gates + row * gates_stride + head).to(tl.float32)
        a = tl.load(gates + row * gates_stride + value_heads + head).to(tl.float32)
        S = S * tl.exp(rate * _softplus(a + bias))
        S, read = _ruled(S, q, k, v, rounded(sigmoid(b), gates))
        into = out + (row * value_heads + head) * value_dim + v_at
        tl.store(into, narrow(read, out.dtype.element_ty), mask=v_at < value_dim)
    if KEPT:
        tl.store(state + place, S, mask=held)


@triton.jit
def kimi_delta(
    qkv, qkv_stride, beta, beta_stride, channels, channels_stride, decay, dt_bias, state,
    state_stride, starts, stops, slots, out, key_heads, value_heads, key_dim, value_dim, scale,
    lower, BOUNDED: tl.constexpr, ROUNDED: tl.constexpr, KEPT: tl.constexpr, TILED: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The same where each row of a state decays by itself."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    k_at = tl.arange(0, K)
    v_at = tl.program_id(2) * V + tl.arange(0, V)
    place, held = _place(slots + sequence, state_stride, head, key_dim, value_dim, v_at, KEPT, K)
    S = _state(state + place, held, KEPT, K, V)
    key_head = _key_head(head, key_heads, value_heads, TILED)
    of_channel = head * key_dim + k_at
    rate = tl.load(decay + head)
    bias = tl.load(dt_bias + of_channel, mask=k_at < key_dim, other=0.0)
    for row in span(tl.load(starts + sequence), tl.load(stops + sequence)):
        q, k, v = _heads(
            qkv + row * qkv_stride, key_head, key_heads, head, key_dim, value_dim, v_at, scale, K
        )
        b = tl.load(beta + row * beta_stride + head).to(tl.float32)
        f = channels + row * channels_stride + of_channel
        f = tl.load(f, mask=k_at < key_dim, other=0.0).to(tl.float32) + bias
        if BOUNDED:
            exponent = lower * sigmoid(-rate * f)
        else:
            exponent = rate * _softplus(f)
        if ROUNDED:
            exponent = rounded(exponent, channels)
        S = S * tl.exp(exponent)[:, None]
        S, read = _ruled(S, q, k, v, rounded(sigmoid(b), beta))
        into = out + (row * value_heads + head) * value_dim + v_at
        tl.store(into, narrow(read, out.dtype.element_ty), mask=v_at < value_dim)
    if KEPT:
        tl.store(state + place, S, mask=held)


@triton.jit
def selective_scan(
    xbc, xbc_stride, steps, steps_stride, decay, dt_bias, skip, state, state_stride, starts, stops,
    slots, out, heads, groups, head_dim, state_dim,
    KEPT: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """P columns of one head's state of one sequence, as above."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    m_at = tl.arange(0, M)
    p_at = tl.program_id(2) * P + tl.arange(0, P)
    of_m = m_at < state_dim
    of_p = p_at < head_dim
    place, held = _place(slots + sequence, state_stride, head, state_dim, head_dim, p_at, KEPT, M)
    S = _state(state + place, held, KEPT, M, P)
    b_at = heads * head_dim + head // (heads // groups) * state_dim + m_at
    rate = tl.load(decay + head)
    bias = rounded(tl.load(dt_bias + head), steps)
    through = tl.load(skip + head)
    for row in span(tl.load(starts + sequence), tl.load(stops + sequence)):
        values = xbc + row * xbc_stride
        x = tl.load(values + head * head_dim + p_at, mask=of_p, other=0.0).to(tl.float32)
        b = tl.load(values + b_at, mask=of_m, other=0.0).to(tl.float32)
        c = tl.load(values + groups * state_dim + b_at, mask=of_m, other=0.0).to(tl.float32)
        dt = rounded(tl.load(steps + row * steps_stride + head).to(tl.float32) + bias, steps)
        dt = rounded(_softplus(dt), steps)
        S = S * tl.exp(dt * rate) + b[:, None] * (dt * x)[None, :]
        read = tl.sum(S * c[:, None], 0) + through * x
        into = out + (row * heads + head) * head_dim + p_at
        tl.store(into, narrow(read, out.dtype.element_ty), mask=of_p)
    if KEPT:
        tl.store(state + place, S, mask=held)


@triton.jit
def _place(
    slot, state_stride, head, rows, columns, column, KEPT: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Where a head's state has these columns, of `rows` <= R by `columns` numbers; and which of
    them it keeps."""
    row = tl.arange(0, R)
    place = (head * rows + row[:, None]) * columns + column[None, :]
    held = (row < rows)[:, None] & (column < columns)[None, :]
    if KEPT:
        own = tl.load(slot)
        place += own * state_stride
        held = held & (own >= 0)
    return place, held


@triton.jit
def _state(at, held, KEPT: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    if KEPT:
        S = tl.load(at, mask=held, other=0.0)
    else:
        S = tl.zeros((R, C), tl.float32)
    return S


@triton.jit
def _key_head(head, key_heads, value_heads, TILED: tl.constexpr):
    if TILED:
        found = head % key_heads
    else:
        found = head // (value_heads // key_heads)
    return found


@triton.jit
def _heads(
    values, key_head, key_heads, head, key_dim, value_dim, v_at, scale, K: tl.constexpr
):  # fmt: skip
    """Of one row a head's query and key, of length 1, the former times `scale`, and its value."""
    at = tl.arange(0, K)
    of_k = at < key_dim
    at = key_head * key_dim + at
    keys = key_heads * key_dim
    q = tl.load(values + at, mask=of_k, other=0.0).to(tl.float32)
    k = tl.load(values + keys + at, mask=of_k, other=0.0).to(tl.float32)
    v = tl.load(values + 2 * keys + head * value_dim + v_at, mask=v_at < value_dim, other=0.0)
    q = q * (1.0 / tl.sqrt(tl.sum(q * q, 0) + 1e-6)) * scale
    k = k * (1.0 / tl.sqrt(tl.sum(k * k, 0) + 1e-6))
    return q, k, v.to(tl.float32)


@triton.jit
def _ruled(S, q, k, v, beta):
    """The delta rule, once the state has decayed: the state after it, and what a query reads."""
    u = beta * (v - tl.sum(S * k[:, None], 0))
    S = S + k[:, None] * u[None, :]
    return S, tl.sum(S * q[:, None], 0)


@triton.jit
def gated_norm(
    x, gates, gates_stride, weight, out, heads, size, eps,
    WEIGHT_WIDE: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of one row, normed and then gated."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < size
    place = (row * heads + head) * size + at
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / size + eps))
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT_WIDE:
        value = value * factor
    else:
        value = rounded(rounded(value, x) * factor, x)
    gate = tl.load(gates + row * gates_stride + head * size + at, mask=inside, other=0.0)
    value = value * _gated(gate.to(tl.float32), GATE)
    tl.store(out + place, narrow(value, out.dtype.element_ty), mask=inside)


@triton.jit
def grouped_norm(
    x, gates, gates_stride, weight, out, groups, size, eps,
    WEIGHT_WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of one row, gated and then normed."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * size
    at = tl.arange(0, BLOCK)
    inside = at < size
    place = row * groups * size + first
    value = tl.load(x + place + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gates + row * gates_stride + first + at, mask=inside, other=0.0)
    value = value * _gated(gate.to(tl.float32), "silu")
    norm_and_store(value, weight + first, out + place, size, eps, WEIGHT_WIDE, False, BLOCK)


@triton.jit
def gate_heads(
    x, row_stride, head_stride, gates, gates_stride, out, heads, size, stride,
    SINGLE: tl.constexpr, GATE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one row times their gates, one a head where these are SINGLE."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (at < size)
    column = head * stride + (at * 0 if SINGLE else at)
    gate = tl.load(gates + row * gates_stride + column, mask=inside, other=0.0)
    gate = rounded(_gated(gate.to(tl.float32), GATE), x)
    value = tl.load(x + row * row_stride + head * head_stride + at, mask=inside, other=0.0)
    value = narrow(value.to(tl.float32) * gate, out.dtype.element_ty)
    tl.store(out + (row * heads + head) * size + at, value, mask=inside)


@triton.jit
def _gated(x, GATE: tl.constexpr):
    if GATE == "silu":
        x = x * sigmoid(x)
    elif GATE == "sigmoid":
        x = sigmoid(x)
    elif GATE == "softplus":
        x = _softplus(x)
    return x


@triton.jit
def _softplus(x):
    """ln(1 + e^x), as max(x, 0) + ln(1 + e) with e = e^-|x| up to 1: to float32's own precision,
    which a logarithm near 1 is not."""
    e = tl.exp(-tl.abs(x))
    # ln(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3: eight terms of its series.
    s = e / (2 + e)
    z = s * s
    series = z * (1 / 9 + z * (1 / 11 + z * (1 / 13 + z * (1 / 15))))
    series = 1 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + series)))
    return tl.where(x > 0, x, 0.0) + 2 * s * series
