// The codes of 32 elements in a register of AVX2: what Block<f>::codes gives, or, SIGNED, the same with the top bit turned.
#pragma once
#include "block_scales.h"

namespace moebius {
namespace MOEBIUS_ISA {

INLINE __m256i load_32_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE __m256i bits_and(__m256i a, int byte) { return _mm256_and_si256(a, _mm256_set1_epi8(char(byte))); }
// Each byte's bits moved up by n places, down where n is negative; what others move in is to be masked away.
template <int n> INLINE __m256i moved(__m256i a) {
    if constexpr (n > 0) return _mm256_slli_epi16(a, n);
    else if constexpr (n < 0) return _mm256_srli_epi16(a, -n);
    else return a;
}

INLINE __m256i nibbles_of(const uint8_t* p) {
    const __m128i both = load_16_bytes(p);
    return bits_and(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), 15);
}
INLINE __m256i looked_up(const uint8_t* table, __m256i codes) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_16_bytes(table)), codes);
}
template <bool SIGNED> INLINE __m256i iq4(__m256i nibbles) {
    const __m256i codes = looked_up(IQ4_CODES, nibbles);
    return SIGNED ? _mm256_xor_si256(codes, _mm256_set1_epi8(char(0x80))) : codes;
}

// Two blocks of 32 with four-bit codes: the first sixteen codes of both, and the second ones.
struct Halves {
    __m256i first, second;
};
// Of two words the bits from 16 * half on, sixteen each, moved to the fifth bit of a byte.
template <int half> INLINE __m256i fifth_bits(__m256i words) {
    const __m256i places = _mm256_set_epi64x(0x0101010101010101 * (2 * half + 1), 0x0101010101010101 * (2 * half),
                                             0x0101010101010101 * (2 * half + 1), 0x0101010101010101 * (2 * half));
    const __m256i each = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    return bits_and(_mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(words, places), each), each), 16);
}
template <Format f, bool SIGNED> INLINE Halves halves_of_two(const uint8_t* a, const uint8_t* b) {
    constexpr int at = has_planes(f) ? 0 : f == MXFP4 ? 1 : f == Q4_0 || f == IQ4_NL ? 2 : f == Q4_1 ? 4 : f == Q5_0 ? 6 : 8;
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(load_16_bytes(a + at)), load_16_bytes(b + at), 1);
    const Halves four = {bits_and(both, 15), bits_and(_mm256_srli_epi16(both, 4), 15)};
    if constexpr (f == IQ4_NL) return {iq4<SIGNED>(four.first), iq4<SIGNED>(four.second)};
    if constexpr (are_e2m1(f)) return {looked_up(E2M1_CODES, four.first), looked_up(E2M1_CODES, four.second)};
    if constexpr (f == Q5_0 || f == Q5_1) {
        const __m256i words = _mm256_blend_epi32(_mm256_set1_epi32(read<int32_t>(a + at - 4)), _mm256_set1_epi32(read<int32_t>(b + at - 4)), 0xf0);
        return {_mm256_or_si256(four.first, fifth_bits<0>(words)), _mm256_or_si256(four.second, fifth_bits<1>(words))};
    }
    return four;
}

// Sub-block s of a block of 256, or the one of codes of eight bits.
template <Format f, int s, bool SIGNED> INLINE __m256i codes_of_32(const uint8_t* b) {
    constexpr int half = s / 4, g = s % 4;
    if constexpr (are_bytes(f)) {
        const __m256i codes = load_32_bytes(f == Q8_0 ? b + 2 : b);
        return SIGNED == are_signed_bytes(f) ? codes : _mm256_xor_si256(codes, _mm256_set1_epi8(char(0x80)));
    }
    if constexpr (f == IQ4_XS) return iq4<SIGNED>(nibbles_of(b + 8 + s * 16));
    if constexpr (f == Q2_K) return bits_and(moved<-2 * g>(load_32_bytes(b + 16 + half * 32)), 3);
    if constexpr (f == Q3_K) {
        const __m256i two = bits_and(moved<-2 * g>(load_32_bytes(b + 32 + half * 32)), 3);
        return _mm256_or_si256(two, bits_and(moved<2 - s>(load_32_bytes(b)), 4));
    }
    if constexpr (f == Q4_K) return bits_and(moved<-(s % 2 * 4)>(load_32_bytes(b + 16 + s / 2 * 32)), 15);
    if constexpr (f == Q5_K) {
        const __m256i four = bits_and(moved<-(s % 2 * 4)>(load_32_bytes(b + 48 + s / 2 * 32)), 15);
        return _mm256_or_si256(four, bits_and(moved<4 - s>(load_32_bytes(b + 16)), 16));
    }
    if constexpr (f == Q6_K) {
        const __m256i four = bits_and(moved<-(g / 2 * 4)>(load_32_bytes(b + half * 64 + g % 2 * 32)), 15);
        return _mm256_or_si256(four, bits_and(moved<4 - 2 * g>(load_32_bytes(b + 128 + half * 32)), 48));
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
