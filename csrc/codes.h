// Codes of 8 bits, and exact sums of their products with codes of 16: pairs of neighbouring codes are multiplied and added in
// integers, in which no order of sums makes a difference, on every instruction set the same.
//
// I holds 16 sums of 32 bits, P 16 pairs of 16 bits.
#pragma once
#include "pointwise.h"

namespace moebius {
namespace MOEBIUS_ISA {

#if defined(__AVX512F__)

struct I { __m512i v; };
struct P { __m512i v; };

INLINE I no_sums() { return {_mm512_setzero_si512()}; }
INLINE P widened_pairs(const int8_t* p) { return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p))}; }
INLINE P pair_all(uint32_t pair) { return {_mm512_set1_epi32(int(pair))}; }
INLINE I add_products(I sums, P a, P b) {
#if defined(__AVX512VNNI__)
    return {_mm512_dpwssd_epi32(sums.v, a.v, b.v)};
#else
    return {_mm512_add_epi32(sums.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
INLINE V to_floats(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Sixteen whole numbers that fit.
INLINE void store_codes(int16_t* p, V a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v))); }
INLINE void store_codes(int8_t* p, V a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v))); }

#elif defined(__AVX2__)

struct I { __m256i lo, hi; };
struct P { __m256i lo, hi; };

INLINE I no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE P widened_pairs(const int8_t* p) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
INLINE P pair_all(uint32_t pair) {
    const __m256i all = _mm256_set1_epi32(int(pair));
    return {all, all};
}
INLINE I add_products(I sums, P a, P b) {
    return {_mm256_add_epi32(sums.lo, _mm256_madd_epi16(a.lo, b.lo)), _mm256_add_epi32(sums.hi, _mm256_madd_epi16(a.hi, b.hi))};
}
INLINE V to_floats(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
INLINE __m256i narrowed_codes(V a) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)), 0xd8);
}
INLINE void store_codes(int16_t* p, V a) { _mm256_storeu_si256((__m256i*)p, narrowed_codes(a)); }
INLINE void store_codes(int8_t* p, V a) {
    const __m256i codes = narrowed_codes(a);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1)));
}

#elif defined(MOEBIUS_NEON)

struct I { int32x4_t v[4]; };
struct P { int16x8_t v[4]; };

INLINE I no_sums() {
    const int32x4_t none = vdupq_n_s32(0);
    return {{none, none, none, none}};
}
INLINE P widened_pairs(const int8_t* p) {
    const int8x16_t a = vld1q_s8(p), b = vld1q_s8(p + 16);
    return {{vmovl_s8(vget_low_s8(a)), vmovl_high_s8(a), vmovl_s8(vget_low_s8(b)), vmovl_high_s8(b)}};
}
INLINE P pair_all(uint32_t pair) {
    const int16x8_t all = vreinterpretq_s16_u32(vdupq_n_u32(pair));
    return {{all, all, all, all}};
}
INLINE I add_products(I sums, P a, P b) {
    for (int i = 0; i < 4; i++) {
        const int32x4_t low = vmull_s16(vget_low_s16(a.v[i]), vget_low_s16(b.v[i])), high = vmull_high_s16(a.v[i], b.v[i]);
        sums.v[i] = vaddq_s32(sums.v[i], vpaddq_s32(low, high));
    }
    return sums;
}
INLINE V to_floats(I a) { return {{vcvtq_f32_s32(a.v[0]), vcvtq_f32_s32(a.v[1]), vcvtq_f32_s32(a.v[2]), vcvtq_f32_s32(a.v[3])}}; }
INLINE int16x8_t narrowed_codes(F4 a, F4 b) { return vcombine_s16(vmovn_s32(vcvtnq_s32_f32(a)), vmovn_s32(vcvtnq_s32_f32(b))); }
INLINE void store_codes(int16_t* p, V a) {
    vst1q_s16(p, narrowed_codes(a.v[0], a.v[1]));
    vst1q_s16(p + 8, narrowed_codes(a.v[2], a.v[3]));
}
INLINE void store_codes(int8_t* p, V a) {
    vst1q_s8(p, vcombine_s8(vmovn_s16(narrowed_codes(a.v[0], a.v[1])), vmovn_s16(narrowed_codes(a.v[2], a.v[3]))));
}

#else

struct I { int32_t v[16]; };
struct P { int16_t v[32]; };

INLINE I no_sums() { return {}; }
INLINE P widened_pairs(const int8_t* p) {
    P r;
    for (int i = 0; i < 32; i++) r.v[i] = p[i];
    return r;
}
INLINE P pair_all(uint32_t pair) {
    P r;
    for (int i = 0; i < 16; i++) memcpy(r.v + 2 * i, &pair, 4);
    return r;
}
INLINE I add_products(I sums, P a, P b) {
    for (int i = 0; i < 16; i++) sums.v[i] += int32_t(a.v[2 * i]) * b.v[2 * i] + int32_t(a.v[2 * i + 1]) * b.v[2 * i + 1];
    return sums;
}
INLINE V to_floats(I a) {
    V r;
    for (int i = 0; i < 16; i++) r.v[i] = float(a.v[i]);
    return r;
}
template <class Code> INLINE void store_codes(Code* p, V a) {
    for (int i = 0; i < 16; i++) p[i] = Code(a.v[i]);
}

#endif

// float16 of a number that is not negative, to the nearest, ties to even; infinity beyond what it holds. By integers: no state
// of the thread has a part in it.
INLINE uint16_t to_half(float x) {
    const uint32_t bits = read<uint32_t>(&x);
    if (bits >= 0x477ff000) return 0x7c00;
    if (bits < 0x38800000) return uint16_t((x * 0x1p24f + 0x1p23f) - 0x1p23f);  // subnormal: a whole number of 2^-24
    return uint16_t((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

constexpr uint16_t HALF_NAN = 0x7e00;

// The largest of n values, value(i, count) each sixteen from i on, without their signs; NaN where one is not finite.
template <class Value> INLINE float largest_of(int n, Value value) {
    V top = zero(), poison = zero();
    each_vector(n, [&](int i, int count) {
        const V v = value(i, count);
        top = maximum(top, maximum(v, sub(zero(), v)));
        poison = add(poison, sub(v, v));
    });
    return reduce_max(top) + reduce_add(poison);
}

// Codes of n values, each times `inverse` to the nearest, ties to even, within -most .. most.
template <class Code, class Value> INLINE void codes_of(int n, float inverse, float most, Code* codes, Value value) {
    each_vector(n, [&](int i, int count) {
        Code some[16];
        V v = rounded(mul(value(i, count), all(inverse)));
        v = minimum(all(most), maximum(all(-most), v));
        if (count == 16) return store_codes(codes + i, v);
        store_codes(some, v);
        memcpy(codes + i, some, count * sizeof(Code));
    });
}

// See src/moebius/ops/reference/codes.py.
template <class T> uint16_t quantise(const void* row, const float* less, int n, int8_t* codes) {
    constexpr float MOST = 127;
    const T* x = static_cast<const T*>(row);
    auto value = [&](int i, int count) {
        const V v = take(x + i, count);
        return less ? sub(v, take(less + i, count)) : v;
    };
    const float largest = largest_of(n, value);
    const uint16_t scale = largest == largest ? to_half(largest / MOST) : HALF_NAN;
    if (scale >= 0x7c00) {
        memset(codes, 0, n);
        return HALF_NAN;
    }
    codes_of(n, scale ? 1 / to_float(f16{scale}) : 0.0f, MOST, codes, value);
    return scale;
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
