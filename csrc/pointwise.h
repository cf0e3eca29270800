// Row-wise kernels: epilogues of products, norms, rotation, softmax. Inside in float32, rounded once at the end.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

// Calls body(offset, count) for whole vectors, then for the rest.
template <class Body> INLINE void each_vector(int n, Body body) {
    int i = 0;
    for (; i + 16 <= n; i += 16) body(i, 16);
    if (i < n) body(i, n - i);
}
template <class T> INLINE V take(const T* p, int count) { return count == 16 ? load(p) : load_some(p, count); }
template <class T> INLINE void put(T* p, V a, int count) { count == 16 ? store(p, a) : store_some(p, a, count); }
// As it reads back after being stored as T.
template <class T> INLINE V as_stored(V a) {
    T stored[16];
    store(stored, a);
    return load(stored);
}

template <class T> void add_bias(float* c, int n, const void* bias) {
    const T* b = static_cast<const T*>(bias);
    each_vector(n, [&](int i, int count) { put(c + i, add(take(c + i, count), take(b + i, count)), count); });
}

template <class T> void store_row(const float* c, int n, const void* bias, void* out_row) {
    const T* b = static_cast<const T*>(bias);
    T* out = static_cast<T*>(out_row);
    each_vector(n, [&](int i, int count) {
        V sum = take(c + i, count);
        put(out + i, b ? add(sum, take(b + i, count)) : sum, count);
    });
}

extern "C" float erff(float);

INLINE V activated(V x, ActivationKind kind) {
    const V half = all(0.5f), one = all(1.0f);
    switch (kind) {
        case CLAMPED_SWIGLU: break;  // of two
        case SILU: return mul(x, sigmoid(x));
        case RELU: return maximum(x, zero());
        case RELU_SQUARED: {
            const V positive = maximum(x, zero());
            return mul(positive, positive);
        }
        case GELU_TANH: {
            V inner = mul(all(0.7978845608f), fma(mul(mul(x, x), all(0.044715f)), x, x));
            return mul(mul(half, x), add(one, hyperbolic_tangent(inner)));
        }
        case GELU: {
            float lanes[16];
            store(lanes, mul(x, all(0.7071067812f)));
            for (float& lane : lanes) lane = erff(lane);
            return mul(mul(half, x), add(one, load(lanes)));
        }
    }
    return x;
}

INLINE V clamped_swiglu(V gate, V up, V alpha, V limit) {
    // The limit first: what is no number stays so.
    const V g = minimum(limit, gate), u = maximum(sub(zero(), limit), minimum(limit, up));
    return mul(add(u, all(1.0f)), mul(g, sigmoid(mul(alpha, g))));
}

template <class T> void gated(const float* gate, const float* up, int n, const Activation& activation, void* out_row) {
    T* out = static_cast<T*>(out_row);
    const ActivationKind kind = activation.kind;
    const V alpha = all(activation.alpha), limit = all(activation.limit);
    each_vector(n, [&](int i, int count) {
        const V g = take(gate + i, count), u = take(up + i, count);
        put(out + i, kind == CLAMPED_SWIGLU ? clamped_swiglu(g, u, alpha, limit) : mul(activated(g, kind), u), count);
    });
}

template <class T> void combine(const void* const* rows, const float* weights, int k, int n, const void* base_row, void* out_row) {
    const T* base = static_cast<const T*>(base_row);
    T* out = static_cast<T*>(out_row);
    each_vector(n, [&](int i, int count) {
        V sum = zero();
        for (int r = 0; r < k; r++) {
            V row = take(static_cast<const T*>(rows[r]) + i, count);
            sum = r ? fma(row, all(weights[r]), sum) : mul(row, all(weights[r]));
        }
        put(out + i, base ? add(take(base + i, count), sum) : sum, count);
    });
}

// A row of a matrix of elements W.
template <class T, class W> void scaled_row(const void* matrix_row, float multiplier, int n, void* out_row) {
    const W* row = static_cast<const W*>(matrix_row);
    T* out = static_cast<T*>(out_row);
    each_vector(n, [&](int i, int count) { put(out + i, mul(take(row + i, count), all(multiplier)), count); });
}

