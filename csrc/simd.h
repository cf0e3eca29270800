// Sixteen float32 lanes, the same interface on every instruction set. Included once by each instruction set's
// translation unit, inside its own namespace: nothing here may be shared between units compiled with different flags.
//
// V holds 16 floats. AVX-512 alone has G, 16 groups of 32 bits (two bfloat16 or one float32, see kernels.h): eight-lane sets
// widen instead (product_8.h).
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(MOEBIUS_NEON)
#include <arm_neon.h>
#endif

namespace moebius {
namespace MOEBIUS_ISA {

using bf16 = uint16_t;
struct f16 {
    uint16_t bits;
};
#define INLINE static inline __attribute__((always_inline))

INLINE int min_of(int a, int b) { return a < b ? a : b; }
INLINE int max_of(int a, int b) { return a > b ? a : b; }

// What lies at p, aligned to nothing; or a number's bits as another type's.
template <class T> INLINE T read(const void* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}

INLINE float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    return read<float>(&bits);
}
INLINE float to_float(float x) { return x; }
// By integers: float32's subnormal numbers, which a thread may have set to be read as zero, have no part in it.
INLINE float to_float(f16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
    const float subnormal = float(int32_t(mantissa)) * 0x1p-24f;
    uint32_t bits = read<uint32_t>(&subnormal);
    if (exponent) bits = (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13;
    bits |= sign;
    return read<float>(&bits);
}

#if defined(__AVX512F__)

struct V { __m512 v; };
struct G { __m512i v; };

INLINE V zero() { return {_mm512_setzero_ps()}; }
INLINE V all(float x) { return {_mm512_set1_ps(x)}; }
INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE V load_some(const float* p, int n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
INLINE void store_some(float* p, V a, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v); }
INLINE V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE V maximum(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE V minimum(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a where x < y, else b
INLINE V where_less(V x, V y, V a, V b) { return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)}; }
// lanes [from, to) of a, elsewhere b
INLINE V where_lanes(int from, int to, V a, V b) {
    uint32_t high = to >= 16 ? 0xffffu : to <= 0 ? 0u : (1u << to) - 1, low = from <= 0 ? 0u : from >= 16 ? 0xffffu : (1u << from) - 1;
    return {_mm512_mask_blend_ps(__mmask16(high & ~low), b.v, a.v)};
}
INLINE V rounded(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for whole n in float range
INLINE V scaled(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }
INLINE float reduce_add(V a) {
    __m512 s = _mm512_add_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
    s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0xb1));
    __m128 q = _mm512_castps512_ps128(s);
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
INLINE float reduce_max(V a) { return _mm512_reduce_max_ps(a.v); }

INLINE G groups(const void* p) { return {_mm512_loadu_si512(p)}; }
INLINE G groups_some(const bf16* p, int n) { return {_mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p)}; }
INLINE G groups_some(const float* p, int n) { return {_mm512_castps_si512(load_some(p, n).v)}; }
INLINE G group_all(uint32_t g) { return {_mm512_set1_epi32(int(g))}; }
INLINE G low_halves(G a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff))}; }

INLINE V load(const bf16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
INLINE V load_some(const bf16* p, int n) {
    __m256i raw = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
INLINE V load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
INLINE V load_some(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p))}; }
INLINE __m256i narrowed(V a) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
    __m512i bits = _mm512_castps_si512(a.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    up = _mm512_mask_blend_epi32(nan, up, _mm512_or_si512(bits, _mm512_set1_epi32(0x400000)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}
INLINE void store(bf16* p, V a) { _mm256_storeu_si256((__m256i*)p, narrowed(a)); }
INLINE void store_some(bf16* p, V a, int n) { _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), narrowed(a)); }

// Weights W as the groups of an x of type T: as they lie, or widened to that, sixteen float32 or thirty-two bfloat16.
template <class T, class W> INLINE G groups_as(const W* p) {
    if constexpr (sizeof(T) == sizeof(W)) return groups(p);
    else if constexpr (sizeof(T) == 2) return bfloat16_groups(p);
    else return {_mm512_castps_si512(load(p).v)};
}
template <class T, class W> INLINE G groups_some_as(const W* p, int n) {
    if constexpr (sizeof(T) == sizeof(W)) return groups_some(p, n);
    else if constexpr (sizeof(T) == 2) return bfloat16_groups_some(p, n);
    else return {_mm512_castps_si512(load_some(p, n).v)};
}

