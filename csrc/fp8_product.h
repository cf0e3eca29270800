// Products of rows of x with codes of FP8 where they lie. Blocks of columns are summed as products of plain numbers are, to the
// bit, and then scaled (fp8_ops.cpp). For one or a few rows codes are widened in registers; for more, those of a narrow block
// are widened once.
//
// A few rows of weights are read side by side, as one sum alone would wait for each addition, and those behind them are fetched
// meanwhile: processors that fetch ahead by themselves lose the thread at every row.
#pragma once
#include "fp8.h"
#include "fp8_rows.h"
#if defined(__AVX512F__)
#include "product_16.h"
#else
#include "product_8.h"
#endif

namespace moebius {
namespace MOEBIUS_ISA {

// Results of M rows by N.
template <int M, int N> struct Scaled {
    const float* scales[N];  // of each row of weights
    float smaller, totals[M * N];

    inline __attribute__((always_inline)) Scaled(const Fp8Scales& all, int first, int n) : smaller(all.smaller) {
        for (int j = 0; j < N; j++) scales[j] = all.rows[min_of(first + j, n - 1)];
    }
    // The sums of one block of columns; the first one's are not added to anything.
    inline __attribute__((always_inline)) void add(const float* sums, int block) {
        float here[N];
        for (int j = 0; j < N; j++) here[j] = scales[j][block] * smaller;
        for (int i = 0; i < M; i++)
            for (int j = 0; j < N; j++) {
                const float scaled = sums[i * N + j] * here[j];
                totals[i * N + j] = block ? totals[i * N + j] + scaled : scaled;
            }
    }
    inline __attribute__((always_inline)) void write(int width, float* c, int ldc) const {
        for (int i = 0; i < M; i++)
            for (int j = 0; j < width; j++) c[size_t(i) * ldc + j] = totals[i * N + j];
    }
};

#if defined(__AVX512F__)

template <class T, int M>
INLINE void rows_by_codes(const T* const* x, const e4m3* w, int n, int k, const Fp8Scales& scales, const e4m3* next, float* c, int ldc) {
    constexpr int N = ROWS, SUMS = M * N, AT_ONCE = 16 / SUMS;
    constexpr int LINES = N / sizeof(T);  // what a step reads of N rows
    const int per_block = scales.columns, blocks = (k + per_block - 1) / per_block;
    for (int j = 0; j < n; j += N) {
        const e4m3* rows[N];
        for (int l = 0; l < N; l++) rows[l] = w + size_t(min_of(j + l, n - 1)) * k;
        const char* ahead = reinterpret_cast<const char*>(j + N < n ? w + size_t(j + N) * k : next);
        Scaled<M, N> results(scales, j, n);
        V sums[16];
        for (int b = 0; b < blocks; b += AT_ONCE) {
            const int count = min_of(AT_ONCE, blocks - b);
            for (int i = count * SUMS; i < 16; i++) sums[i] = zero();
            for (int s = 0; s < count; s++) {
                const int first = (b + s) * per_block, width = min_of(per_block, k - first);
                const T* x_rows[M];
                const e4m3* w_rows[N];
                for (int i = 0; i < M; i++) x_rows[i] = x[i] + first;
                for (int l = 0; l < N; l++) w_rows[l] = rows[l] + first;
                tile<T, e4m3, M, N, LINES>(x_rows, w_rows, width, ahead, sums + s * SUMS);
                ahead += N * width;
            }
            float out[16];
            store(out, reduce_16(sums));
            for (int s = 0; s < count; s++) results.add(out + s * SUMS, b + s);
        }
        results.write(min_of(N, n - j), c + j, ldc);
    }
}

INLINE void widen_block(const e4m3* from, int n, bf16* to) { widen_fp8(&from->bits, n, to); }
INLINE void widen_block(const e4m3* from, int n, float* to) {
    for (int i = 0; i < n; i += 16) store(to + i, n - i < 16 ? load_some(from + i, n - i) : load(from + i));
}

// M rows by N of a block that is widened; totals are of N columns.
template <class T, int M>
INLINE void add_block(const T* const* x, const T* const* w, int first, int width, const float* scales, float* totals) {
    constexpr int N = ROWS;
    const T* rows[M];
    V sums[16];
    float out[16];
    for (int i = 0; i < M; i++) rows[i] = x[i] + first;
    for (int i = M * N; i < 16; i++) sums[i] = zero();
    tile<T, T, M, N, 0>(rows, w, width, nullptr, sums);
    store(out, reduce_16(sums));
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            const float scaled = out[i * N + j] * scales[j];
            totals[i * N + j] = first ? totals[i * N + j] + scaled : scaled;
        }
}

template <class T>
INLINE void many_by_codes(const T* const* x, int m, const e4m3* w, int n, int k, const Fp8Scales& all, const e4m3* next, float* c, int ldc) {
    constexpr int N = ROWS;
    alignas(64) T wide[N * MOST_FP8_BLOCK];
    float totals[MOST_FP8_ROWS * N];
    for (int j = 0; j < n; j += N) {
        const char* ahead = reinterpret_cast<const char*>(j + N < n ? w + size_t(j + N) * k : next);
        for (int first = 0, b = 0; first < k; first += all.columns, b++) {
            const int width = min_of(all.columns, k - first);
            const T* rows[N];
            float scales[N];
            for (int l = 0; l < N; l++) {
                const int row = min_of(j + l, n - 1);
                widen_block(w + size_t(row) * k + first, width, wide + l * MOST_FP8_BLOCK);
                rows[l] = wide + l * MOST_FP8_BLOCK, scales[l] = all.of(row, b);
            }
            for (int line = 0; line < N * width; line += 64) __builtin_prefetch(ahead + size_t(first) * N + line, 0, 2);
            int i = 0;
            for (; i + 4 <= m; i += 4) add_block<T, 4>(x + i, rows, first, width, scales, totals + i * N);
            for (; i < m; i++) add_block<T, 1>(x + i, rows, first, width, scales, totals + i * N);
        }
        for (int i = 0; i < m; i++)
            for (int l = 0; l < min_of(N, n - j); l++) c[size_t(i) * ldc + j + l] = totals[i * N + l];
    }
}

template <class T>
void fp8_product(const void* const* x_rows, int m, const void* w, int n, int k, const Fp8Scales& scales, const void* next, float* c, int ldc) {
    const T* const* x = reinterpret_cast<const T* const*>(x_rows);
    const e4m3 *codes = static_cast<const e4m3*>(w), *then = static_cast<const e4m3*>(next ? next : w);
    if (m > FEW_FP8_ROWS) return many_by_codes<T>(x, m, codes, n, k, scales, then, c, ldc);
    for (; m >= 4; m -= 4, x += 4, c += 4 * size_t(ldc)) rows_by_codes<T, 4>(x, codes, n, k, scales, then, c, ldc);
    for (; m >= 2; m -= 2, x += 2, c += 2 * size_t(ldc)) rows_by_codes<T, 2>(x, codes, n, k, scales, then, c, ldc);
    if (m) rows_by_codes<T, 1>(x, codes, n, k, scales, then, c, ldc);
}

#else

// x as it was packed, block by block, for m rows.
template <int M, int N>
INLINE void rows_by_codes(const char* x, int m, int first_row, const e4m3* w, int n, int k, const Fp8Scales& scales, const e4m3* next, float* c,
                          int ldc) {
    const int per_block = scales.columns;
    float last[N * STEP_8], out[M * N];
    for (int j = 0; j < n; j += N) {
        const e4m3* ahead = j + N < n ? w + size_t(j + N) * k : next;
        Scaled<M, N> results(scales, j, n);
        for (int first = 0, b = 0; first < k; first += per_block, b++) {
            const int width = min_of(per_block, k - first), whole = width / STEP_8, rest = steps_8(width) - whole;
            const size_t ldx = size_t(steps_8(width)) * STEP_8;
            const float* x_rows = reinterpret_cast<const float*>(x + packed_bytes(m, first)) + first_row * ldx;
            const e4m3* rows[N];
            const float* ends[N];
            for (int l = 0; l < N; l++) rows[l] = w + size_t(min_of(j + l, n - 1)) * k + first;
            F8 sums[M * N] = {};
            tile_8<float, e4m3, M, N, true>(x_rows, ldx, rows, whole, reinterpret_cast<const char*>(ahead + N * first), sums);
            if (rest) {
                for (int l = 0; l < N; l++) widen<float>(rows[l], width, whole, whole + 1, last + l * STEP_8), ends[l] = last + l * STEP_8;
                tile_8<float, float, M, N, false>(x_rows + size_t(whole) * STEP_8, ldx, ends, 1, nullptr, sums);
            }
            for (int i = 0; i < M * N; i += 4) reduce_4(sums + i, out + i);
            results.add(out, b);
        }
        results.write(min_of(N, n - j), c + j, ldc);
    }
}

// M rows by four of a block that is widened; totals are of four columns.
template <int M>
INLINE void add_block(const float* x, size_t ldx, const float* const* w, int steps, bool begin, const float* scales, float* totals) {
    float out[M * 4];
    F8 sums[M * 4] = {};
    tile_8<float, float, M, 4, false>(x, ldx, w, steps, nullptr, sums);
    for (int i = 0; i < M; i++) reduce_4(sums + i * 4, out + i * 4);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < 4; j++) {
            const float scaled = out[i * 4 + j] * scales[j];
            totals[i * 4 + j] = begin ? scaled : totals[i * 4 + j] + scaled;
        }
}