// Vectors by turns to one sum and to another, so that neither waits for itself alone.
template <class T> INLINE float sum_of_squares(const T* x, int n) {
    V even = zero(), odd = zero();
    auto square = [&](int i, int count, V sum) {
        const V v = take(x + i, count);
        return fma(v, v, sum);
    };
    int i = 0;
    for (; i + 32 <= n; i += 32) even = square(i, 16, even), odd = square(i + 16, 16, odd);
    if (i < n) even = square(i, min_of(16, n - i), even);
    if (i + 16 < n) odd = square(i + 16, n - i - 16, odd);
    return reduce_add(add(even, odd));
}

template <class T> INLINE float inverse_rms(const T* x, int n, float eps) {
    return 1.0f / __builtin_sqrtf(sum_of_squares(x, n) / float(n) + eps);
}

template <class T> INLINE float mean_of(const T* x, int n) {
    V even = zero(), odd = zero();
    for (int i = 0; i < n; i += 32) {
        even = add(even, take(x + i, min_of(16, n - i)));
        if (i + 16 < n) odd = add(odd, take(x + i + 16, min_of(16, n - i - 16)));
    }
    return reduce_add(add(even, odd)) / float(n);
}

// The variance: of squares of what is left of x less its mean.
template <class T> INLINE float inverse_deviation(const T* x, int n, float mean, float eps) {
    V even = zero(), odd = zero();
    auto square = [&](int i, V sum) {
        const int count = min_of(16, n - i);
        V less = all(mean);
        if (count < 16) {
            float lanes[16] = {};
            for (int j = 0; j < count; j++) lanes[j] = mean;
            less = load(lanes);
        }
        const V v = sub(take(x + i, count), less);
        return fma(v, v, sum);
    };
    for (int i = 0; i < n; i += 32) {
        even = square(i, even);
        if (i + 16 < n) odd = square(i + 16, odd);
    }
    return 1.0f / __builtin_sqrtf(reduce_add(add(even, odd)) / float(n) + eps);
}

// A normed value of a row of T with its weight of W: rounded before their product where both are of one type.
template <class T, class W> INLINE V weighted(V normed, V weight) {
    if constexpr (sizeof(T) == sizeof(W)) return mul(as_stored<T>(normed), weight);
    else return mul(normed, weight);
}

template <class T, class W>
void rms_norm(const void* x_row, const void* update_row, float multiplier, const float* scale, const void* weight, int n, float eps,
              bool less_mean, void* sum_row, void* out_row) {
    const T* x = static_cast<const T*>(x_row);
    const W* w = static_cast<const W*>(weight);
    T* out = static_cast<T*>(out_row);
    if (update_row) {
        const T* update = static_cast<const T*>(update_row);
        T* sum = static_cast<T*>(sum_row);
        const V factor = all(scale ? *scale : 1.0f);
        each_vector(n, [&](int i, int count) {
            const V added = fma(take(update + i, count), all(multiplier), take(x + i, count));
            put(sum + i, scale ? mul(as_stored<T>(added), factor) : added, count);
        });
        x = sum;
    }
    const float mean = less_mean ? mean_of(x, n) : 0.0f;
    const V less = all(mean), inverse = all(less_mean ? inverse_deviation(x, n, mean, eps) : inverse_rms(x, n, eps));
    each_vector(n, [&](int i, int count) {
        put(out + i, weighted<T, W>(mul(sub(take(x + i, count), less), inverse), take(w + i, count)), count);
    });
}

// Sixteen pairs of neighbours, as the first and the second of each; and back.
INLINE void unzip(V& a, V& b) {
    float pairs[32], first[16], second[16];
    store(pairs, a), store(pairs + 16, b);
    for (int i = 0; i < 16; i++) first[i] = pairs[2 * i], second[i] = pairs[2 * i + 1];
    a = load(first), b = load(second);
}
INLINE void zip(V& a, V& b) {
    float pairs[32], first[16], second[16];
    store(first, a), store(second, b);
    for (int i = 0; i < 16; i++) pairs[2 * i] = first[i], pairs[2 * i + 1] = second[i];
    a = load(pairs), b = load(pairs + 16);
}

