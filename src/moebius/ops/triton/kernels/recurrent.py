"""Recurrent layers: a sequence's tokens one after the other, whatever step they came in.

`starts` and `stops` are a sequence's rows, `slots` where its state lies; without KEPT, and for a
sequence of no slot (below 0), it is zeros at first, and forgotten.
"""

import triton
import triton.language as tl

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
    k_at = tl.arange(0, K)
    v_at = tl.program_id(2) * V + tl.arange(0, V)
    of_k = k_at < key_dim
    of_v = v_at < value_dim
    if TILED:
        key_head = head % key_heads
    else:
        key_head = head // (value_heads // key_heads)
    q_at = key_head * key_dim + k_at
    keys = key_heads * key_dim
    held = of_k[:, None] & of_v[None, :]
    place = (head * key_dim + k_at[:, None]) * value_dim + v_at[None, :]
    if KEPT:
        slot = tl.load(slots + sequence)
        place += slot * state_stride
        held = held & (slot >= 0)
        S = tl.load(state + place, mask=held, other=0.0)
    else:
        S = tl.zeros((K, V), tl.float32)
    rate = tl.load(decay + head)
    bias = tl.load(dt_bias + head)
    for row in span(tl.load(starts + sequence), tl.load(stops + sequence)):
        values = qkv + row * qkv_stride
        q = tl.load(values + q_at, mask=of_k, other=0.0).to(tl.float32)
        k = tl.load(values + keys + q_at, mask=of_k, other=0.0).to(tl.float32)
        v = tl.load(values + 2 * keys + head * value_dim + v_at, mask=of_v, other=0.0)
        b = tl.load(gates + row * gates_stride + head).to(tl.float32)
        a = tl.load(gates + row * gates_stride + value_heads + head).to(tl.float32)
        q = q * (1.0 / tl.sqrt(tl.sum(q * q, 0) + 1e-6)) * scale
        k = k * (1.0 / tl.sqrt(tl.sum(k * k, 0) + 1e-6))
        S = S * tl.exp(rate * _softplus(a + bias))
        u = rounded(sigmoid(b), gates) * (v.to(tl.float32) - tl.sum(S * k[:, None], 0))
        S = S + k[:, None] * u[None, :]
        read = narrow(tl.sum(S * q[:, None], 0), out.dtype.element_ty)
        tl.store(out + (row * value_heads + head) * value_dim + v_at, read, mask=of_v)
    if KEPT:
        tl.store(state + place, S, mask=held)


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
