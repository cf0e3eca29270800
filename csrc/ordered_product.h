// Products of plain numbers in one order, the same on every instruction set: what a quantised model has of them (routers,
// and matrices that were left in 16 or 32 bits), so that all of its bits are one processor's and every other's.
//
// Sixteen lanes; lane l sums elements l, l + 16, ... in order, each by one fma of numbers widened to float32; lanes are added
// by one tree. Slower than the dense products beside it, which are free to sum as their instructions would have it.
#pragma once
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

template <class T, class W, int M, int N>
INLINE void ordered_tile(const T* const* x, const W* const* w, int k, float* c, int ldc) {
    V sums[M * N];
    for (V& sum : sums) sum = zero();
    auto add = [&](auto&& x_at, auto&& w_at) {
        V b[N];
        for (int j = 0; j < N; j++) b[j] = w_at(j);
        for (int i = 0; i < M; i++) {
            const V a = x_at(i);
            for (int j = 0; j < N; j++) sums[i * N + j] = fma(a, b[j], sums[i * N + j]);
        }
    };
    int at = 0;
    for (; at + 16 <= k; at += 16) add([&](int i) { return load(x[i] + at); }, [&](int j) { return load(w[j] + at); });
    if (at < k) add([&](int i) { return load_some(x[i] + at, k - at); }, [&](int j) { return load_some(w[j] + at, k - at); });
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) c[size_t(i) * ldc + j] = reduce_add(sums[i * N + j]);
}

// Rows of x, and of w, whose sums fill the registers.
#if defined(__AVX512F__)
constexpr int ORDERED = 4;
#else
constexpr int ORDERED = 2;
#endif

template <class T, class W, int M> INLINE void ordered_rows(const T* const* x, const W* w, int n, int k, float* c, int ldc) {
    const W* rows[ORDERED];
    int j = 0;
    for (; j + ORDERED <= n; j += ORDERED) {
        for (int l = 0; l < ORDERED; l++) rows[l] = w + size_t(j + l) * k;
        ordered_tile<T, W, M, ORDERED>(x, rows, k, c + j, ldc);
    }
    for (; j < n; j++) {
        rows[0] = w + size_t(j) * k;
        ordered_tile<T, W, M, 1>(x, rows, k, c + j, ldc);
    }
}

// c[i][j] = the product of row i of m rows of x with row j of n rows of w, of k elements each.
template <class T, class W> void ordered_product(const void* const* x_rows, int m, const void* w, int n, int k, float* c, int ldc) {
    const T* const* x = reinterpret_cast<const T* const*>(x_rows);
    const W* weights = static_cast<const W*>(w);
    int i = 0;
    for (; i + ORDERED <= m; i += ORDERED) ordered_rows<T, W, ORDERED>(x + i, weights, n, k, c + size_t(i) * ldc, ldc);
    for (; i < m; i++) ordered_rows<T, W, 1>(x + i, weights, n, k, c + size_t(i) * ldc, ldc);
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
