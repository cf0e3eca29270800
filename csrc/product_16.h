// Matrix products of row-major weights (out, in), as checkpoints store them, on registers of sixteen float32 lanes:
// nothing is packed or copied. x has elements T, and w elements W: the same, or narrower ones that are widened to T in
// registers, and then summed as such weights are.
//
// A tile of M rows of x and N rows of w keeps M * N vectors of partial sums; lane i sums the inner dimension's groups
// i, i + 16, i + 32, ...; at the end the lanes are added by one tree. So an output's bits depend on its two rows alone.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

// sums[i * N + j] = x[i] . w[j] over k elements, for M rows of x and N of w. Meanwhile fetches LINES cache lines a step from
// `ahead` on: weights that are needed next, since hardware prefetchers lose the thread at every row of several. They go to
// the second cache: beside the rows of x the first has no room (measured: half the speed).
template <class T, class W, int M, int N, int LINES>
INLINE void tile(const T* const* x, const W* const* w, int k, const char* ahead, V* sums) {
    constexpr int STEP = 64 / sizeof(T);
    V s[M * N];
#pragma GCC unroll 16
    for (int i = 0; i < M * N; i++) s[i] = zero();
    int at = 0;
    for (; at + STEP <= k; at += STEP) {
#pragma GCC unroll 4
        for (int l = 0; l < LINES; l++) __builtin_prefetch(ahead + l * 64, 0, 2);
        ahead += LINES * 64;
        G a[M];
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) a[i] = groups(x[i] + at);
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) {
            G b = groups_as<T>(w[j] + at);
#pragma GCC unroll 4
            for (int i = 0; i < M; i++) s[i * N + j] = mac(s[i * N + j], a[i], b, T());
        }
    }
    if (at < k) {
        for (int j = 0; j < N; j++) {
            G b = groups_some_as<T>(w[j] + at, k - at);
            for (int i = 0; i < M; i++) s[i * N + j] = mac(s[i * N + j], groups_some(x[i] + at, k - at), b, T());
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M * N; i++) sums[i] = s[i];
}

// One or two rows of x: memory is all that counts, and gives one stream faster than several; hardware prefetchers follow it
// (measured: 1.2 times the speed).
template <class T, class W, int M>
INLINE void one_by_one(const T* const* x, const W* w, size_t ldw, int n, int k, float* c, int ldc) {
    for (int j = 0; j < n; j += 16 / M) {
        const int count = min_of(16 / M, n - j);
        V sums[16] = {};
        float out[16];
        for (int l = 0; l < count; l++) {
            const W* row = w + (j + l) * ldw;
            tile<T, W, M, 1, 0>(x, &row, k, nullptr, sums + l * M);
        }
        store(out, reduce_16(sums));
        for (int l = 0; l < count; l++)
            for (int i = 0; i < M; i++) c[size_t(i) * ldc + j + l] = out[l * M + i];
    }
}

template <class T, class W, int M, int LINES>
INLINE void tile_out(const T* const* x, const W* const* w, int k, const char* ahead, float* c, int ldc, int width) {
    V sums[16] = {};
    float out[16];
    tile<T, W, M, ROWS, LINES>(x, w, k, ahead, sums);
    store(out, reduce_16(sums));
    for (int i = 0; i < M; i++)
        for (int j = 0; j < width; j++) c[size_t(i) * ldc + j] = out[i * ROWS + j];
}

// The rest of a block of rows, fewer than ROWS.
template <class T, class W, int LINES>
INLINE void last_rows(int m, const T* const* x, const W* const* w, int k, const char* ahead, float* c, int ldc, int width) {
    if (m == 1) tile_out<T, W, 1, LINES>(x, w, k, ahead, c, ldc, width);
    if (m == 2) tile_out<T, W, 2, LINES>(x, w, k, ahead, c, ldc, width);
    if (m == 3) tile_out<T, W, 3, LINES>(x, w, k, ahead, c, ldc, width);
}

// A block of weight rows stays near while all m rows of x pass; the next block's lines are fetched by the tiles of this
// one, LINES a step each.
template <class T, class W, int LINES>
INLINE void blocks(const T* const* x, int m, const W* w, size_t ldw, int n, int k, const W* next, float* c, int ldc) {
    const int COLUMNS = k * sizeof(W) > 2048 ? 8 * ROWS : 2 * ROWS;  // measured
    const size_t stride = size_t(k) * sizeof(T) / 64 * 64 * LINES;
    for (int first = 0; first < n; first += COLUMNS) {
        const int stop = min_of(first + COLUMNS, n);
        const char* ahead = reinterpret_cast<const char*>(stop < n ? w + stop * ldw : next);
        const char* end = ahead + COLUMNS * ldw * sizeof(W);
        for (int i = 0; i < m; i += ROWS)
            for (int j = first; j < stop; j += ROWS) {
                // Columns beyond the last repeat it, and are not written.
                const W* rows[ROWS];
                for (int l = 0; l < ROWS; l++) rows[l] = w + size_t(min_of(j + l, n - 1)) * ldw;
                float* to = c + size_t(i) * ldc + j;
                const int width = min_of(ROWS, n - j), left = m - i;
                const bool fetch = ahead < end;
                if (left >= ROWS && fetch) tile_out<T, W, ROWS, LINES>(x + i, rows, k, ahead, to, ldc, width);
                else if (left >= ROWS) tile_out<T, W, ROWS, 0>(x + i, rows, k, ahead, to, ldc, width);
                else if (fetch) last_rows<T, W, LINES>(left, x + i, rows, k, ahead, to, ldc, width);
                else last_rows<T, W, 0>(left, x + i, rows, k, ahead, to, ldc, width);
                ahead += stride;
            }
    }
}

template <class T, class W>
void product_16(const void* const* x_rows, int m, const void* w, size_t ldw, int n, int k, const void* next, float* c, int ldc) {
    const T* const* x = reinterpret_cast<const T* const*>(x_rows);
    const W *weights = static_cast<const W*>(w), *then = static_cast<const W*>(next ? next : w);
    const int tiles = (m + ROWS - 1) / ROWS;
    constexpr int LINES = ROWS * sizeof(W) / sizeof(T);  // what a step reads of ROWS weight rows
    if (m == 1) one_by_one<T, W, 1>(x, weights, ldw, n, k, c, ldc);
    else if (m == 2 && sizeof(T) == sizeof(W)) one_by_one<T, W, 2>(x, weights, ldw, n, k, c, ldc);
    else if (tiles == 1) blocks<T, W, LINES>(x, m, weights, ldw, n, k, then, c, ldc);
    else if (tiles <= 3) blocks<T, W, LINES / 2>(x, m, weights, ldw, n, k, then, c, ldc);
    else blocks<T, W, 1>(x, m, weights, ldw, n, k, then, c, ldc);
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
