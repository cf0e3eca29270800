// Kernels of recurrent layers: convolutions over time, the gated delta rule, selective state spaces, gates. Each sequence is
// computed token by token.
//
// Lanes are channels, or columns of a state, and sums over the rows of a state go in one order: even rows, odd rows, and the
// two. So nothing here has other bits on another instruction set, or with other columns beside it.
#pragma once
#include <cstddef>

#include "pointwise.h"

namespace moebius {
namespace MOEBIUS_ISA {

template <int N> struct Taps {
    static constexpr int count = N;
};

INLINE V silu(V x) { return mul(x, sigmoid(x)); }

// log(1 + x) for x from 0 to 1, to about 1 unit in the last place: 2 artanh(z) with z = x / (2 + x), at most 1/3, by its series.
INLINE V log_of_one_and(V x) {
    const V z = div(x, add(all(2.0f), x)), square = mul(z, z);
    V p = all(1.0f / 15);
    for (int n = 13; n > 0; n -= 2) p = fma(p, square, all(1.0f / n));
    return mul(add(z, z), p);
}
// log(1 + exp(x)), which from 20 on is x to the last bit but a few.
INLINE V softplus(V x) {
    const V size = maximum(x, sub(zero(), x));
    return where_less(all(20.0f), x, x, add(maximum(zero(), x), log_of_one_and(exponential(sub(zero(), size)))));
}

INLINE V gate_of(V x, GateFunction function) {
    return function == SILU_GATE ? silu(x) : function == SIGMOID_GATE ? sigmoid(x) : function == SOFTPLUS_GATE ? softplus(x) : x;
}

// The numbers of taps that are known when it is compiled, or 0.
template <class Body> INLINE void with_taps(int taps, Body body) {
    if (taps == 4) body(Taps<4>());
    else if (taps == 3) body(Taps<3>());
    else body(Taps<0>());
}

template <class W> void conv_weights(const void* weight, int channels, int taps, float* __restrict out) {
    const W* __restrict w = static_cast<const W*>(weight);
    with_taps(taps, [&](auto known) __attribute__((always_inline)) {
        const int count = known.count ? known.count : taps;
        for (int i = 0; i < channels; i++)
            for (int tap = 0; tap < count; tap++) out[size_t(tap) * channels + i] = to_float(w[size_t(i) * count + tap]);
    });
}

template <class T> void causal_conv(const ConvSequence& s) {
    const T* x = static_cast<const T*>(s.x);
    T *state = static_cast<T*>(s.state), *out = static_cast<T*>(s.out);
    const int before = s.taps - 1;
    auto input = [&](int row) {  // a row of the step's or, before them, of the state's; null for zeros
        return row >= 0 ? x + row * s.x_stride : state ? state + (before + row) * s.stride : nullptr;
    };
    with_taps(s.taps, [&](auto known) __attribute__((always_inline)) {
        const int taps = known.count ? known.count : s.taps;
        for (int t = 0; t < s.rows; t++)
            each_vector(s.channels, [&](int i, int count) {
                V sum = s.bias ? take(s.bias + i, count) : zero();
                for (int tap = 0; tap < taps; tap++) {
                    const T* row = input(t - before + tap);
                    sum = fma(row ? take(row + i, count) : zero(), take(s.weights + size_t(tap) * s.channels + i, count), sum);
                }
                put(out + t * s.stride + i, s.silu ? silu(as_stored<T>(sum)) : sum, count);
            });
    });
    if (!state) return;
    // Rows of the state's own move to earlier places, the first ones first.
    for (int row = 0; row < before; row++) memmove(state + row * s.stride, input(s.rows - before + row), s.channels * sizeof(T));
}

// x / sqrt(sum of squares + 1e-6) * scale
template <class T> INLINE void unit_row(const T* x, int n, float scale, float* out) {
    const V inverse = all(1.0f / __builtin_sqrtf(sum_of_squares(x, n) + 1e-6f));
    each_vector(n, [&](int i, int count) { put(out + i, mul(mul(take(x + i, count), inverse), all(scale)), count); });
}

// Up to DELTA_ROWS rows, ready for all columns of a state.
struct DeltaRows {
    int count;
    const float *q, *k;  // (count, key_dim)
    float beta[DELTA_ROWS], kept[DELTA_ROWS];
    const float *channels, *met;  // what is kept of each channel, and that times k: (count, key_dim), where they decay by themselves
};

// Rows that are pages apart are not guessed by the processor.
INLINE void fetch(const void* p, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// What is kept of each channel of a row, and that times its key.
template <class T> INLINE void kept_channels(const DeltaHead& d, int row, const float* k, float* kept, float* met) {
    const T* f = static_cast<const T*>(d.channels) + row * d.channels_stride;
    const V decay = all(d.decay), lower = all(d.channel_decay.lower);
    each_vector(d.key_dim, [&](int i, int count) {
        const V x = add(take(f + i, count), take(d.channel_bias + i, count));
        V exponent = d.channel_decay.lower ? mul(lower, sigmoid(mul(sub(zero(), decay), x))) : mul(decay, softplus(x));
        if (d.channel_decay.rounded) exponent = as_stored<T>(exponent);
        const V part = exponential(exponent);
        put(kept + i, part, count);
        put(met + i, mul(part, take(k + i, count)), count);
    });
}

template <class T, bool Channels> INLINE DeltaRows delta_rows(const DeltaHead& d, int first, float* scratch) {
    DeltaRows rows;
    rows.count = min_of(DELTA_ROWS, d.rows - first);
    float *q = scratch, *k = scratch + DELTA_ROWS * d.key_dim;
    float b[DELTA_ROWS] = {}, a[DELTA_ROWS] = {};
    const float scale = 1.0f / __builtin_sqrtf(float(d.key_dim));
    for (int t = 0; t < rows.count; t++) {
        const size_t qkv = (first + t) * d.qkv_stride, gates = (first + t) * d.gates_stride;
        unit_row(static_cast<const T*>(d.q) + qkv, d.key_dim, scale, q + t * d.key_dim);
        unit_row(static_cast<const T*>(d.k) + qkv, d.key_dim, 1.0f, k + t * d.key_dim);
        b[t] = to_float(static_cast<const T*>(d.b)[gates]);
        if constexpr (!Channels) a[t] = to_float(static_cast<const T*>(d.a)[gates]);
        if (first + t + DELTA_ROWS >= d.rows) continue;
        const size_t later = qkv + DELTA_ROWS * d.qkv_stride;
        fetch(static_cast<const T*>(d.q) + later, d.key_dim * sizeof(T));
        fetch(static_cast<const T*>(d.k) + later, d.key_dim * sizeof(T));
        fetch(static_cast<const T*>(d.v) + later, d.columns * sizeof(T));
    }
    store(rows.beta, as_stored<T>(sigmoid(load(b))));
    if constexpr (Channels) {
        float *kept = k + DELTA_ROWS * d.key_dim, *met = kept + DELTA_ROWS * d.key_dim;
        for (int t = 0; t < rows.count; t++) kept_channels<T>(d, first + t, k + t * d.key_dim, kept + t * d.key_dim, met + t * d.key_dim);
        rows.channels = kept, rows.met = met;
    } else {
        store(rows.kept, exponential(mul(all(d.decay), softplus(add(load(a), all(d.dt_bias))))));
    }
    rows.q = q, rows.k = k;
    return rows;
}

// N vectors of columns of a state's row, of which the last has `count`: sums += key * row
template <int N> INLINE void delta_meet(const float* row, float key, int count, V* sums) {
    const V k = all(key);
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) sums[j] = fma(take(row + 16 * j, N > 1 ? 16 : count), k, sums[j]);
}
// row = kept * row + key * u, sums += query * row. What will be read next lies `ahead` of the row, if anywhere.
template <int N> INLINE void delta_pass(float* row, V kept, float key, const V* u, float query, int count, ptrdiff_t ahead, V* sums) {
    const V k = all(key), q = all(query);
#pragma GCC unroll 8
    for (int j = 0; j < N; j++) {
        const int lanes = N > 1 ? 16 : count;
        if (ahead) __builtin_prefetch(row + 16 * j + ahead, 1, 2);
        const V s = fma(k, u[j], mul(kept, take(row + 16 * j, lanes)));
        put(row + 16 * j, s, lanes);
        sums[j] = fma(s, q, sums[j]);
    }
}

// All rows in turn over N vectors of a state's columns from `column`; a vector alone may have less than 16.
template <class T, int N, bool Channels> INLINE void delta_columns(const DeltaHead& d, const DeltaRows& rows, int first, int column, int count) {
    float* const state = d.state + column;
    const size_t stride = d.state_stride;
    const ptrdiff_t ahead = d.next ? d.next - d.state : 0;
    const int lanes = N > 1 ? 16 : count;
    for (int t = 0; t < rows.count; t++) {
        const float *q = rows.q + t * d.key_dim, *k = rows.k + t * d.key_dim;
        const float *channels = Channels ? rows.channels + t * d.key_dim : nullptr, *meets = Channels ? rows.met + t * d.key_dim : k;
        const V beta = all(rows.beta[t]), all_kept = Channels ? zero() : all(rows.kept[t]);
        auto kept = [&](int i) __attribute__((always_inline)) { return Channels ? all(channels[i]) : all_kept; };
        V even[N], odd[N], u[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) even[j] = odd[j] = zero();
        const int pairs = d.key_dim / 2 * 2;
        for (int i = 0; i < pairs; i += 2) {
            delta_meet<N>(state + i * stride, meets[i], count, even);
            delta_meet<N>(state + (i + 1) * stride, meets[i + 1], count, odd);
        }
        if (pairs < d.key_dim) delta_meet<N>(state + pairs * stride, meets[pairs], count, even);

        const T* v = static_cast<const T*>(d.v) + (first + t) * d.qkv_stride + column;
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
            const V met = add(even[j], odd[j]);
            u[j] = mul(beta, sub(take(v + 16 * j, lanes), Channels ? met : mul(all_kept, met)));
            even[j] = odd[j] = zero();
        }
        for (int i = 0; i < pairs; i += 2) {
            delta_pass<N>(state + i * stride, kept(i), k[i], u, q[i], count, ahead, even);
            delta_pass<N>(state + (i + 1) * stride, kept(i + 1), k[i + 1], u, q[i + 1], count, ahead, odd);
        }
        if (pairs < d.key_dim) delta_pass<N>(state + pairs * stride, kept(pairs), k[pairs], u, q[pairs], count, ahead, even);

        T* out = static_cast<T*>(d.out) + (first + t) * d.out_stride + column;
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) put(out + 16 * j, add(even[j], odd[j]), lanes);
    }
}