INLINE V mac(V acc, G a, G b, float) { return {_mm512_fmadd_ps(_mm512_castsi512_ps(a.v), _mm512_castsi512_ps(b.v), acc.v)}; }
INLINE V mac(V acc, G a, G b, bf16) {
#if defined(__AVX512BF16__)
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    __m512 even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16)), acc.v);
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a.v, high)), _mm512_castsi512_ps(_mm512_and_si512(b.v, high)), even)};
#endif
}

constexpr int ROWS = 4;  // rows of x, and of w, that a tile of a product holds in registers

// out[i] = the sum of a[i]'s lanes, each by the same tree of additions.
INLINE V reduce_16(const V* a) {
    __m512 t[8], u[4];
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
        t[j] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * j].v, a[2 * j + 1].v), _mm512_unpackhi_ps(a[2 * j].v, a[2 * j + 1].v));
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512d x = _mm512_castps_pd(t[2 * j]), y = _mm512_castps_pd(t[2 * j + 1]);
        u[j] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88), _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return {_mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd))};
}

#else  // eight lanes twice, four lanes four times, or plain loops that any compiler can vectorise

#if defined(__AVX2__)
struct V { __m256 lo, hi; };

INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE V all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
INLINE V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
INLINE V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
INLINE V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
INLINE V div(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
INLINE V maximum(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
INLINE V minimum(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
INLINE V where_less(V x, V y, V a, V b) {
    return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, y.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, y.hi, _CMP_LT_OQ))};
}
INLINE V rounded(V a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
}
INLINE __m256 scaled_8(__m256 a, __m256 n) {
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}
INLINE V scaled(V a, V n) { return {scaled_8(a.lo, n.lo), scaled_8(a.hi, n.hi)}; }

INLINE __m256 widened(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE __m256 widened(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE V load(const bf16* p) { return {widened(p), widened(p + 8)}; }
INLINE V load(const f16* p) { return {widened(p), widened(p + 8)}; }
INLINE __m128i narrowed(__m256 a) {
    __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    up = _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
    up = _mm256_srli_epi32(up, 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0x08));
}
INLINE void store(bf16* p, V a) {
    _mm_storeu_si128((__m128i*)p, narrowed(a.lo));
    _mm_storeu_si128((__m128i*)(p + 8), narrowed(a.hi));
}

#elif defined(MOEBIUS_NEON)
using F4 = float32x4_t;
struct V { F4 v[4]; };

// r.v[i] = expression of i, for all four
#define EACH(expression) V r; for (int i = 0; i < 4; i++) r.v[i] = expression; return r
INLINE V all(float x) { EACH(vdupq_n_f32(x)); }
INLINE V zero() { return all(0.0f); }
INLINE V load(const float* p) { EACH(vld1q_f32(p + 4 * i)); }
INLINE void store(float* p, V a) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]); }
INLINE V add(V a, V b) { EACH(vaddq_f32(a.v[i], b.v[i])); }
INLINE V sub(V a, V b) { EACH(vsubq_f32(a.v[i], b.v[i])); }
INLINE V mul(V a, V b) { EACH(vmulq_f32(a.v[i], b.v[i])); }
INLINE V div(V a, V b) { EACH(vdivq_f32(a.v[i], b.v[i])); }
// b where one of them is no number, as elsewhere; vmaxq_f32 would give none.
INLINE F4 larger(F4 a, F4 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE V maximum(V a, V b) { EACH(larger(a.v[i], b.v[i])); }
INLINE V minimum(V a, V b) { EACH(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
INLINE V fma(V a, V b, V c) { EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
INLINE V where_less(V x, V y, V a, V b) { EACH(vbslq_f32(vcltq_f32(x.v[i], y.v[i]), a.v[i], b.v[i])); }
INLINE V rounded(V a) { EACH(vrndnq_f32(a.v[i])); }
INLINE F4 power_of_two(F4 n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)); }
INLINE V scaled(V a, V n) { EACH(vmulq_f32(a.v[i], power_of_two(n.v[i]))); }
INLINE F4 widened(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE F4 widened(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p))); }
INLINE V load(const bf16* p) { EACH(widened(p + 4 * i)); }
INLINE V load(const f16* p) { EACH(widened(p + 4 * i)); }
#undef EACH
INLINE uint16x4_t narrowed(F4 a) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), up, quiet), 16);
}
INLINE void store(bf16* p, V a) { for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, narrowed(a.v[i])); }

#else
struct V { float v[16]; };

