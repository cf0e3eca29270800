// Codes of eight bits that are floating-point numbers themselves (E4M3): a sign, four bits of exponent, three of mantissa; 0x7f
// and 0xff are no numbers. Included once by each instruction set, inside its own namespace, like simd.h.
//
// Two wider formats hold all of them exactly: bfloat16, and float16 of a 256th of each. The exponent of float16 has eight more
// below it than the code's, so that its bits are the code's, moved, subnormal numbers too; and all processors widen float16 to
// float32 fast, whatever a thread has set subnormal numbers to be read as.
#pragma once
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

struct e4m3 {
    uint8_t bits;
};

inline void halve_fp8(const uint8_t* codes, int n, uint16_t* to) {
    for (int i = 0; i < n; i++) {
        const uint16_t size = codes[i] & 127;
        const uint16_t half = size < 127 ? uint16_t(size << 7) : uint16_t(0x7e00);  // NaN
        to[i] = uint16_t(half | (codes[i] & 128) << 8);
    }
}

#if defined(__AVX512F__)

// A 256th of sixteen codes.
INLINE V load(const e4m3* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128(codes, _mm_set1_epi8(char(0x80))), _mm_set1_epi8(char(0xff)));
    // A sign is in two places then, of which the second is the highest bit of the exponent.
    const __m256i moved = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), _mm256_set1_epi16(short(0xbf80)));
    return {_mm512_cvtph_ps(_mm256_mask_mov_epi16(moved, nan, _mm256_set1_epi16(0x7e00)))};
}
INLINE V load_some(const e4m3* p, int n) {
    e4m3 whole[16] = {};
    memcpy(whole, p, n);
    return load(whole);
}

#if defined(__AVX512VBMI__)

// The bytes of bfloat16 that codes without a sign have.
struct Fp8Bytes {
    alignas(64) uint8_t low[128], high[128];
    constexpr Fp8Bytes() : low(), high() {
        constexpr int SMALL[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // 0 to 7 times 2^-9
        for (int code = 0; code < 128; code++) {
            const int number = code < 8 ? SMALL[code] : code < 127 ? (code << 4) + (120 << 7) : 0x7fc0;
            low[code] = uint8_t(number), high[code] = uint8_t(number >> 8);
        }
    }
};
constexpr Fp8Bytes FP8_BYTES;

// Thirty-two codes as bfloat16: each twice, of which the first is looked up as the low byte, and the second as the high one.
INLINE __m512i bfloat16_of(__m256i codes) {
    const __m512i twice = _mm512_set_epi8(31, 31, 30, 30, 29, 29, 28, 28, 27, 27, 26, 26, 25, 25, 24, 24, 23, 23, 22, 22, 21, 21,
                                          20, 20, 19, 19, 18, 18, 17, 17, 16, 16, 15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10,
                                          9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i each = _mm512_permutexvar_epi8(twice, _mm512_castsi256_si512(codes));
    constexpr __mmask64 FIRST = 0x5555555555555555;
    __m512i bytes = _mm512_mask2_permutex2var_epi8(_mm512_load_si512(FP8_BYTES.low), each, FIRST, _mm512_load_si512(FP8_BYTES.low + 64));
    bytes = _mm512_mask2_permutex2var_epi8(_mm512_load_si512(FP8_BYTES.high), bytes, ~FIRST, _mm512_load_si512(FP8_BYTES.high + 64));
    return _mm512_ternarylogic_epi32(bytes, each, _mm512_set1_epi16(short(0x8000)), 0xf8);  // bytes | (each & sign)
}

#else

// Thirty-two codes as bfloat16. Of a normal number the high byte depends on the sign and three bits of the exponent, and the
// low byte is the rest; what is small, and NaN, which stands one below zero when the sign is left out of account, is looked up.
INLINE __m512i bfloat16_of(__m256i codes) {
    const __m256i high_of = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0x3c, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43, 0x3c, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43));
    // Of NaN, 0, and 1 to 7 times 2^-9.
    const __m256i small_high = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0x7f, 0, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c, 0, 0, 0, 0, 0, 0, 0));
    const __m256i small_low = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        char(0xc0), 0, 0, char(0x80), char(0xc0), 0, 0x20, 0x40, 0x60, 0, 0, 0, 0, 0, 0, 0));
    const __m256i four = _mm256_set1_epi8(15), seven = _mm256_set1_epi8(127);
    // Quarters in the order in which the halves of lanes are taken side by side.
    codes = _mm256_permute4x64_epi64(codes, 0xd8);
    const __m256i size = _mm256_and_si256(_mm256_add_epi8(codes, _mm256_set1_epi8(1)), seven);
    const __mmask32 small = _mm256_cmplt_epu8_mask(size, _mm256_set1_epi8(9));
    __m256i high = _mm256_shuffle_epi8(high_of, _mm256_and_si256(_mm256_srli_epi16(codes, 4), four));
    high = _mm256_mask_shuffle_epi8(high, small, small_high, size);
    high = _mm256_ternarylogic_epi32(high, codes, _mm256_set1_epi8(char(0x80)), 0xf8);  // high | (codes & sign)
    __m256i low = _mm256_slli_epi16(_mm256_and_si256(codes, four), 4);
    low = _mm256_mask_shuffle_epi8(low, small, small_low, size);
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi8(low, high)), _mm256_unpackhi_epi8(low, high), 1);
}
#endif