#if defined(__AVX512F__)
constexpr int DELTA_VECTORS = 4;  // of columns at a time: their sums stay in registers, and their rows in the first cache
#else
constexpr int DELTA_VECTORS = 2;
#endif

template <class T, bool Channels> INLINE void delta_head(const DeltaHead& d, float* scratch) {
    for (int first = 0; first < d.rows; first += DELTA_ROWS) {
        const DeltaRows rows = delta_rows<T, Channels>(d, first, scratch);
        constexpr int COLUMNS = 16 * DELTA_VECTORS;
        int column = 0;
        for (; column + COLUMNS <= d.columns; column += COLUMNS) delta_columns<T, DELTA_VECTORS, Channels>(d, rows, first, column, 16);
        for (; column < d.columns; column += 16) delta_columns<T, 1, Channels>(d, rows, first, column, min_of(16, d.columns - column));
    }
}
template <class T> void gated_delta(const DeltaHead& d, float* scratch) { delta_head<T, false>(d, scratch); }
template <class T> void kimi_delta(const DeltaHead& d, float* scratch) { delta_head<T, true>(d, scratch); }

// Up to DELTA_ROWS rows of a selective state space: C reads the state as a query does, B writes to it as a key, and time steps
// stand where beta is.
template <class T> INLINE DeltaRows scan_rows(const ScanHead& d, int first, float* scratch) {
    DeltaRows rows;
    rows.count = min_of(DELTA_ROWS, d.rows - first);
    float *c = scratch, *b = scratch + DELTA_ROWS * d.state_dim, dt[DELTA_ROWS] = {};
    for (int t = 0; t < rows.count; t++) {
        const size_t row = (first + t) * d.xbc_stride;
        each_vector(d.state_dim, [&](int i, int count) {
            put(c + t * d.state_dim + i, take(static_cast<const T*>(d.c) + row + i, count), count);
            put(b + t * d.state_dim + i, take(static_cast<const T*>(d.b) + row + i, count), count);
        });
        dt[t] = to_float(static_cast<const T*>(d.dt)[(first + t) * d.dt_stride]);
    }
    const V step = as_stored<T>(softplus(as_stored<T>(add(load(dt), as_stored<T>(all(d.dt_bias))))));
    store(rows.beta, step);
    store(rows.kept, exponential(mul(step, all(d.decay))));
    rows.q = c, rows.k = b;
    return rows;
}

