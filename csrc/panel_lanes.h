// The vectors of products of block formats with many rows: a lane a weight row. Bit fields are cut out in whole vectors
// of 32 bits, for which compilers have operators; what they have none for is here, for every instruction set.
//
// Four neighbours of a row's numbers, a "quad", fill the 32 bits of a lane. Sums of quads' products are exact in each of four
// ways, by what the instruction set has:
//   QUADS   an instruction for unsigned codes of weights times signed ones of x, summed in 32 bits (VNNI)
//   PAIRS   one for pairs of such products in 16 bits, which are summed in 16 bits as long as that is exact (AVX2, AVX-512)
//   TILES   one for sums of whole tiles of signed codes (AMX)
//   PLAIN   multiplication of signed codes (NEON, portable)
// Where codes are unsigned, they are `offset` larger than what they stand for, and sums start at -offset times the sum of x's.
#pragma once
#include "words.h"

namespace moebius {
namespace MOEBIUS_ISA {

// A function of a class, which INLINE would make static.
#define INLINE_MEMBER inline __attribute__((always_inline))

enum Scheme { QUADS, PAIRS, TILES, PLAIN };
// Rows of x whose sums are in registers at once.
#if defined(MOEBIUS_AMX)
constexpr int LANES = 16, TILE = 16;
constexpr Scheme SCHEME = TILES;
#elif defined(__AVX512F__)
constexpr int LANES = 16, TILE = 8;
#if defined(__AVX512VNNI__)
constexpr Scheme SCHEME = QUADS;
#else
constexpr Scheme SCHEME = PAIRS;
#endif
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE = 4;
constexpr Scheme SCHEME = PAIRS;
#else
#if defined(MOEBIUS_NEON)
constexpr int TILE = 8;
#else
constexpr int TILE = 4;
#endif
constexpr int LANES = 4;
constexpr Scheme SCHEME = PLAIN;
#endif

typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
constexpr int VECTOR = 4 * LANES;  // bytes

template <class Vector> INLINE void put(void* p, Vector v) { memcpy(p, &v, VECTOR); }

INLINE Words bytes_less(Words a, int less) { return (Words)((Bytes)a - uint8_t(less)); }
// A small integer as two halves of 32 bits.
INLINE Ints doubled(Ints a) { return (a & 0xffff) | (a << 16); }

// --- fetching: lanes are rows of bytes ---

#if defined(__AVX512F__)
// Sixteen bytes of every fourth row.
INLINE __m512i every_fourth(const uint8_t* const* rows, size_t at) {
    auto sixteen = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at)); };
    const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(sixteen(0)), sixteen(4), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(two, sixteen(8), 2), sixteen(12), 3);
}
INLINE Words looked_up(Words codes, const uint8_t* table) {
    const __m512i tables = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return (Words)_mm512_shuffle_epi8(tables, (__m512i)codes);
}
// The lowest four bits of each lane to the lowest bits of its four bytes.
INLINE Words spread_bits(Words bits) {
    const __m512i table = _mm512_set_epi32(0x01010101, 0x01010100, 0x01010001, 0x01010000, 0x01000101, 0x01000100,
                                           0x01000001, 0x01000000, 0x00010101, 0x00010100, 0x00010001, 0x00010000,
                                           0x00000101, 0x00000100, 0x00000001, 0x00000000);
    return (Words)_mm512_permutexvar_epi32((__m512i)bits, table);
}
INLINE Floats widened_halves(Words halves) { return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)halves)); }
INLINE Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE Floats fused_less(Floats a, Floats b, Floats c) { return (Floats)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE Floats to_floats(Ints a) { return (Floats)_mm512_cvtepi32_ps((__m512i)a); }
INLINE void put_some(float* p, Floats a, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)a); }
#elif defined(__AVX2__)
INLINE __m256i every_fourth(const uint8_t* const* rows, size_t at) {
    auto sixteen = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at)); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(0)), sixteen(4), 1);
}
INLINE Words looked_up(Words codes, const uint8_t* table) {
    const __m256i tables = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return (Words)_mm256_shuffle_epi8(tables, (__m256i)codes);
}
INLINE Floats widened_halves(Words halves) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)halves, (__m256i)halves), 0x08);
    return (Floats)_mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