INLINE void many_by_codes(const char* x, int m, const e4m3* w, int n, int k, const Fp8Scales& all, float* c, int ldc) {
    alignas(64) float wide[4 * MOST_FP8_BLOCK];
    float totals[MOST_FP8_ROWS * 4];
    for (int j = 0; j < n; j += 4) {
        for (int first = 0, b = 0; first < k; first += all.columns, b++) {
            const int width = min_of(all.columns, k - first), steps = steps_8(width);
            const size_t ldx = size_t(steps) * STEP_8;
            const float* x_rows = reinterpret_cast<const float*>(x + packed_bytes(m, first));
            const float* rows[4];
            float scales[4];
            for (int l = 0; l < 4; l++) {
                const int row = min_of(j + l, n - 1);
                widen<float>(w + size_t(row) * k + first, width, 0, steps, wide + l * MOST_FP8_BLOCK);
                rows[l] = wide + l * MOST_FP8_BLOCK, scales[l] = all.of(row, b);
            }
            int i = 0;
            for (; i + 2 <= m; i += 2) add_block<2>(x_rows + i * ldx, ldx, rows, steps, first == 0, scales, totals + i * 4);
            if (i < m) add_block<1>(x_rows + i * ldx, ldx, rows, steps, first == 0, scales, totals + i * 4);
        }
        for (int i = 0; i < m; i++)
            for (int l = 0; l < min_of(4, n - j); l++) c[size_t(i) * ldc + j + l] = totals[i * 4 + l];
    }
}

template <class T>
void fp8_product(const void* const* packed, int m, const void* w, int n, int k, const Fp8Scales& scales, const void* next, float* c, int ldc) {
    const char* x = static_cast<const char*>(packed[0]);
    const e4m3 *codes = static_cast<const e4m3*>(w), *then = static_cast<const e4m3*>(next ? next : w);
    if (m > FEW_FP8_ROWS) return many_by_codes(x, m, codes, n, k, scales, c, ldc);
    int i = 0;
    for (; i + 4 <= m; i += 4) rows_by_codes<4, 2>(x, m, i, codes, n, k, scales, then, c + size_t(i) * ldc, ldc);
    for (; i + 2 <= m; i += 2) rows_by_codes<2, 4>(x, m, i, codes, n, k, scales, then, c + size_t(i) * ldc, ldc);
    if (i < m) rows_by_codes<1, 4>(x, m, i, codes, n, k, scales, then, c + size_t(i) * ldc, ldc);
}

#endif

}  // namespace MOEBIUS_ISA
}  // namespace moebius
