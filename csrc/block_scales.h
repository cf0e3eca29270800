// The integer scales and minima of blocks of 256 elements on x86: sixteen of 16 bits, one a sixteen codes, those of the even
// sixteens (0, 2, ...) in the low half and those of the odd ones in the high half, as the sums of codes lie (block_kernels.h).
#pragma once
#include "block_formats.h"

namespace moebius {
namespace MOEBIUS_ISA {

INLINE __m128i load_16_bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// Sixteen bytes in order, those at even places first.
INLINE __m128i evens_first(__m128i bytes) {
    return _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
}
// Eight bytes, each of which stands for an even sixteen and the odd one after it.
INLINE __m256i each_for_both(uint64_t bytes) {
    return _mm256_broadcastsi128_si256(_mm_cvtepu8_epi16(_mm_cvtsi64_si128(int64_t(bytes))));
}

template <Format f> INLINE __m256i scales_of(const uint8_t* b) {
    if constexpr (f == Q4_K || f == Q5_K) return each_for_both(ScalesAndMinima(b + 4).scales);
    if constexpr (f == Q6_K) return _mm256_cvtepi8_epi16(evens_first(load_16_bytes(b + 192)));
    if constexpr (f == Q2_K) return _mm256_cvtepu8_epi16(evens_first(_mm_and_si128(load_16_bytes(b), _mm_set1_epi8(15))));
    if constexpr (f == Q3_K) {
        const SixBits six(b + 96);
        // By way of registers: sixteen bytes that were just written as four numbers come back late.
        const __m128i bytes = _mm_setr_epi32(int(six.words[0]), int(six.words[1]), int(six.words[2]), int(six.words[3]));
        return _mm256_cvtepi8_epi16(evens_first(_mm_sub_epi8(bytes, _mm_set1_epi8(32))));
    }
    if constexpr (f == IQ4_XS) {
        const __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32(read<int32_t>(b + 4)), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(read<uint16_t>(b + 2)), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
        const __m256i six = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
                                            _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4));
        const __m256i scales = _mm256_sub_epi32(six, _mm256_set1_epi32(32));
        return _mm256_permute4x64_epi64(_mm256_packs_epi32(scales, scales), 0x88);
    }
}

template <Format f> INLINE __m256i minima_of(const uint8_t* b) {
    if constexpr (f == Q2_K) return _mm256_cvtepu8_epi16(evens_first(_mm_and_si128(_mm_srli_epi16(load_16_bytes(b), 4), _mm_set1_epi8(15))));
    else return each_for_both(ScalesAndMinima(b + 4).minima);
}

// The sum of scale * OFFSET * (sum of codes): what the codes' offset adds to a block's products, in eight parts.
template <Format f> INLINE __m256i offsets_of(__m256i scales, __m256i sums) {
    constexpr int OFFSET = Block<f>::OFFSET;
    static_assert(OFFSET == 4 || OFFSET == 32 || OFFSET == 128, "a power of two");
    return _mm256_slli_epi32(_mm256_madd_epi16(scales, sums), OFFSET == 4 ? 2 : OFFSET == 32 ? 5 : 7);
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
