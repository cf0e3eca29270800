// What products with blocks do with sixteen lanes of float32, beyond simd.h.
#pragma once
#include "block_formats.h"
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

// Rows of `count` numbers each lie one behind the other, and are spread to groups of 2^log lanes, 2, 4 or 8: where a lane's
// number lies, and -1 where it has none.
INLINE int spread_from(int lane, int log, int count) {
    const int in_row = lane & ((1 << log) - 1);
    return in_row < count ? (lane >> log) * count + in_row : -1;
}

// Whole numbers and bytes as float32; a - factor * b of whole numbers; a's first n lanes, zeros behind them; and 2^(e - 128) of
// bytes e that lie as sixteen bits (block_formats.h). Numbers
// that are spread, zeros in all other lanes; the sums of groups of lanes, by the tree of reduce_add, in the first one of each.
#if defined(__AVX512F__)
INLINE __m512i ints(const int32_t* p) { return _mm512_loadu_si512(p); }
INLINE V floats(const int32_t* p) { return {_mm512_cvtepi32_ps(ints(p))}; }
INLINE V bytes_as_floats(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
INLINE V floats_less(const int32_t* a, const int32_t* b, int factor) {
    if (factor == 0) return floats(a);
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(ints(a), _mm512_mullo_epi32(ints(b), _mm512_set1_epi32(factor))))};
}
INLINE V first_lanes(V a, int n) { return n < 16 ? V{_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), a.v)} : a; }
INLINE V half_powers(const uint16_t* p) {
    const __m512i e = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const __mmask16 small = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
    return {_mm512_castsi512_ps(_mm512_mask_sllv_epi32(normal, small, _mm512_set1_epi32(0x00200000), e))};
}
struct Spread {
    __m512i places;
    __mmask16 used = 0;
    Spread(int log, int count) {
        alignas(64) int32_t place[16];
        for (int i = 0; i < 16; i++) {
            place[i] = spread_from(i, log, count);
            used |= __mmask16((place[i] >= 0) << i);
        }
        places = ints(place);
    }
};
INLINE V spread(V a, const Spread& s) { return {_mm512_maskz_permutexvar_ps(s.used, s.places, a.v)}; }
INLINE V sum_groups(V a, int log) {
    if (log > 2) a = add(a, {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)});
    if (log > 1) a = add(a, {_mm512_permute_ps(a.v, 0x4e)});
    return add(a, {_mm512_permute_ps(a.v, 0xb1)});
}
#elif defined(__AVX2__)
INLINE __m256i ints_8(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
INLINE V floats(const int32_t* p) { return {_mm256_cvtepi32_ps(ints_8(p)), _mm256_cvtepi32_ps(ints_8(p + 8))}; }
INLINE __m256 bytes_as_floats_8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
INLINE V bytes_as_floats(const uint8_t* p) { return {bytes_as_floats_8(p), bytes_as_floats_8(p + 8)}; }
INLINE __m256 floats_less_8(const int32_t* a, const int32_t* b, int factor) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(ints_8(a), _mm256_mullo_epi32(ints_8(b), _mm256_set1_epi32(factor))));
}
INLINE V floats_less(const int32_t* a, const int32_t* b, int factor) {
    return factor ? V{floats_less_8(a, b, factor), floats_less_8(a + 8, b + 8, factor)} : floats(a);
}
INLINE V first_lanes(V a, int n) {
    if (n == 16) return a;
    alignas(32) static const int32_t kept[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    const __m256 lo = _mm256_castsi256_ps(ints_8(kept + 16 - n)), hi = _mm256_castsi256_ps(ints_8(kept + 24 - n));
    return {_mm256_and_ps(a.lo, lo), _mm256_and_ps(a.hi, hi)};
}
INLINE __m256 half_powers_8(const uint16_t* p) {
    const __m256i e = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    const __m256i subnormal = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(normal, subnormal, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
}
INLINE V half_powers(const uint16_t* p) { return {half_powers_8(p), half_powers_8(p + 8)}; }
struct Spread {
    __m256i places[2];
    Spread(int log, int count) {
        alignas(32) int32_t place[16];
        for (int i = 0; i < 16; i++) place[i] = spread_from(i, log, count);
        places[0] = ints_8(place), places[1] = ints_8(place + 8);
    }
};
INLINE __m256 spread_8(V a, __m256i places) {
    const __m256 low = _mm256_permutevar8x32_ps(a.lo, places), high = _mm256_permutevar8x32_ps(a.hi, places);
    const __m256 both = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(places, 28)));
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(places, 31)), both);
}
INLINE V spread(V a, const Spread& s) { return {spread_8(a, s.places[0]), spread_8(a, s.places[1])}; }
INLINE V sum_groups(V a, int log) {
    if (log > 2) a = add(a, {_mm256_permute2f128_ps(a.lo, a.lo, 1), _mm256_permute2f128_ps(a.hi, a.hi, 1)});
    if (log > 1) a = add(a, {_mm256_permute_ps(a.lo, 0x4e), _mm256_permute_ps(a.hi, 0x4e)});
    return add(a, {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)});
}
#else
INLINE V floats_less(const int32_t* a, const int32_t* b, int factor) {
    float lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = float(a[i] - factor * b[i]);
    return load(lanes);
}
INLINE V floats(const int32_t* p) {
    float lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = float(p[i]);
    return load(lanes);
}
INLINE V bytes_as_floats(const uint8_t* p) {
    float lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = float(p[i]);
    return load(lanes);
}
INLINE V first_lanes(V a, int n) {
    float lanes[16];
    store(lanes, a);
    for (int i = n; i < 16; i++) lanes[i] = 0.0f;
    return load(lanes);
}
INLINE V half_powers(const uint16_t* p) {
    float lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = half_power(uint8_t(p[i]));
    return load(lanes);
}
struct Spread {
    int places[16];
    Spread(int log, int count) {
        for (int i = 0; i < 16; i++) places[i] = spread_from(i, log, count);
    }
};
INLINE V spread(V a, const Spread& s) {
    float from[16], to[16];
    store(from, a);
    for (int i = 0; i < 16; i++) to[i] = s.places[i] < 0 ? 0.0f : from[s.places[i]];
    return load(to);
}
INLINE V sum_groups(V a, int log) {
    float lanes[16];
    store(lanes, a);
    for (int half = 1 << log >> 1; half; half /= 2)
        for (int i = 0; i + half < 16; i++) lanes[i] += lanes[i + half];
    return load(lanes);
}
#endif

}  // namespace MOEBIUS_ISA
}  // namespace moebius