INLINE Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE Floats fused_less(Floats a, Floats b, Floats c) { return (Floats)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE Floats to_floats(Ints a) { return (Floats)_mm256_cvtepi32_ps((__m256i)a); }
INLINE void put_some(float* p, Floats a, int n) { memcpy(p, &a, n * sizeof(float)); }
#else
INLINE Words looked_up(Words codes, const uint8_t* table) {
    Bytes bytes = (Bytes)codes;
    for (int i = 0; i < VECTOR; i++) bytes[i] = table[bytes[i]];
    return (Words)bytes;
}
INLINE Floats widened_halves(Words halves) {
    Floats wide;
    for (int i = 0; i < LANES; i++) wide[i] = to_float(f16{uint16_t(halves[i])});
    return wide;
}
#if defined(MOEBIUS_NEON)
INLINE Floats fused(Floats a, Floats b, Floats c) { return (Floats)vfmaq_f32((F4)c, (F4)a, (F4)b); }
INLINE Floats fused_less(Floats a, Floats b, Floats c) { return (Floats)vfmsq_f32((F4)c, (F4)a, (F4)b); }
#else
INLINE Floats fused(Floats a, Floats b, Floats c) {
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
INLINE Floats fused_less(Floats a, Floats b, Floats c) { return fused(-a, b, c); }
#endif
INLINE Floats to_floats(Ints a) { return __builtin_convertvector(a, Floats); }
INLINE void put_some(float* p, Floats a, int n) { memcpy(p, &a, n * sizeof(float)); }
#endif

// out[j] = the j-th of four words, from byte `at` on, of all rows
#if defined(__AVX2__)
INLINE void turn(const uint8_t* const* rows, size_t at, Words* out) {
    const decltype(every_fourth(rows, at)) v[4] = {every_fourth(rows, at), every_fourth(rows + 1, at), every_fourth(rows + 2, at),
                                                   every_fourth(rows + 3, at)};
    transpose_words(v, out);
}
#else
INLINE void turn(const uint8_t* const* rows, size_t at, Words* out) {
    for (int j = 0; j < 4; j++)
        for (int r = 0; r < LANES; r++) out[j][r] = read<uint32_t>(rows[r] + at + 4 * j);
}
#endif

#if !defined(__AVX512F__)
// The same: of four copies, 7 bits apart, each byte keeps one.
INLINE Words spread_bits(Words bits) { return ((bits & 15) * 0x00204081u) & 0x01010101u; }
#endif

// The 16 bits at byte `at` of each row, in the low halves. One by one: the processor's units for single words do nothing else
// meanwhile.
INLINE Words halves_of(const uint8_t* const* rows, size_t at) {
    alignas(VECTOR) uint32_t halves[LANES];
#pragma GCC unroll 16
    for (int r = 0; r < LANES; r++) halves[r] = read<uint16_t>(rows[r] + at);
    return read<Words>(halves);
}

// --- sums of products ---

#if defined(__AVX2__)
// Compilers know that whole numbers may be added in any order, and make trees of sums for which there are too few registers.
INLINE Ints in_order(Ints sum) {
    asm("" : "+v"(sum));
    return sum;
}
#endif

#if defined(__AVX512F__)
INLINE Ints plus_pairs(Ints sum, Ints a, Ints b) {  // of signed halves
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    return in_order(sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b));
#endif
}
#if defined(__AVX512VNNI__)
INLINE Ints plus_quads(Ints sum, Words w, const void* x) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(read<int32_t>(x)));
}
#endif
INLINE Ints plus_halves(Ints sum, Words w, int32_t x) {
    return in_order((Ints)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16((__m512i)w, _mm512_set1_epi32(x))));
}
INLINE Words negative_bytes(Words a) { return (Words)_mm512_movm_epi8(_mm512_movepi8_mask((__m512i)a)); }
INLINE Words byte_sizes(Words a) { return (Words)_mm512_abs_epi8((__m512i)a); }
INLINE Ints halves_of_products(Words sizes, Words x) { return (Ints)_mm512_maddubs_epi16((__m512i)sizes, (__m512i)x); }
#elif defined(__AVX2__)
INLINE Ints plus_pairs(Ints sum, Ints a, Ints b) {
    return in_order(sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b));
}
INLINE Ints plus_halves(Ints sum, Words w, int32_t x) {
    return in_order((Ints)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x))));
}
INLINE Words negative_bytes(Words a) { return (Words)_mm256_cmpgt_epi8(_mm256_setzero_si256(), (__m256i)a); }
INLINE Words byte_sizes(Words a) { return (Words)_mm256_abs_epi8((__m256i)a); }
INLINE Ints halves_of_products(Words sizes, Words x) { return (Ints)_mm256_maddubs_epi16((__m256i)sizes, (__m256i)x); }
#elif defined(MOEBIUS_NEON)
INLINE Ints plus_pairs(Ints sum, Ints a, Ints b) {
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_s16(vget_high_s16(x), vget_high_s16(y));
    return (Ints)vaddq_s32((int32x4_t)sum, vpaddq_s32(low, high));
}
INLINE Ints plus_quads(Ints sum, Words w, const void* x) {
    const int8x16_t codes = (int8x16_t)w, turned = vreinterpretq_s8_s32(vdupq_n_s32(read<int32_t>(x)));
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(turned));
    const int16x8_t high = vmull_s8(vget_high_s8(codes), vget_high_s8(turned));
    return (Ints)vaddq_s32((int32x4_t)sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#else
INLINE Ints plus_pairs(Ints sum, Ints a, Ints b) { return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16); }
INLINE Ints plus_quads(Ints sum, Words w, const void* x) {
    const Ints codes = (Ints)w;
    const uint32_t turned = read<uint32_t>(x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum += ((codes << (24 - 8 * i)) >> 24) * int32_t(int8_t(turned >> (8 * i)));
    return sum;
}
#endif

#if !defined(__AVX2__)
typedef int8_t SignedBytes __attribute__((vector_size(4 * LANES)));
INLINE Words negative_bytes(Words a) { return (Words)((SignedBytes)a < 0); }
INLINE Words byte_sizes(Words a) { return (Words)(((Bytes)a ^ (Bytes)negative_bytes(a)) - (Bytes)negative_bytes(a)); }
#endif

INLINE Ints all_ints(int32_t x) { return Ints{} + x; }
INLINE Floats all_floats(float x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Floats)_mm256_set1_ps(x);
#else
    return Floats{x, x, x, x};
#endif
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
