// What meets a tile of keys on registers of sixteen lanes: all rows of a block, a few at a time, straight from the cache.
#pragma once
#include "attention.h"
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

constexpr int TILE_ROWS = ROWS;  // rows whose scores are held in registers

// scores[row][key] = q . k for M rows and a whole tile
template <class T, int M> KERNEL void scores_of(const Row<T>* rows, const Tile& t, int head_dim, float* scores) {
    constexpr int g = per_group<T>();
    V sums[M][VECTORS];
    const T* q[M];
    const uint32_t* k[VECTORS];
    for (int j = 0; j < VECTORS; j++) k[j] = t.k[j];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
        q[i] = rows[i].q;
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) sums[i][j] = zero();
    }
    auto step = [&](auto query) __attribute__((always_inline)) {
        G keys[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) keys[j] = groups(k[j]), k[j] += t.k_stride[j];
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) {
            G one = group_all(query(q[i]));
            q[i] += g;
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sums[i][j] = mac(sums[i][j], one, keys[j], T());
        }
    };
    for (int n = 0; n + g <= head_dim; n += g) step([](const T* p) { return read<uint32_t>(p); });
    if (head_dim % g) step([](const T* p) { return uint32_t(*p); });
#pragma GCC unroll 4
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) store(scores + i * KEY_TILE + j * KEY_LANES, sums[i][j]);
}

// out[row] = out[row] * shrink[row] + weights . v for M rows and the 16 * C dimensions from n0
template <class T, int M, int C>
KERNEL void add_values(const float* const* weights, const float* shrink, const Tile& t, int padded, int n0, float* const* out) {
    constexpr int g = per_group<T>(), PAIRS = KEY_LANES / g;
    V sums[M][C];
    const T* w[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
        w[i] = reinterpret_cast<const T*>(weights[i]);
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sums[i][c] = mul(load(out[i] + n0 + c * 16), all(shrink[i]));
    }
    auto step = [&](const uint32_t* v, bool last) __attribute__((always_inline)) {
        G values[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) values[c] = last ? low_halves(groups(v + c * 16)) : groups(v + c * 16);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) {
            G p = group_all(read<uint32_t>(w[i]));
            w[i] += g;
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sums[i][c] = mac(sums[i][c], p, values[c], T());
        }
    };
    int left = t.keys / g;
    for (int j = 0; left > 0; j++, left -= PAIRS) {
        const uint32_t* v = t.v[j] + n0;
        for (int pair = 0; pair < min_of(left, PAIRS); pair++, v += padded) step(v, false);
    }
    // What lies behind the last key is no one's, and may be no number.
    if (t.keys % g) step(t.v[t.keys / KEY_LANES] + size_t(t.keys % KEY_LANES / g) * padded + n0, true);
#pragma GCC unroll 4
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store(out[i] + n0 + c * 16, sums[i][c]);
}

template <class T, int M> INLINE void tile_rows(const AttentionBlock& a, const CacheShape& s, const Row<T>* rows, const State* states, const Tile& t, int start) {
    float scores[M * KEY_TILE], shrink[M];
    const float* weights[M];
    float* out[M];
    scores_of<T, M>(rows, t, s.key_dim, scores);
    for (int i = 0; i < M; i++) {
        weights[i] = scores + i * KEY_TILE, out[i] = states[i].out;
        shrink[i] = softmax_row<T>(a, rows[i], start, scores + i * KEY_TILE, states[i].largest, states[i].total);
    }
    int n = 0;
    for (; n + 64 <= s.padded_dim; n += 64) add_values<T, M, 4>(weights, shrink, t, s.padded_dim, n, out);
    for (; n < s.padded_dim; n += 16) add_values<T, M, 1>(weights, shrink, t, s.padded_dim, n, out);
}

template <class T> struct VectorRows {
    const AttentionBlock& a;
    const CacheShape& s;
    const Row<T>* rows;
    const State* states;
    int count;
    float* scratch;  // not needed here

    void meet(const Tile& t, int start) {
        int i = 0;
        for (; i + TILE_ROWS <= count; i += TILE_ROWS) tile_rows<T, TILE_ROWS>(a, s, rows + i, states + i, t, start);
        for (; i < count; i++) tile_rows<T, 1>(a, s, rows + i, states + i, t, start);
    }
};

template <class T> void attention_16(const AttentionBlock& a, const CacheShape& s, float* scratch) { attention<T, VectorRows<T>>(a, s, scratch); }

}  // namespace MOEBIUS_ISA
}  // namespace moebius