INLINE G bfloat16_groups(const e4m3* p) { return {bfloat16_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
INLINE G bfloat16_groups_some(const e4m3* p, int n) {
    return {bfloat16_of(_mm256_maskz_loadu_epi8(__mmask32((1ull << n) - 1), p))};
}

inline void widen_fp8(const uint8_t* codes, int n, uint16_t* to) {
    const e4m3* from = reinterpret_cast<const e4m3*>(codes);
    int i = 0;
    for (; i + 32 <= n; i += 32) _mm512_storeu_si512(to + i, bfloat16_groups(from + i).v);
    if (i < n) _mm512_mask_storeu_epi16(to + i, __mmask32((1ull << (n - i)) - 1), bfloat16_groups_some(from + i, n - i).v);
}

#elif defined(__AVX2__)

// Bytes beside others that have their signs in the lowest bit, moved to where float16 has both. What is no number has all bits
// set here: its highest one becomes the exponent's, which no number has.
INLINE __m128i sizes_or_nan(__m128i codes) {
    const __m128i size = _mm_and_si128(codes, _mm_set1_epi8(127));
    return _mm_or_si128(size, _mm_cmpeq_epi8(size, _mm_set1_epi8(127)));
}
INLINE __m256 widened(const e4m3* p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i pairs = _mm_unpacklo_epi8(sizes_or_nan(codes), _mm_srli_epi16(codes, 7));
    return _mm256_cvtph_ps(_mm_slli_epi16(pairs, 7));
}
// A 256th of 32 codes.
INLINE void widened_32(const e4m3* p, __m256* to) {
    const __m256i codes = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 0xd8);
    const __m256i most = _mm256_set1_epi8(127), size = _mm256_and_si256(codes, most), signs = _mm256_srli_epi16(codes, 7);
    const __m256i marked = _mm256_or_si256(size, _mm256_cmpeq_epi8(size, most));
    const __m256i first = _mm256_slli_epi16(_mm256_unpacklo_epi8(marked, signs), 7);
    const __m256i second = _mm256_slli_epi16(_mm256_unpackhi_epi8(marked, signs), 7);
    to[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(first)), to[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(first, 1));
    to[2] = _mm256_cvtph_ps(_mm256_castsi256_si128(second)), to[3] = _mm256_cvtph_ps(_mm256_extracti128_si256(second, 1));
}

#endif

}  // namespace MOEBIUS_ISA
}  // namespace moebius