#define LANES for (int i = 0; i < 16; i++)
INLINE V all(float x) { V r; LANES r.v[i] = x; return r; }
INLINE V zero() { return all(0.0f); }
INLINE V load(const float* p) { V r; memcpy(r.v, p, 64); return r; }
INLINE void store(float* p, V a) { memcpy(p, a.v, 64); }
INLINE V add(V a, V b) { LANES a.v[i] += b.v[i]; return a; }
INLINE V sub(V a, V b) { LANES a.v[i] -= b.v[i]; return a; }
INLINE V mul(V a, V b) { LANES a.v[i] *= b.v[i]; return a; }
INLINE V div(V a, V b) { LANES a.v[i] /= b.v[i]; return a; }
INLINE V maximum(V a, V b) { LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
INLINE V minimum(V a, V b) { LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
extern "C" float fmaf(float, float, float);
INLINE V fma(V a, V b, V c) { LANES c.v[i] = fmaf(a.v[i], b.v[i], c.v[i]); return c; }
INLINE V where_less(V x, V y, V a, V b) { LANES b.v[i] = x.v[i] < y.v[i] ? a.v[i] : b.v[i]; return b; }
INLINE V rounded(V a) { LANES a.v[i] = __builtin_rintf(a.v[i]); return a; }
INLINE V scaled(V a, V n) {
    LANES {
        const uint32_t bits = uint32_t(int(n.v[i]) + 127) << 23;
        a.v[i] *= read<float>(&bits);
    }
    return a;
}
INLINE V load(const bf16* p) { V r; LANES r.v[i] = to_float(p[i]); return r; }
INLINE V load(const f16* p) { V r; LANES r.v[i] = to_float(p[i]); return r; }
INLINE void store(bf16* p, V a) {
    LANES {
        const uint32_t bits = read<uint32_t>(&a.v[i]);
        const uint32_t up = bits + ((bits >> 16) & 1) + 0x7fff;
        p[i] = bf16((a.v[i] != a.v[i] ? bits | 0x400000 : up) >> 16);
    }
}
#undef LANES
#endif

template <class T> INLINE V load_some(const T* p, int n) {
    T whole[16] = {};
    memcpy(whole, p, n * sizeof(T));
    return load(whole);
}
template <class T> INLINE void store_some(T* p, V a, int n) {
    T whole[16];
    store(whole, a);
    memcpy(p, whole, n * sizeof(T));
}
INLINE V where_lanes(int from, int to, V a, V b) {
    float x[16], y[16];
    store(x, a), store(y, b);
    for (int i = max_of(from, 0); i < min_of(to, 16); i++) y[i] = x[i];
    return load(y);
}
#if defined(__AVX2__)
INLINE float reduce_add(V a) {
    __m256 half = _mm256_add_ps(a.lo, a.hi);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
INLINE float reduce_max(V a) {
    __m256 half = _mm256_max_ps(a.lo, a.hi);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
#elif defined(MOEBIUS_NEON)
INLINE float reduce_add(V a) {
    const F4 q = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
    return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
INLINE float reduce_max(V a) {
    const F4 q = larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3]));
    const F4 d = larger(q, vextq_f32(q, q, 2));
    return vgetq_lane_f32(larger(d, vdupq_laneq_f32(d, 1)), 0);
}
#else
INLINE float reduce_add(V a) {
    float x[16];
    store(x, a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}
INLINE float reduce_max(V a) {
    float x[16];
    store(x, a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}
#endif
#endif

// exp(x) to about 1 unit in the last place; 0 below the smallest normal number, infinity above the largest.
// Range reduction and polynomial as in Cephes' expf (public description by S. Moshier); computed in this order everywhere.
INLINE V exponential(V x) {
#if defined(__AVX512F__)
    // The scaling below saturates by itself; only infinities must not meet themselves. What is no number stays so.
    x = minimum(all(100.0f), maximum(all(-200.0f), x));
    V n = rounded(mul(x, all(1.44269504088896341f)));
#else
    V n = rounded(mul(x, all(1.44269504088896341f)));
    n = minimum(maximum(n, all(-126.0f)), all(127.0f));
#endif
    V r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    V p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    V e = scaled(add(fma(p, mul(r, r), r), all(1.0f)), n);
#if defined(__AVX512F__)
    return e;
#endif
    e = where_less(x, all(-87.3365447f), zero(), e);
    return where_less(all(88.7228317f), x, all(__builtin_inff()), e);
}

INLINE V sigmoid(V x) { return div(all(1.0f), add(all(1.0f), exponential(sub(zero(), x)))); }
// 1 - 2 / (exp(2x) + 1): the limits come out right at both ends.
INLINE V hyperbolic_tangent(V x) {
    return sub(all(1.0f), div(all(2.0f), add(exponential(add(x, x)), all(1.0f))));
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
