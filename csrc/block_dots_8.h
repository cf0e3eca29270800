// The integers of sixteen blocks of weights, each with its block of a quantised row, by AVX2 (see block_dots.h).
#pragma once
#include "block_codes_8.h"
#include "block_kernels.h"
#include "words.h"

namespace moebius {
namespace MOEBIUS_ISA {

// Bytes multiplied in pairs are added in sixteen bits, which two products of up to 128 * 127 fit, but not of 255 * 127: codes
// of eight bits are read as signed ones, whose sizes (up to 128) take the place of codes without a sign, and the other
// factors, which never are -128, their signs.
template <Format f> constexpr bool is_signed() { return Block<f>::OFFSET == 128; }
template <Format f> constexpr int offset_of() { return is_signed<f>() ? 0 : f == INT4 ? 8 : Block<f>::OFFSET; }

// Sums of two products each, sixteen bits.
template <bool SIGNED> INLINE __m256i pairs_of(__m256i codes, const int8_t* x) {
    const __m256i c = load_32_bytes(x);
    return SIGNED ? _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(c, codes)) : _mm256_maddubs_epi16(codes, c);
}

// The sums of eight vectors' lanes.
INLINE __m256i reduce_8(const __m256i* v) {
    const __m256i fours[2] = {sums_of_four(v), sums_of_four(v + 4)};
    return _mm256_add_epi32(_mm256_permute2x128_si256(fours[0], fours[1], 0x20), _mm256_permute2x128_si256(fours[0], fours[1], 0x31));
}

// Sub-blocks s to 7 of a block of 256, added to sums.
template <Format f, int M, int s = 0>
INLINE void add_sub_blocks(const uint8_t* w, __m256i scales, const int8_t* const* x, __m256i* sums) {
    if constexpr (s < 8) {
        const __m256i codes = codes_of_32<f, s, is_signed<f>()>(w);
        const __m256i scale = _mm256_shuffle_epi8(scales, _mm256_set1_epi16(2 * s | (2 * s + 1) << 8));
        for (int i = 0; i < M; i++)
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs_of<is_signed<f>()>(codes, x[i] + s * 32), scale));
        add_sub_blocks<f, M, s + 1>(w, scales, x, sums);
    }
}

// One block of 256 with block `at` of M rows of x.
template <Format f, int M, int STRIDE>
INLINE void parts_of_256(const uint8_t* w, const QuantisedRow* x, int at, __m256i* dots, __m256i* minima) {
    const __m256i scales = scales_of<f>(w);
    const int8_t* codes[M];
    __m256i sums[M];
    for (int i = 0; i < M; i++) {
        const __m256i x_sums = load_32_bytes(static_cast<const int16_t*>(x[i].sums) + at * 16);
        codes[i] = x[i].codes + at * 256;
        sums[i] = _mm256_setzero_si256();
        if constexpr (offset_of<f>() != 0) sums[i] = _mm256_sub_epi32(sums[i], offsets_of<f>(scales, x_sums));
        if constexpr (Block<f>::MINIMUM_AT >= 0) minima[i * STRIDE] = _mm256_madd_epi16(minima_of<f>(w), x_sums);
    }
    add_sub_blocks<f, M>(w, scales, codes, sums);
    for (int i = 0; i < M; i++) dots[i * STRIDE] = sums[i];
}

INLINE void store_8(int32_t* to, __m256i a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a); }

// Sixteen blocks of 32 with four-bit codes: two in a vector, four lanes each.
template <Format f, int M, int STRIDE>
INLINE void dots_of_halves(const uint8_t* w, const QuantisedRow* x, int& at, int blocks, int32_t* dots) {
    constexpr int BYTES = Block<f>::BYTES;
    constexpr bool SIGNED = is_signed<f>();
    const __m256i ones = _mm256_set1_epi16(1);
    for (int first = 0; first < 16; first += 8) {
        __m256i parts[M][4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++, w += 2 * BYTES) {
            const Halves codes = halves_of_two<f, SIGNED>(w, w + BYTES);
            for (int i = 0; i < M; i++) {
                const __m256i a = pairs_of<SIGNED>(codes.first, x[i].halves[0] + at * 16);
                const __m256i b = pairs_of<SIGNED>(codes.second, x[i].halves[1] + at * 16);
                // Four products of codes below 32 still fit sixteen bits.
                if (SIGNED) parts[i][t] = _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
                else parts[i][t] = _mm256_madd_epi16(_mm256_add_epi16(a, b), ones);
            }
            for (at += 2; at >= blocks; at -= blocks) {}
        }
        for (int i = 0; i < M; i++) {
            const __m256i places = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            store_8(dots + i * STRIDE + first, _mm256_permutevar8x32_epi32(sums_of_four(parts[i]), places));
        }
    }
}

template <Format f, int M, int STRIDE>
INLINE void dots_of_16(const uint8_t* w, const QuantisedRow* x, int& at, int blocks, int32_t* dots, int32_t* minima) {
    using B = Block<f>;
    if constexpr (B::ELEMENTS == 32 && !are_bytes(f)) return dots_of_halves<f, M, STRIDE>(w, x, at, blocks, dots);
    else for (int half = 0; half < 16; half += 8) {
        __m256i parts[M][8], least[M][8];
        for (int t = 0; t < 8; t++, w += B::BYTES) {
            if constexpr (B::ELEMENTS == 256) parts_of_256<f, M, 8>(w, x, at, &parts[0][t], &least[0][t]);
            else {
                const __m256i codes = codes_of_32<f, 0, is_signed<f>()>(w);
                for (int i = 0; i < M; i++)
                    parts[i][t] = _mm256_madd_epi16(pairs_of<is_signed<f>()>(codes, x[i].codes + at * 32), _mm256_set1_epi16(1));
            }
            at = at + 1 < blocks ? at + 1 : 0;
        }
        for (int i = 0; i < M; i++) {
            store_8(dots + i * STRIDE + half, reduce_8(parts[i]));
            if constexpr (B::ELEMENTS == 256 && B::MINIMUM_AT >= 0) store_8(minima + i * STRIDE + half, reduce_8(least[i]));
        }
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
