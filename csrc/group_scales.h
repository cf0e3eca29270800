// The scales of sixteen blocks that lie in a plane of their own, and the zero points beside them.
#pragma once
#include "block_kernels.h"
#include "block_lanes.h"

namespace moebius {
namespace MOEBIUS_ISA {

#if defined(__AVX512F__)
// Where in what so many blocks share each of sixteen is, `skipped` after the first one's beginning.
INLINE __m512i places_of(int skipped, int blocks) {
    const __m512i from = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_srl_epi32(_mm512_add_epi32(from, _mm512_set1_epi32(skipped)), _mm_cvtsi32_si128(__builtin_ctz(blocks)));
}
INLINE __m128i some_bytes(const void* p, int n) { return _mm_maskz_loadu_epi8(__mmask16((1u << n) - 1), p); }
#endif
INLINE bool is_power_of_two(int n) { return (n & (n - 1)) == 0; }

// Half of what E8M0 scales stand for, as codes of E2M1 are twice theirs; NaN for 255.
INLINE V half_scales(const uint8_t* p, int n) {
#if defined(__AVX512F__)
    const __m128i bytes = some_bytes(p, n);
    const __m512i e = _mm512_cvtepu8_epi32(bytes), normal = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    const __mmask16 small = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
    const __m512i powers = _mm512_mask_sllv_epi32(normal, small, _mm512_set1_epi32(0x00200000), e);
    const __mmask16 nan = _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(char(0xff)));
    return {_mm512_castsi512_ps(_mm512_mask_mov_epi32(powers, nan, _mm512_set1_epi32(0x7fc00000)))};
#else
    uint16_t e[16] = {};
    uint32_t nan = 0;
    for (int i = 0; i < n; i++) {
        e[i] = p[i];
        nan |= p[i] == 255;
    }
    V v = half_powers(e);
    if (nan) {
        float lanes[16];
        store(lanes, v);
        for (int i = 0; i < n; i++) lanes[i] = e[i] == 255 ? __builtin_nanf("") : lanes[i];
        v = load(lanes);
    }
    return v;
#endif
}

template <class T> INLINE V first_of(const T* p, int n) { return n == 16 ? load(p) : load_some(p, n); }
// n scales, or biases, of a plane from the i-th on, at most sixteen.
INLINE V some_of(const void* plane, ScaleType type, size_t i, int n) {
    switch (type) {
        case BF16_SCALES: return first_of(static_cast<const bf16*>(plane) + i, n);
        case F16_SCALES: return first_of(static_cast<const f16*>(plane) + i, n);
        case F32_SCALES: return first_of(static_cast<const float*>(plane) + i, n);
        default: return half_scales(static_cast<const uint8_t*>(plane) + i, n);
    }
}

// Lane i is the one of v that block `skipped + i` has where so many blocks share one.
INLINE V each_for(V v, int skipped, int blocks) {
#if defined(__AVX512F__)
    if (is_power_of_two(blocks)) return {_mm512_permutexvar_ps(places_of(skipped, blocks), v.v)};
#endif
    float from[16], to[16];
    store(from, v);
    for (int i = 0, place = 0; i < 16; i++, skipped++) {
        if (skipped == blocks) skipped = 0, place++;
        to[i] = from[place];
    }
    return load(to);
}

// Scales, or biases, of `count` blocks from `first` on, counted from the first of all rows; what stands in lanes behind them is
// any number.
INLINE V of_groups(const GroupScales& g, const void* plane, int first, int count) {
    if (g.blocks == 1) return some_of(plane, g.type, first, count);
    const int group = first / g.blocks, skipped = first - group * g.blocks;
    return each_for(some_of(plane, g.type, group, (skipped + count - 1) / g.blocks + 1), skipped, g.blocks);
}
INLINE float of_group(const GroupScales& g, const void* plane, int block) {
    float lanes[16];
    store(lanes, some_of(plane, g.type, block / g.blocks, 1));
    return lanes[0];
}
INLINE int zero_of_group(const GroupScales& g, int block) { return g.zeros ? g.zeros[block / g.blocks] : 0; }

// dots - (offset + zero) * sums of `count` blocks, as floats.
INLINE V floats_less_zeros(const int32_t* dots, const int32_t* sums, int offset, const GroupScales& g, int first, int count) {
#if defined(__AVX512F__)
    if (is_power_of_two(g.blocks)) {
        const int group = first / g.blocks, skipped = first - group * g.blocks, groups = (skipped + count - 1) / g.blocks + 1;
        const __m512i zeros = _mm512_cvtepi8_epi32(some_bytes(g.zeros + group, groups));
        const __m512i all = _mm512_add_epi32(_mm512_permutexvar_epi32(places_of(skipped, g.blocks), zeros), _mm512_set1_epi32(offset));
        return {_mm512_cvtepi32_ps(_mm512_sub_epi32(ints(dots), _mm512_mullo_epi32(all, ints(sums))))};
    }
#endif
    alignas(64) int32_t less[16] = {};
    for (int i = 0; i < count; i++) less[i] = dots[i] - (offset + g.zeros[(first + i) / g.blocks]) * sums[i];
    return floats(less);
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
