// What meets a tile of keys on sixteen registers of eight lanes. Queries are widened to float32 first; so are a tile's keys
// and values where many rows meet it; few rows widen them in registers. Weights are not rounded.
#pragma once
#include "attention.h"
#include "product_8.h"

namespace moebius {
namespace MOEBIUS_ISA {

// Rows, and vectors of eight keys or dimensions, whose sums fill twelve registers.
constexpr int WIDE_ROWS = BESIDE_FOUR, WIDE_VECTORS = 4;
// Up to so many rows read the cache as it lies, and wait for its memory.
constexpr int FEW_ROWS = 8;

INLINE F8 all_8(float x) {
#if defined(__AVX2__)
    return _mm256_set1_ps(x);
#elif defined(MOEBIUS_NEON)
    return {vdupq_n_f32(x), vdupq_n_f32(x)};
#else
    return F8{x, x, x, x, x, x, x, x};
#endif
}
INLINE void store_8(float* p, F8 a) { memcpy(p, &a, 32); }

// Element `which` of eight groups, in float32.
template <class T> INLINE F8 element_8(const uint32_t* groups, int which) {
    if constexpr (sizeof(T) == 4) return load_8(reinterpret_cast<const float*>(groups));
    else return which ? odd_8(reinterpret_cast<const bf16*>(groups)) : even_8(reinterpret_cast<const bf16*>(groups));
}

// sums[i][j] += a[i][n] * b[n][j] in the order of n in [0, count), R rows and J vectors. b[j / 2] holds vectors j and j + 1 of
// groups of n, `stride` groups apart; of T = float, whose groups are single, the plain case.
template <class T, int R, int J>
INLINE void outer_8(const float* const* a, const uint32_t* const* b, size_t stride, int count, F8* sums) {
    constexpr int g = per_group<T>();
    F8 s[R * J];
    const float* from[R];
    const uint32_t* at[J / 2];
#pragma GCC unroll 3
    for (int i = 0; i < R; i++) from[i] = a[i];
#pragma GCC unroll 2
    for (int j = 0; j < J / 2; j++) at[j] = b[j];
#pragma GCC unroll 12
    for (int i = 0; i < R * J; i++) s[i] = sums[i];
    auto add = [&](int n, int which) __attribute__((always_inline)) {
        F8 one[R];
#pragma GCC unroll 3
        for (int i = 0; i < R; i++) one[i] = all_8(from[i][n]);
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) {
            const F8 v = element_8<T>(at[j / 2] + j % 2 * 8, which);
#pragma GCC unroll 3
            for (int i = 0; i < R; i++) s[i * J + j] = fma_8(one[i], v, s[i * J + j]);
        }
    };
    int n = 0;
    for (; n + g <= count; n += g) {
#pragma GCC unroll 2
        for (int which = 0; which < g; which++) add(n + which, which);
#pragma GCC unroll 2
        for (int j = 0; j < J / 2; j++) at[j] += stride;
    }
    if (n < count) add(n, 0);
#pragma GCC unroll 12
    for (int i = 0; i < R * J; i++) sums[i] = s[i];
}

template <class T> class WideRows {
public:
    WideRows(const AttentionBlock& a, const CacheShape& s, const Row<T>* rows, const State* states, int count, float* scratch)
        : a_(a), s_(s), rows_(rows), states_(states), count_(count), dims_(int(s.k_groups / s.block_size) * per_group<T>()),
          queries_(scratch), keys_(queries_ + size_t(count) * dims_), values_(keys_ + size_t(dims_) * KEY_TILE) {
        for (int i = 0; i < count; i++)
            for (int n = 0; n < dims_; n++) queries_[size_t(i) * dims_ + n] = n < s.key_dim ? to_float(rows[i].q[n]) : 0.0f;
    }

    void meet(const Tile& t, int start) {
        if (count_ <= FEW_ROWS) {
            fetch_tile(start + KEY_TILE);
            for (int i = 0; i < count_; i += 2) count_ - i > 1 ? meet_rows<T, 2>(t, start, i) : meet_rows<T, 1>(t, start, i);
            return;
        }
        if (sizeof(T) < sizeof(float)) widen_keys(t), widen_values(t);
        int i = 0;
        for (; i + WIDE_ROWS <= count_; i += WIDE_ROWS) meet_rows<float, WIDE_ROWS>(t, start, i);
        for (; i < count_; i++) meet_rows<float, 1>(t, start, i);
    }

private:
    // Few rows wait for the cache's memory: the tile from key `start` on is fetched while the one before is computed.
    void fetch_tile(int start) {
        const int stop = min_of(start + KEY_TILE, rows_[count_ - 1].last + 1);
        for (int block = start / s_.block_size; block * s_.block_size < stop; block++) {
            const char* head = reinterpret_cast<const char*>(head_of<T>(a_, s_, block));
            const int from = max_of(start - block * s_.block_size, 0), to = min_of(stop - block * s_.block_size, s_.block_size);
            for (size_t n = 0; n < s_.k_groups; n += s_.block_size)
                for (int key = from; key < to; key += KEY_LANES) __builtin_prefetch(head + (n + key) * 4);
            if (s_.shared) continue;
            constexpr int g = per_group<T>();
            for (size_t at = size_t(from / g) * s_.padded_dim; at < size_t((to + g - 1) / g) * s_.padded_dim; at += 16)
                __builtin_prefetch(head + (s_.k_groups + at) * 4);
        }
    }

    // keys_[n][key]
    void widen_keys(const Tile& t) {
        constexpr int g = per_group<T>();
        for (int j = 0; j < VECTORS; j++) {
            const uint32_t* k = t.k[j];
            float* to = keys_ + j * KEY_LANES;
            for (int n = 0; n < dims_; n += g, k += t.k_stride[j])
                for (int e = 0; e < g; e++, to += KEY_TILE)
                    store_8(to, element_8<T>(k, e)), store_8(to + 8, element_8<T>(k + 8, e));
        }
    }

    // values_[key][n] of the keys that exist
    void widen_values(const Tile& t) {
        constexpr int g = per_group<T>();
        for (int key = 0; key < t.keys; key++) {
            const uint32_t* v = t.v[key / KEY_LANES] + size_t(key % KEY_LANES / g) * s_.padded_dim;
            for (int n = 0; n < s_.padded_dim; n += 8) store_8(values_ + size_t(key) * s_.padded_dim + n, element_8<T>(v + n, key % g));
        }
    }

    // From is T to read the cache's groups, float to read the widened tile.
    template <class From, int R> __attribute__((noinline)) void meet_rows(const Tile& t, int start, int first) {
        constexpr int J = WIDE_VECTORS;
        const int padded = s_.padded_dim;
        alignas(32) float scores[R * KEY_TILE];
        const float *q[R], *weights[R];
        F8 shrink[R];
        for (int i = 0; i < R; i++) q[i] = queries_ + size_t(first + i) * dims_, weights[i] = scores + i * KEY_TILE;
        for (int v = 0; v < VECTORS; v += J / 2) {
            F8 sums[R * J] = {};
            const uint32_t* wide = reinterpret_cast<const uint32_t*>(keys_) + v * KEY_LANES;
            const uint32_t* const wides[] = {wide, wide + KEY_LANES};
            // All vectors of a tile have one stride.
            if constexpr (sizeof(From) == sizeof(T)) outer_8<T, R, J>(q, t.k + v, t.k_stride[v], dims_, sums);
            else outer_8<float, R, J>(q, wides, KEY_TILE, dims_, sums);
            for (int i = 0; i < R; i++)
                for (int j = 0; j < J; j++) store_8(scores + i * KEY_TILE + v * KEY_LANES + j * 8, sums[i * J + j]);
        }
        for (int i = 0; i < R; i++) {
            const Row<T>& row = rows_[first + i];
            const State& state = states_[first + i];
            shrink[i] = all_8(softmax_row<float>(a_, row, start, scores + i * KEY_TILE, state.largest, state.total));
        }
        int n = 0;
        for (; n + 8 * J <= padded; n += 8 * J) add_values<From, R, J>(weights, shrink, t, first, n);
        for (; n < padded; n += 16) add_values<From, R, 2>(weights, shrink, t, first, n);
    }

    // out[row] = out[row] * shrink[row] + weights . v for the 8 * J dimensions from n
    template <class From, int R, int J> __attribute__((always_inline)) void add_values(const float* const* weights, const F8* shrink, const Tile& t, int first, int n) {
        F8 sums[R * J];
        for (int i = 0; i < R; i++)
            for (int j = 0; j < J; j++) sums[i * J + j] = load_8(states_[first + i].out + n + j * 8) * shrink[i];
        if constexpr (sizeof(From) == sizeof(T)) {
            for (int v = 0; v * KEY_LANES < t.keys; v++) {
                const float* some[R];
                for (int i = 0; i < R; i++) some[i] = weights[i] + v * KEY_LANES;
                const uint32_t* const values[] = {t.v[v] + n, t.v[v] + n + 16};
                outer_8<T, R, J>(some, values, s_.padded_dim, min_of(KEY_LANES, t.keys - v * KEY_LANES), sums);
            }
        } else {
            const uint32_t* wide = reinterpret_cast<const uint32_t*>(values_) + n;
            const uint32_t* const wides[] = {wide, wide + 16};
            outer_8<float, R, J>(weights, wides, s_.padded_dim, t.keys, sums);
        }
        for (int i = 0; i < R; i++)
            for (int j = 0; j < J; j++) store_8(states_[first + i].out + n + j * 8, sums[i * J + j]);
    }

    const AttentionBlock& a_;
    const CacheShape& s_;
    const Row<T>* rows_;
    const State* states_;
    int count_, dims_;
    float *queries_, *keys_, *values_;
};

template <class T> void attention_8(const AttentionBlock& a, const CacheShape& s, float* scratch) { attention<T, WideRows<T>>(a, s, scratch); }

}  // namespace MOEBIUS_ISA
}  // namespace moebius
