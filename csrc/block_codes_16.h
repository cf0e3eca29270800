// The codes of 64 elements in a register of AVX-512: as Block<f>::codes gives them, or, SIGNED, with the top bit turned.
#pragma once
#include "block_codes_8.h"

namespace moebius {
namespace MOEBIUS_ISA {

INLINE __m512i load_64_bytes(const void* p) { return _mm512_loadu_si512(p); }
INLINE __m512i all_bytes(int byte) { return _mm512_set1_epi8(char(byte)); }
INLINE __m512i twice(__m256i a) { return _mm512_broadcast_i64x4(a); }
// a's low half moved down by `low` bits of each sixteen, its high half by `high`, all but `kept` taken away.
INLINE __m512i halves_down(__m512i a, int low, int high, int kept) {
    const __m512i by = _mm512_inserti64x4(_mm512_set1_epi16(short(low)), _mm256_set1_epi16(short(high)), 1);
    return _mm512_and_si512(_mm512_srlv_epi16(a, by), all_bytes(kept));
}
INLINE __m512i halves_up(__m512i a, int low, int high, int kept) {
    const __m512i by = _mm512_inserti64x4(_mm512_set1_epi16(short(low)), _mm256_set1_epi16(short(high)), 1);
    return _mm512_and_si512(_mm512_sllv_epi16(a, by), all_bytes(kept));
}
// Of each quarter of sixteen bytes in turn the low and the high four bits.
INLINE __m512i nibbles_in_turn(__m512i a) {
    const __m512i by = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004, 0x0004000400040004, 0, 0);
    return _mm512_and_si512(_mm512_srlv_epi16(a, by), all_bytes(15));
}
INLINE __m512i looked_up_64(const uint8_t* table, __m512i codes) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_16_bytes(table)), codes);
}
template <bool SIGNED> INLINE __m512i turned(__m512i codes) { return SIGNED ? _mm512_xor_si512(codes, all_bytes(0x80)) : codes; }
// `value` added to the bytes whose low half's bit `bit` is set in a's low half, or bit `bit + 1` in its high half.
INLINE __m512i with_bits(__m512i codes, __m512i a, int bit, int value) {
    const __m512i bits = _mm512_inserti64x4(all_bytes(1 << bit), _mm256_set1_epi8(char(2 << bit)), 1);
    return _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(a, bits), codes, all_bytes(value));
}

// Four blocks of 32 with four-bit codes: the first sixteen codes of all, and the second ones.
struct HalvesOfFour {
    __m512i first, second;
};
template <int BYTES> INLINE __m512i sixteen_of_four(const uint8_t* p) {
    if constexpr (BYTES == 16) return load_64_bytes(p);
    __m512i all = _mm512_maskz_broadcast_i32x4(0x000f, load_16_bytes(p));
    all = _mm512_mask_broadcast_i32x4(all, 0x00f0, load_16_bytes(p + BYTES));
    all = _mm512_mask_broadcast_i32x4(all, 0x0f00, load_16_bytes(p + 2 * BYTES));
    return _mm512_mask_broadcast_i32x4(all, 0xf000, load_16_bytes(p + 3 * BYTES));
}
template <int BYTES> INLINE __mmask64 bits_of_four(const uint8_t* p) {
    return read<uint16_t>(p) | uint64_t(read<uint16_t>(p + BYTES)) << 16 | uint64_t(read<uint16_t>(p + 2 * BYTES)) << 32 |
           uint64_t(read<uint16_t>(p + 3 * BYTES)) << 48;
}
template <Format f, bool SIGNED> INLINE HalvesOfFour halves_of_four(const uint8_t* w) {
    constexpr int BYTES = Block<f>::BYTES, at = has_planes(f) ? 0 : f == MXFP4 ? 1 : f == Q4_0 || f == IQ4_NL ? 2 : f == Q4_1 ? 4 : f == Q5_0 ? 6 : 8;
    const __m512i both = sixteen_of_four<BYTES>(w + at);
    const HalvesOfFour four = {_mm512_and_si512(both, all_bytes(15)), _mm512_and_si512(_mm512_srli_epi16(both, 4), all_bytes(15))};
    if constexpr (f == IQ4_NL) return {turned<SIGNED>(looked_up_64(IQ4_CODES, four.first)), turned<SIGNED>(looked_up_64(IQ4_CODES, four.second))};
    if constexpr (are_e2m1(f)) return {looked_up_64(E2M1_CODES, four.first), looked_up_64(E2M1_CODES, four.second)};
    if constexpr (f == Q5_0 || f == Q5_1)
        return {_mm512_mask_add_epi8(four.first, bits_of_four<BYTES>(w + at - 4), four.first, all_bytes(16)),
                _mm512_mask_add_epi8(four.second, bits_of_four<BYTES>(w + at - 2), four.second, all_bytes(16))};
    return four;
}

// Two blocks of codes of eight bits.
template <Format f, bool SIGNED> INLINE __m512i codes_of_two(const uint8_t* p) {
    if constexpr (has_planes(f)) return turned<are_signed_bytes(f) != SIGNED>(load_64_bytes(p));
    return turned<!SIGNED>(_mm512_inserti64x4(_mm512_castsi256_si512(load_32_bytes(p + 2)), load_32_bytes(p + Block<f>::BYTES + 2), 1));
}

// Sub-blocks 2 p and 2 p + 1 of a block of 256.
template <Format f, int p, bool SIGNED> INLINE __m512i codes_of_64(const uint8_t* b) {
    constexpr int half = p / 2, odd = p % 2;
    if constexpr (f == Q2_K) return halves_down(twice(load_32_bytes(b + 16 + half * 32)), 4 * odd, 4 * odd + 2, 3);
    if constexpr (f == Q3_K)
        return with_bits(halves_down(twice(load_32_bytes(b + 32 + half * 32)), 4 * odd, 4 * odd + 2, 3), twice(load_32_bytes(b)), 2 * p, 4);
    if constexpr (f == Q4_K) return halves_down(twice(load_32_bytes(b + 16 + p * 32)), 0, 4, 15);
    if constexpr (f == Q5_K)
        return with_bits(halves_down(twice(load_32_bytes(b + 48 + p * 32)), 0, 4, 15), twice(load_32_bytes(b + 16)), 2 * p, 16);
    if constexpr (f == Q6_K) {
        const __m512i both = load_64_bytes(b + half * 64), high = twice(load_32_bytes(b + 128 + half * 32));
        const __m512i four = _mm512_and_si512(odd ? _mm512_srli_epi16(both, 4) : both, all_bytes(15));
        return _mm512_or_si512(four, odd ? halves_down(high, 0, 2, 48) : halves_up(high, 4, 2, 48));
    }
    if constexpr (f == IQ4_XS) {
        const __m512i both = _mm512_castsi256_si512(load_32_bytes(b + 8 + p * 32));
        const __m512i each_twice = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), both);
        return turned<SIGNED>(looked_up_64(IQ4_CODES, nibbles_in_turn(each_twice)));
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
