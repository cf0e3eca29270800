// The integers of sixteen blocks of weights, each with its block of a quantised row, by AVX-512 (see block_dots.h), with
// and without the dot products of VNNI.
#pragma once
#include "block_codes_16.h"
#include "block_kernels.h"
#include "words.h"

namespace moebius {
namespace MOEBIUS_ISA {

// As in block_dots_8.h, what is multiplied in pairs and has eight bits is read signed. VNNI's products of four have room.
#if defined(__AVX512VNNI__)
constexpr bool FOURS = true;
#else
constexpr bool FOURS = false;
#endif
template <Format f> constexpr bool is_signed() { return Block<f>::OFFSET == 128 && !FOURS; }
template <Format f> constexpr int offset_of() { return is_signed<f>() ? 0 : f == INT4 ? 8 : Block<f>::OFFSET; }

// Sums of two products each, sixteen bits.
template <bool SIGNED> INLINE __m512i pairs_of(__m512i codes, const int8_t* x) {
    const __m512i c = load_64_bytes(x);
    if (!SIGNED) return _mm512_maddubs_epi16(codes, c);
    const __m512i with_sign = _mm512_mask_sub_epi8(c, _mm512_movepi8_mask(codes), _mm512_setzero_si512(), c);
    return _mm512_maddubs_epi16(_mm512_abs_epi8(codes), with_sign);
}
// sums + sums of four products each.
template <bool SIGNED> INLINE __m512i add_fours(__m512i sums, __m512i codes, const int8_t* x) {
#if defined(__AVX512VNNI__)
    static_assert(!SIGNED, "VNNI has room for codes without a sign");
    return _mm512_dpbusd_epi32(sums, codes, load_64_bytes(x));
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs_of<SIGNED>(codes, x), _mm512_set1_epi16(1)));
#endif
}
// sums + pairs * scales
INLINE __m512i add_scaled(__m512i sums, __m512i pairs, __m512i scales) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sums, pairs, scales);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, scales));
#endif
}

// Sixteen sums of eight lanes each, of two in each of eight vectors.
INLINE __m512i reduce_pairs(const __m512i* v) {
    const __m512i fours[2] = {sums_of_four(v), sums_of_four(v + 4)};
    const __m512i sums = _mm512_add_epi32(_mm512_shuffle_i32x4(fours[0], fours[1], 0x88), _mm512_shuffle_i32x4(fours[0], fours[1], 0xdd));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15), sums);
}
// Two vectors' lanes, eight sums each.
INLINE __m512i both_in_one(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee));
}

// Sub-blocks from 2 p on of a block of 256, added to sums. Codes of eight bits are multiplied in fours where that is possible,
// and then by scales of 32 bits; others in pairs, by scales of sixteen, which costs less.
template <Format f, int M, int p = 0>
INLINE void add_sub_blocks(const uint8_t* w, __m512i scales, const int8_t* const* x, __m512i* sums) {
    if constexpr (p < 4) {
        const __m512i codes = codes_of_64<f, p, is_signed<f>()>(w);
        // Sixteens 4 p to 4 p + 3, the even ones and the odd ones as scales_of lays them, a quarter of the lanes each.
        constexpr int even = 2 * p, odd = 8 + 2 * p;
        if constexpr (FOURS && Block<f>::OFFSET == 128) {
            const __m512i places = _mm512_setr_epi32(even, even, even, even, odd, odd, odd, odd, even + 1, even + 1, even + 1, even + 1,
                                                     odd + 1, odd + 1, odd + 1, odd + 1);
            const __m512i scale = _mm512_permutexvar_epi32(places, scales);
            for (int i = 0; i < M; i++)
                sums[i] = _mm512_add_epi32(sums[i], _mm512_mullo_epi32(add_fours<false>(_mm512_setzero_si512(), codes, x[i] + p * 64), scale));
        } else {
            constexpr int64_t four = 0x0001000100010001;
            const __m512i places = _mm512_setr_epi64(even * four, even * four, odd * four, odd * four, (even + 1) * four, (even + 1) * four,
                                                     (odd + 1) * four, (odd + 1) * four);
            const __m512i scale = _mm512_permutexvar_epi16(places, scales);
            for (int i = 0; i < M; i++) sums[i] = add_scaled(sums[i], pairs_of<is_signed<f>()>(codes, x[i] + p * 64), scale);
        }
        add_sub_blocks<f, M, p + 1>(w, scales, x, sums);
    }
}

