// Four registers of 32-bit words, of whatever width: what is done with them in every 128 bits by itself.
#pragma once
#include "simd.h"

#if defined(__AVX2__)
namespace moebius {
namespace MOEBIUS_ISA {

// The low, or the high, two words of a and b in turn; the low, or the high, pairs of words.
INLINE __m128i low_words(__m128i a, __m128i b) { return _mm_unpacklo_epi32(a, b); }
INLINE __m128i high_words(__m128i a, __m128i b) { return _mm_unpackhi_epi32(a, b); }
INLINE __m128i low_pairs(__m128i a, __m128i b) { return _mm_unpacklo_epi64(a, b); }
INLINE __m128i high_pairs(__m128i a, __m128i b) { return _mm_unpackhi_epi64(a, b); }
INLINE __m256i low_words(__m256i a, __m256i b) { return _mm256_unpacklo_epi32(a, b); }
INLINE __m256i high_words(__m256i a, __m256i b) { return _mm256_unpackhi_epi32(a, b); }
INLINE __m256i low_pairs(__m256i a, __m256i b) { return _mm256_unpacklo_epi64(a, b); }
INLINE __m256i high_pairs(__m256i a, __m256i b) { return _mm256_unpackhi_epi64(a, b); }
INLINE __m256i add_words(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
#if defined(__AVX512F__)
INLINE __m512i low_words(__m512i a, __m512i b) { return _mm512_unpacklo_epi32(a, b); }
INLINE __m512i high_words(__m512i a, __m512i b) { return _mm512_unpackhi_epi32(a, b); }
INLINE __m512i low_pairs(__m512i a, __m512i b) { return _mm512_unpacklo_epi64(a, b); }
INLINE __m512i high_pairs(__m512i a, __m512i b) { return _mm512_unpackhi_epi64(a, b); }
INLINE __m512i add_words(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
#endif

// out[j] = word j of each of the four, side by side.
template <class Register, class Out> INLINE void transpose_words(const Register* v, Out* out) {
    const Register a = low_words(v[0], v[1]), b = high_words(v[0], v[1]), c = low_words(v[2], v[3]), d = high_words(v[2], v[3]);
    out[0] = (Out)low_pairs(a, c), out[1] = (Out)high_pairs(a, c);
    out[2] = (Out)low_pairs(b, d), out[3] = (Out)high_pairs(b, d);
}
// Word j is the sum of the j-th one's words.
template <class Register> INLINE Register sums_of_four(const Register* v) {
    const Register low = add_words(low_words(v[0], v[1]), high_words(v[0], v[1]));
    const Register high = add_words(low_words(v[2], v[3]), high_words(v[2], v[3]));
    return add_words(low_pairs(low, high), high_pairs(low, high));
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
#endif