// All rows in turn over N vectors of a state's columns from `column`, as delta_columns.
template <class T, int N> INLINE void scan_columns(const ScanHead& d, const DeltaRows& rows, int first, int column, int count) {
    float* const state = d.state + column;
    const size_t stride = d.state_stride;
    const ptrdiff_t ahead = d.next ? d.next - d.state : 0;
    const int lanes = N > 1 ? 16 : count, pairs = d.state_dim / 2 * 2;
    for (int t = 0; t < rows.count; t++) {
        const float *c = rows.q + t * d.state_dim, *b = rows.k + t * d.state_dim;
        const T* x = static_cast<const T*>(d.x) + (first + t) * d.xbc_stride + column;
        const V kept = all(rows.kept[t]);
        V even[N], odd[N], u[N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
            even[j] = odd[j] = zero();
            u[j] = mul(all(rows.beta[t]), take(x + 16 * j, lanes));
        }
        for (int i = 0; i < pairs; i += 2) {
            delta_pass<N>(state + i * stride, kept, b[i], u, c[i], count, ahead, even);
            delta_pass<N>(state + (i + 1) * stride, kept, b[i + 1], u, c[i + 1], count, ahead, odd);
        }
        if (pairs < d.state_dim) delta_pass<N>(state + pairs * stride, kept, b[pairs], u, c[pairs], count, ahead, even);
        T* out = static_cast<T*>(d.out) + (first + t) * d.out_stride + column;
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) put(out + 16 * j, fma(take(x + 16 * j, lanes), all(d.skip), add(even[j], odd[j])), lanes);
    }
}

