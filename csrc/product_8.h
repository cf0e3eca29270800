// Matrix products of row-major weights (out, in) on sixteen registers of eight float32 lanes: AVX2, pairs of NEON's
// thirty-two, and what portable compilers make of such vectors.
//
// x has elements T, and w elements W: the same, or narrower ones than float32, which are summed as float32 weights are. Rows
// of x are widened once (`pack_8`) to float32, in the order in which a step of 32 elements of a weight row is widened: where
// both are bfloat16, the even elements of 16 and then the odd ones; else as they lie. Lane i of an output's sum takes the i-th element of each
// such eight, in order, and at the end the lanes are added by one tree. So an output's bits depend on its two rows alone.
#pragma once
#include "fp8.h"
#include "kernels.h"
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

constexpr int STEP_8 = 32;  // elements
// Rows beside four others, whose products fill twelve of sixteen registers. A pair of NEON's has no memory for an operand,
// so that those of three would not fit.
#if defined(MOEBIUS_NEON)
constexpr int BESIDE_FOUR = 2;
#else
constexpr int BESIDE_FOUR = 3;
#endif

#if defined(__AVX2__)
using F8 = __m256;
INLINE F8 fma_8(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F8 even_8(const bf16* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16)); }
INLINE F8 odd_8(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(int(0xffff0000))));
}
INLINE F8 widened_8(const bf16* p) { return widened(p); }
INLINE F8 widened_8(const f16* p) { return widened(p); }
INLINE F8 widened_8(const e4m3* p) { return widened(p); }
// The sums of four vectors' lanes.
INLINE void reduce_4(const F8* a, float* out) {
    F8 s = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
#elif defined(MOEBIUS_NEON)
struct F8 { F4 lo, hi; };
INLINE F8 operator*(F8 a, F8 b) { return {vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
INLINE F8 fma_8(F8 a, F8 b, F8 c) { return {vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)}; }
INLINE uint32x4_t words_4(const bf16* p) {
    uint32x4_t words;
    memcpy(&words, p, 16);
    return words;
}
INLINE F4 even_4(const bf16* p) { return vreinterpretq_f32_u32(vshlq_n_u32(words_4(p), 16)); }
INLINE F4 odd_4(const bf16* p) { return vreinterpretq_f32_u32(vandq_u32(words_4(p), vdupq_n_u32(0xffff0000u))); }
INLINE F8 even_8(const bf16* p) { return {even_4(p), even_4(p + 8)}; }
INLINE F8 odd_8(const bf16* p) { return {odd_4(p), odd_4(p + 8)}; }
template <class W> INLINE F8 widened_8(const W* p) { return {widened(p), widened(p + 4)}; }
INLINE void reduce_4(const F8* a, float* out) {
    const F4 lo = vpaddq_f32(vpaddq_f32(a[0].lo, a[1].lo), vpaddq_f32(a[2].lo, a[3].lo));
    const F4 hi = vpaddq_f32(vpaddq_f32(a[0].hi, a[1].hi), vpaddq_f32(a[2].hi, a[3].hi));
    vst1q_f32(out, vaddq_f32(lo, hi));
}
#else
typedef float F8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
INLINE F8 fma_8(F8 a, F8 b, F8 c) { return a * b + c; }
INLINE U8 words_8(const bf16* p) {
    U8 words;
    memcpy(&words, p, 32);
    return words;
}
INLINE F8 even_8(const bf16* p) { return (F8)(words_8(p) << 16); }
INLINE F8 odd_8(const bf16* p) { return (F8)(words_8(p) & 0xffff0000u); }
INLINE U8 halves_8(const void* p) {
    typedef uint16_t H8 __attribute__((vector_size(16)));
    H8 halves;
    memcpy(&halves, p, 16);
    return __builtin_convertvector(halves, U8);
}
INLINE F8 widened_8(const bf16* p) { return (F8)(halves_8(p) << 16); }
INLINE F8 widened_8(const f16* p) {  // as to_float does
    typedef int32_t I8 __attribute__((vector_size(32)));
    const U8 h = halves_8(p), magnitude = h & 0x7fff;
    const U8 small = (U8)(magnitude < 0x400), large = (U8)(magnitude >= 0x7c00);
    const U8 subnormal = (U8)(__builtin_convertvector((I8)magnitude, F8) * 0x1p-24f);
    const U8 normal = (magnitude << 13) + (112u << 23) + (large & (112u << 23));
    return (F8)((small & subnormal) | (~small & normal) | (h & 0x8000) << 16);
}
INLINE void reduce_4(const F8* a, float* out) {
    for (int i = 0; i < 4; i++)
        out[i] = ((a[i][0] + a[i][1]) + (a[i][2] + a[i][3])) + ((a[i][4] + a[i][5]) + (a[i][6] + a[i][7]));
}
#endif

INLINE F8 load_8(const float* p) {
#if defined(MOEBIUS_NEON)
    return {vld1q_f32(p), vld1q_f32(p + 4)};
#else
    F8 v;
    memcpy(&v, p, 32);
    return v;
#endif
}

INLINE F8 widened_8(const float* p) { return load_8(p); }
#if !defined(__AVX2__)
INLINE F8 widened_8(const e4m3* p) {
    f16 halves[8];
    halve_fp8(&p->bits, 8, &halves[0].bits);
    return widened_8(halves);
}
#endif

// The four vectors of a step, widened, in the order that x's type T asks for.
template <class T, class W> INLINE F8 part_8(const W* p, int part) {
    if constexpr (sizeof(T) == 2) return part % 2 ? odd_8(p + part * 8 - 8) : even_8(p + part * 8);
    else return widened_8(p + part * 8);
}
template <class T, class W> INLINE void parts_8(const W* p, F8* parts) {
#if defined(__AVX2__)
    if constexpr (sizeof(W) == 1) return widened_32(p, parts);
#endif
    for (int part = 0; part < 4; part++) parts[part] = part_8<T>(p, part);
}

INLINE int steps_8(int k) { return (k + STEP_8 - 1) / STEP_8; }

// One row from step `first` to step `stop`; what lies behind its k elements is zero.
template <class T, class W> INLINE void widen(const W* row, int k, int first, int stop, float* to) {
    W last[STEP_8];
    for (int s = first; s < stop; s++, to += STEP_8) {
        const W* from = row + s * STEP_8;
        if ((s + 1) * STEP_8 > k) {
            for (int i = 0; i < STEP_8; i++) last[i] = s * STEP_8 + i < k ? from[i] : W{};
            from = last;
        }
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            F8 v = part_8<T>(from, part);
            memcpy(to + part * 8, &v, 32);
        }
    }
}

template <class T> void pack_8(const void* const* x, int m, int k, void* to) {
    const int steps = steps_8(k);
    for (int i = 0; i < m; i++) widen<T>(static_cast<const T*>(x[i]), k, 0, steps, static_cast<float*>(to) + size_t(i) * steps * STEP_8);
}

// sums[i][j] += x[i] . w[j] over `steps`, fetching a line a weight row (two of float32) from `ahead` on at each step: into the
// second cache, as the first has no room beside several rows of x (measured: up to half the speed).
template <class T, class W, int M, int N, bool FETCH>
INLINE void tile_8(const float* x, size_t ldx, const W* const* w, int steps, const char* ahead, F8* sums) {
    constexpr int LINES = N * STEP_8 * sizeof(W) / 64, NEARNESS = N == 1 ? 3 : 2;
    F8 s[M * N];
    // Pointers of their own, a constant away from all that a step reads: the compiler would keep offsets in memory else.
    const float* from[M];
    const W* at[N];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) from[i] = x + i * ldx;
#pragma GCC unroll 12
    for (int i = 0; i < M * N; i++) s[i] = sums[i];
#pragma GCC unroll 12
    for (int j = 0; j < N; j++) at[j] = w[j];
    for (int step = 0; step < steps; step++) {
        if (FETCH) {
#pragma GCC unroll 16
            for (int l = 0; l < LINES; l++) __builtin_prefetch(ahead + l * 64, 0, NEARNESS);
            ahead += LINES * 64;
        }
        if constexpr (sizeof(W) == 1) {  // a step of one row at once, which is widened in fewer instructions
#pragma GCC unroll 12
            for (int j = 0; j < N; j++) {
                F8 b[4];
                parts_8<T>(at[j], b);
#pragma GCC unroll 4
                for (int part = 0; part < 4; part++)
#pragma GCC unroll 4
                    for (int i = 0; i < M; i++) s[i * N + j] = fma_8(load_8(from[i] + part * 8), b[part], s[i * N + j]);
            }
        } else {
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) {
                F8 b[N];
#pragma GCC unroll 12
                for (int j = 0; j < N; j++) b[j] = part_8<T>(at[j], part);
#pragma GCC unroll 4
                for (int i = 0; i < M; i++) {
                    const F8 a = load_8(from[i] + part * 8);
#pragma GCC unroll 12
                    for (int j = 0; j < N; j++) s[i * N + j] = fma_8(a, b[j], s[i * N + j]);
                }
            }
        }
#pragma GCC unroll 12
        for (int j = 0; j < N; j++) at[j] += STEP_8;
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) from[i] += STEP_8;
    }