template <class T, class W, class Out>
INLINE void rotate_to(const void* x_row, const void* weight, float eps, const float* cos, const float* sin, int half, bool interleaved,
                      int n, Out* out) {
    const T* x = static_cast<const T*>(x_row);
    const W* w = static_cast<const W*>(weight);
    const V inverse = w ? all(inverse_rms(x, n, eps)) : zero();
    auto value = [&](int i, int count) {
        V v = take(x + i, count);
        return w ? as_stored<T>(weighted<T, W>(mul(v, inverse), take(w + i, count))) : v;
    };
    if (interleaved)
        each_vector(half, [&](int i, int count) {
            // Up to 32 values: the first sixteen, and those behind them.
            const int low = min_of(2 * count, 16), high = 2 * count - low;
            V a = value(2 * i, low), b = high ? value(2 * i + 16, high) : zero();
            const V c = take(cos + i, count), s = take(sin + i, count);
            unzip(a, b);
            V first = sub(mul(a, c), mul(b, s)), second = add(mul(b, c), mul(a, s));
            zip(first, second);
            put(out + 2 * i, first, low);
            if (high) put(out + 2 * i + 16, second, high);
        });
    else
        each_vector(half, [&](int i, int count) {
            V a = value(i, count), b = value(half + i, count), c = take(cos + i, count), s = take(sin + i, count);
            put(out + i, sub(mul(a, c), mul(b, s)), count);
            put(out + half + i, add(mul(b, c), mul(a, s)), count);
        });
    each_vector(n - 2 * half, [&](int i, int count) { put(out + 2 * half + i, value(2 * half + i, count), count); });
}

template <class T, class W>
void rotate(const void* x, const void* weight, float eps, const float* cos, const float* sin, int half, bool interleaved, int n,
            void* out) {
    rotate_to<T, W>(x, weight, eps, cos, sin, half, interleaved, n, static_cast<T*>(out));
}

template <class T, class W>
void rotate_wide(const void* x, const void* weight, float eps, const float* cos, const float* sin, int half, bool interleaved, int n,
                 float* out) {
    rotate_to<T, W>(x, weight, eps, cos, sin, half, interleaved, n, out);
}

float exp_row(const float* x, int n, float shift, float factor, float* out) {
    V sum = zero();
    each_vector(n, [&](int i, int count) {
        V e = exponential(mul(sub(take(x + i, count), all(shift)), all(factor)));
        put(out + i, e, count);
        sum = add(sum, count == 16 ? e : where_lanes(0, count, e, zero()));
    });
    return reduce_add(sum);
}

// The index of the first of the values that is `wanted`, which is their largest: blocks that do not hold it are passed over.
INLINE int first_equal(const float* x, int n, float wanted) {
    constexpr int BLOCK = 8 * 16;
    int at = 0;
    for (; at + BLOCK <= n; at += BLOCK) {
        V top = load(x + at);
        for (int i = 16; i < BLOCK; i += 16) top = maximum(top, load(x + at + i));
        if (reduce_max(top) == wanted) break;
    }
    while (x[at] != wanted) at++;
    return at;
}

void softmax_stats(const float* x, int n, float factor, float* largest, int* at, double* sum) {
    // x - x is 0 for finite values and NaN for all others; maximum alone could lose a NaN.
    V top = all(-__builtin_inff()), poison = zero();
    each_vector(n, [&](int i, int count) {
        V v = count == 16 ? load(x + i) : where_lanes(0, count, load_some(x + i, count), all(x[0]));
        top = maximum(top, v);
        poison = add(poison, sub(v, v));
    });
    *largest = reduce_max(top), *at = 0;
    if (!(reduce_add(poison) == 0.0f)) {
        *largest = __builtin_nanf("");
        return;
    }
    *at = first_equal(x, n, *largest);
    if (!sum) return;
    float ignored[SUM_BLOCK];
    *sum = 0;
    for (int i = 0; i < n; i += SUM_BLOCK) *sum += exp_row(x + i, min_of(SUM_BLOCK, n - i), *largest, factor, ignored);
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