template <class T> void selective_scan(const ScanHead& d, float* scratch) {
    for (int first = 0; first < d.rows; first += DELTA_ROWS) {
        const DeltaRows rows = scan_rows<T>(d, first, scratch);
        constexpr int COLUMNS = 16 * DELTA_VECTORS;
        int column = 0;
        for (; column + COLUMNS <= d.columns; column += COLUMNS) scan_columns<T, DELTA_VECTORS>(d, rows, first, column, 16);
        for (; column < d.columns; column += 16) scan_columns<T, 1>(d, rows, first, column, min_of(16, d.columns - column));
    }
}

template <class T, class W>
void gated_norm(const void* x_row, const void* gate_row, const void* weight, float eps, int heads, int n, GateFunction gate, void* out_row) {
    const W* w = static_cast<const W*>(weight);
    for (int h = 0; h < heads; h++) {
        const T *x = static_cast<const T*>(x_row) + size_t(h) * n, *g = static_cast<const T*>(gate_row) + size_t(h) * n;
        T* out = static_cast<T*>(out_row) + size_t(h) * n;
        const V inverse = all(inverse_rms(x, n, eps));
        each_vector(n, [&](int i, int count) {
            V normed = weighted<T, W>(mul(take(x + i, count), inverse), take(w + i, count));
            if constexpr (sizeof(T) == sizeof(W)) normed = as_stored<T>(normed);
            put(out + i, mul(normed, gate_of(take(g + i, count), gate)), count);
        });
    }
}

template <class T, class W>
void grouped_norm(const void* x_row, const void* gate_row, const void* weight, float eps, int groups, int n, float* scratch, void* out_row) {
    for (int group = 0; group < groups; group++) {
        const size_t at = size_t(group) * n;
        const T *x = static_cast<const T*>(x_row) + at, *g = static_cast<const T*>(gate_row) + at;
        const W* w = static_cast<const W*>(weight) + at;
        T* out = static_cast<T*>(out_row) + at;
        each_vector(n, [&](int i, int count) { put(scratch + i, mul(take(x + i, count), silu(take(g + i, count))), count); });
        const V inverse = all(inverse_rms(scratch, n, eps));
        each_vector(n, [&](int i, int count) { put(out + i, weighted<T, W>(mul(take(scratch + i, count), inverse), take(w + i, count)), count); });
    }
}

template <class T> void gate_head(const void* x_head, const void* gates, int n, bool single, GateFunction gate, void* out_head) {
    const T *x = static_cast<const T*>(x_head), *g = static_cast<const T*>(gates);
    T* out = static_cast<T*>(out_head);
    const V one = single ? as_stored<T>(gate_of(all(to_float(*g)), gate)) : zero();
    each_vector(n, [&](int i, int count) {
        put(out + i, mul(take(x + i, count), single ? one : as_stored<T>(gate_of(take(g + i, count), gate))), count);
    });
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