// One block of 256 with block `at` of M rows of x.
template <Format f, int M>
INLINE void parts_of_256(const uint8_t* w, const QuantisedRow* x, int at, __m512i* dots, __m256i* minima) {
    const __m256i scales = scales_of<f>(w);
    const int8_t* codes[M];
    for (int i = 0; i < M; i++) {
        const __m256i x_sums = load_32_bytes(static_cast<const int16_t*>(x[i].sums) + at * 16);
        codes[i] = x[i].codes + at * 256;
        dots[i] = _mm512_setzero_si512();
        if constexpr (offset_of<f>() != 0)
            dots[i] = _mm512_zextsi256_si512(_mm256_sub_epi32(_mm256_setzero_si256(), offsets_of<f>(scales, x_sums)));
        if constexpr (Block<f>::MINIMUM_AT >= 0) minima[i] = _mm256_madd_epi16(minima_of<f>(w), x_sums);
    }
    const bool wide = FOURS && Block<f>::OFFSET == 128;
    add_sub_blocks<f, M>(w, wide ? _mm512_cvtepi16_epi32(scales) : _mm512_castsi256_si512(scales), codes, dots);
}

// Sixteen blocks of 32 with four-bit codes: four in a vector, four lanes each.
template <Format f, int M, int STRIDE>
INLINE void dots_of_halves(const uint8_t* w, const QuantisedRow* x, int& at, int blocks, int32_t* dots) {
    __m512i parts[M][4];
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++, w += 4 * Block<f>::BYTES) {
        const HalvesOfFour codes = halves_of_four<f, is_signed<f>()>(w);
        for (int i = 0; i < M; i++) {
            const __m512i first = add_fours<is_signed<f>()>(_mm512_setzero_si512(), codes.first, x[i].halves[0] + at * 16);
            parts[i][t] = add_fours<is_signed<f>()>(first, codes.second, x[i].halves[1] + at * 16);
        }
        for (at += 4; at >= blocks; at -= blocks) {}
    }
    for (int i = 0; i < M; i++) {
        const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_storeu_si512(dots + i * STRIDE, _mm512_permutexvar_epi32(places, sums_of_four(parts[i])));
    }
}

// Sixteen blocks of codes of eight bits, two in a vector.
template <Format f, int M, int STRIDE>
INLINE void dots_of_bytes(const uint8_t* w, const QuantisedRow* x, int& at, int blocks, int32_t* dots) {
    __m512i parts[M][8];
#pragma GCC unroll 8
    for (int t = 0; t < 8; t++, w += 2 * Block<f>::BYTES) {
        const __m512i codes = codes_of_two<f, is_signed<f>()>(w);
        for (int i = 0; i < M; i++) parts[i][t] = add_fours<is_signed<f>()>(_mm512_setzero_si512(), codes, x[i].codes + at * 32);
        for (at += 2; at >= blocks; at -= blocks) {}
    }
    for (int i = 0; i < M; i++) _mm512_storeu_si512(dots + i * STRIDE, reduce_pairs(parts[i]));
}

// Sixteen blocks of 256.
template <Format f, int M, int STRIDE>
INLINE void dots_of_256(const uint8_t* w, const QuantisedRow* x, int& at, int blocks, int32_t* dots, int32_t* minima) {
    __m512i parts[M][8], least[M][8];  // two blocks each
    for (int t = 0; t < 8; t++, w += 2 * Block<f>::BYTES) {
        __m512i of_block[2][M];
        __m256i of_minima[2][M];
        for (int j = 0; j < 2; j++) {
            parts_of_256<f, M>(w + j * Block<f>::BYTES, x, at, of_block[j], of_minima[j]);
            at = at + 1 < blocks ? at + 1 : 0;
        }
        for (int i = 0; i < M; i++) {
            parts[i][t] = both_in_one(of_block[0][i], of_block[1][i]);
            if constexpr (Block<f>::MINIMUM_AT >= 0)
                least[i][t] = _mm512_inserti64x4(_mm512_castsi256_si512(of_minima[0][i]), of_minima[1][i], 1);
        }
    }
    for (int i = 0; i < M; i++) {
        _mm512_storeu_si512(dots + i * STRIDE, reduce_pairs(parts[i]));
        if constexpr (Block<f>::MINIMUM_AT >= 0) _mm512_storeu_si512(minima + i * STRIDE, reduce_pairs(least[i]));
    }
}

template <Format f, int M, int STRIDE>
INLINE void dots_of_16(const uint8_t* w, const QuantisedRow* x, int& at, int blocks, int32_t* dots, int32_t* minima) {
    if constexpr (Block<f>::ELEMENTS == 256) dots_of_256<f, M, STRIDE>(w, x, at, blocks, dots, minima);
    else if constexpr (are_bytes(f)) dots_of_bytes<f, M, STRIDE>(w, x, at, blocks, dots);
    else dots_of_halves<f, M, STRIDE>(w, x, at, blocks, dots);
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