#pragma GCC unroll 12
    for (int i = 0; i < M * N; i++) sums[i] = s[i];
}

// M rows of x by N of w, whose sums fill at most twelve registers. Weights are widened in registers, every M rows anew: that
// costs less than reading them back widened, which are twice the bytes. What is fetched lies two tiles ahead. AT_ONCE weight
// rows are read side by side: with one row of x, when memory is all that counts, one, as memory gives one stream faster than
// several, and one tile ahead.
template <class T, class W, int M, int N, int AT_ONCE = N>
INLINE void rows_8(const float* x, size_t ldx, const W* w, size_t ldw, int n, int k, const W* next, float* c, int ldc) {
    const int whole = k / STEP_8, rest = steps_8(k) - whole;
    float last[N * STEP_8], out[M * N];
    for (int j = 0; j < n; j += N) {
        const W* rows[N];
        const float* ends[N];
        // Columns beyond the last repeat it, and are not written.
        for (int l = 0; l < N; l++) rows[l] = w + size_t(min_of(j + l, n - 1)) * ldw;
        F8 sums[M * N] = {};
        const int then = j + (AT_ONCE > 1 ? 2 * N : N);
        const W* ahead = then < n ? w + then * ldw : next + max_of(0, then - n) * ldw;
        for (int l = 0; l < N; l += AT_ONCE)
            tile_8<T, W, M, AT_ONCE, true>(x, ldx, rows + l, whole, reinterpret_cast<const char*>(ahead + l * ldw), sums + l);
        if (rest) {
            for (int l = 0; l < N; l++) widen<T>(rows[l], k, whole, whole + 1, last + l * STEP_8), ends[l] = last + l * STEP_8;
            tile_8<float, float, M, N, false>(x + size_t(whole) * STEP_8, ldx, ends, 1, nullptr, sums);
        }
        for (int i = 0; i < M * N; i += 4) reduce_4(sums + i, out + i);
        for (int i = 0; i < M; i++)
            for (int l = 0; l < min_of(N, n - j); l++) c[size_t(i) * ldc + j + l] = out[i * N + l];
    }
}

template <class T, class W>
void product_8(const void* const* packed, int m, const void* weights, size_t ldw, int n, int k, const void* then, float* c, int ldc) {
    const float* x = static_cast<const float*>(packed[0]);
    const size_t ldx = size_t(steps_8(k)) * STEP_8;
    const W *w = static_cast<const W*>(weights), *next = static_cast<const W*>(then ? then : weights);
    if (m == 1) return rows_8<T, W, 1, 4, 1>(x, ldx, w, ldw, n, k, next, c, ldc);
    for (; m > 4; m -= 4, x += 4 * ldx, c += 4 * size_t(ldc)) rows_8<T, W, 4, BESIDE_FOUR>(x, ldx, w, ldw, n, k, w, c, ldc);
    if (m == 1) rows_8<T, W, 1, 4>(x, ldx, w, ldw, n, k, next, c, ldc);
    else if (m == 2) rows_8<T, W, 2, 4>(x, ldx, w, ldw, n, k, next, c, ldc);
    else if (m == 3) rows_8<T, W, 3, 4>(x, ldx, w, ldw, n, k, next, c, ldc);
    else rows_8<T, W, 4, BESIDE_FOUR>(x, ldx, w, ldw, n, k, next, c, ldc);
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
