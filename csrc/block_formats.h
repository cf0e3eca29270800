// The blocks of GGUF's types, as ggml lays them out, and of codes that have their scales elsewhere, read one number at a time.
// Included once by each instruction set, inside
// its own namespace, like simd.h.
//
// Block<f> says of a format
//   ELEMENTS, BYTES       of a block
//   OFFSET                what is to be taken off a code as `codes` gives it, so that codes have no sign (dot products of
//                         bytes want one of both factors unsigned); those of 128 are signed bytes with their top bit turned
//   MOST                  the largest code
//   SUB                   elements that share an integer scale; in blocks of 32, which have none, all
//   SCALE_AT              where its float16 scale d lies (MXFP4: its exponent)
//   MINIMUM_AT            where that of its minima lies, -1 for none
//   codes(b, s, to)       codes 32 s to 32 s + 31, in order; where they lie in pairs, those of even columns before the others
// and of those of 256 elements
//   scales(b, to), minima(b, to)   an integer each sixteen codes, in order
// An element is d * scale * (code - OFFSET), less dmin * minimum; in blocks of 32, d * (code - OFFSET), plus the minimum.
#pragma once
#include "formats.h"
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

// Sixteen bytes of four-bit codes: the low ones, then the high ones.
INLINE void split_nibbles(const uint8_t* from, uint8_t* to) {
    for (int i = 0; i < 16; i++) to[i] = from[i] & 15;
    for (int i = 0; i < 16; i++) to[16 + i] = from[i] >> 4;
}
INLINE void add_fifth_bits(uint32_t bits, uint8_t* to) {
    for (int i = 0; i < 32; i++) to[i] |= (bits >> i & 1) << 4;
}
INLINE void look_up(const uint8_t* table, uint8_t* codes) {
#if defined(__AVX2__)
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    for (int i = 0; i < 32; i += 16) {
        __m128i* at = reinterpret_cast<__m128i*>(codes + i);
        _mm_storeu_si128(at, _mm_shuffle_epi8(values, _mm_loadu_si128(at)));
    }
#elif defined(MOEBIUS_NEON)
    for (int i = 0; i < 32; i += 16) vst1q_u8(codes + i, vqtbl1q_u8(vld1q_u8(table), vld1q_u8(codes + i)));
#else
    for (int i = 0; i < 32; i++) codes[i] = table[codes[i]];
#endif
}

// What four bits stand for, plus the offset. IQ4_NL, IQ4_XS: -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113.
// MXFP4: twice 0 .5 1 1.5 2 3 4 6 and their negatives (E2M1).
alignas(16) constexpr uint8_t IQ4_CODES[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t E2M1_CODES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

template <Format f> struct BlockSizes {
    static constexpr int ELEMENTS = FORMAT_SIZES[f].elements, BYTES = FORMAT_SIZES[f].bytes;
    static constexpr int OFFSET = 0, SUB = 32, SCALE_AT = 0, MINIMUM_AT = -1;
};
template <Format f> struct Block;

template <> struct Block<Q4_0> : BlockSizes<Q4_0> {
    static constexpr int OFFSET = 8, MOST = 15;
    static void codes(const uint8_t* b, int, uint8_t* to) { split_nibbles(b + 2, to); }
};
template <> struct Block<Q4_1> : BlockSizes<Q4_1> {
    static constexpr int MOST = 15, MINIMUM_AT = 2;
    static void codes(const uint8_t* b, int, uint8_t* to) { split_nibbles(b + 4, to); }
};
template <> struct Block<Q5_0> : BlockSizes<Q5_0> {
    static constexpr int OFFSET = 16, MOST = 31;
    static void codes(const uint8_t* b, int, uint8_t* to) {
        split_nibbles(b + 6, to);
        add_fifth_bits(read<uint32_t>(b + 2), to);
    }
};
template <> struct Block<Q5_1> : BlockSizes<Q5_1> {
    static constexpr int MOST = 31, MINIMUM_AT = 2;
    static void codes(const uint8_t* b, int, uint8_t* to) {
        split_nibbles(b + 8, to);
        add_fifth_bits(read<uint32_t>(b + 4), to);
    }
};
template <> struct Block<Q8_0> : BlockSizes<Q8_0> {
    static constexpr int OFFSET = 128, MOST = 255;
    static void codes(const uint8_t* b, int, uint8_t* to) {
        for (int i = 0; i < 32; i++) to[i] = b[2 + i] ^ 0x80;
    }
};
template <> struct Block<IQ4_NL> : BlockSizes<IQ4_NL> {
    static constexpr int OFFSET = 128, MOST = 241;
    static void codes(const uint8_t* b, int, uint8_t* to) {
        split_nibbles(b + 2, to);
        look_up(IQ4_CODES, to);
    }
};
template <> struct Block<MXFP4> : BlockSizes<MXFP4> {
    static constexpr int OFFSET = 12, MOST = 24;
    static void codes(const uint8_t* b, int, uint8_t* to) {
        split_nibbles(b + 1, to);
        look_up(E2M1_CODES, to);
    }
};

// Codes with their scales elsewhere.
template <> struct Block<MXFP4_PLANES> : BlockSizes<MXFP4_PLANES> {
    static constexpr int OFFSET = 12, MOST = 24;
    static void codes(const uint8_t* b, int, uint8_t* to) {
        split_nibbles(b, to);
        look_up(E2M1_CODES, to);
    }
};
// Four bits, and five where a zero point has been taken off.
template <> struct Block<INT4> : BlockSizes<INT4> {
    static constexpr int OFFSET = 16, MOST = 31;
    static void codes(const uint8_t* b, int, uint8_t* to) {
        split_nibbles(b, to);
        for (int i = 0; i < 32; i++) to[i] += 8;
    }
};
template <> struct Block<INT8> : BlockSizes<INT8> {
    static constexpr int OFFSET = 128, MOST = 255;
    static void codes(const uint8_t* b, int, uint8_t* to) {
        for (int i = 0; i < 32; i++) to[i] = b[i] ^ 0x80;
    }
};
// The same, stored 128 larger.
template <> struct Block<INT8_WORDS> : BlockSizes<INT8_WORDS> {
    static constexpr int OFFSET = 128, MOST = 255;
    static void codes(const uint8_t* b, int, uint8_t* to) { memcpy(to, b, 32); }
};
// The minimum lies elsewhere too. Codes of eight bits are read as signed ones, and their minimum is 128 scales larger.
template <> struct Block<AFFINE4> : BlockSizes<AFFINE4> {
    static constexpr int MOST = 15, MINIMUM_AT = 0;
    static void codes(const uint8_t* b, int, uint8_t* to) { split_nibbles(b, to); }
};
template <> struct Block<AFFINE8> : BlockSizes<AFFINE8> {
    static constexpr int OFFSET = 128, MOST = 255, MINIMUM_AT = 0;
    static void codes(const uint8_t* b, int, uint8_t* to) { memcpy(to, b, 32); }
};
constexpr bool are_signed_bytes(Format f) { return f == Q8_0 || f == INT8; }
constexpr bool are_bytes(Format f) { return are_signed_bytes(f) || f == INT8_WORDS || f == AFFINE8; }
constexpr bool are_e2m1(Format f) { return f == MXFP4 || f == MXFP4_PLANES; }

// Two bits of each code, of 32 bytes for each half of the block, lowest first.
INLINE void two_bits(const uint8_t* from, int s, uint8_t* to) {
    for (int i = 0; i < 32; i++) to[i] = from[s / 4 * 32 + i] >> 2 * (s % 4) & 3;
}

template <> struct Block<Q2_K> : BlockSizes<Q2_K> {
    static constexpr int MOST = 3, SUB = 16, SCALE_AT = 80, MINIMUM_AT = 82;
    static void codes(const uint8_t* b, int s, uint8_t* to) { two_bits(b + 16, s, to); }
    static void scales(const uint8_t* b, int16_t* to) {
        for (int i = 0; i < 16; i++) to[i] = b[i] & 15;
    }
    static void minima(const uint8_t* b, int16_t* to) {
        for (int i = 0; i < 16; i++) to[i] = b[i] >> 4;
    }
};

// Sixteen scales of six bits, plus 32: eight bytes of their low four, and four of their high two.
struct SixBits {
    uint32_t words[4];  // four scales each
    explicit SixBits(const uint8_t* p) {
        constexpr uint32_t LOW = 0x0f0f0f0f, TWO = 0x03030303;
        const uint32_t a = read<uint32_t>(p), b = read<uint32_t>(p + 4), high = read<uint32_t>(p + 8);
        words[0] = (a & LOW) | (high & TWO) << 4;
        words[1] = (b & LOW) | (high >> 2 & TWO) << 4;
        words[2] = (a >> 4 & LOW) | (high >> 4 & TWO) << 4;
        words[3] = (b >> 4 & LOW) | (high >> 6 & TWO) << 4;
    }
};

template <> struct Block<Q3_K> : BlockSizes<Q3_K> {
    static constexpr int OFFSET = 4, MOST = 7, SUB = 16, SCALE_AT = 108;
    static void codes(const uint8_t* b, int s, uint8_t* to) {
        two_bits(b + 32, s, to);
        for (int i = 0; i < 32; i++) to[i] |= (b[i] >> s & 1) << 2;
    }
    static void scales(const uint8_t* b, int16_t* to) {
        const SixBits six(b + 96);
        for (int i = 0; i < 16; i++) to[i] = int16_t(six.words[i / 4] >> i % 4 * 8 & 63) - 32;
    }
};

// Eight scales and eight minima of six bits, a byte each.
struct ScalesAndMinima {
    uint64_t scales, minima;
    explicit ScalesAndMinima(const uint8_t* p) {
        constexpr uint32_t SIX = 0x3f3f3f3f, LOW = 0x0f0f0f0f, HIGH = 0x30303030;
        const uint32_t first = read<uint32_t>(p), second = read<uint32_t>(p + 4), rest = read<uint32_t>(p + 8);
        scales = (first & SIX) | uint64_t((rest & LOW) | (first >> 2 & HIGH)) << 32;
        minima = (second & SIX) | uint64_t((rest >> 4 & LOW) | (second >> 2 & HIGH)) << 32;
    }
    static void each_twice(uint64_t bytes, int16_t* to) {
        for (int i = 0; i < 16; i++) to[i] = int16_t(bytes >> i / 2 * 8 & 255);
    }
};

template <> struct Block<Q4_K> : BlockSizes<Q4_K> {
    static constexpr int MOST = 15, MINIMUM_AT = 2;
    static void codes(const uint8_t* b, int s, uint8_t* to) {
        for (int i = 0; i < 32; i++) to[i] = b[16 + s / 2 * 32 + i] >> s % 2 * 4 & 15;
    }
    static void scales(const uint8_t* b, int16_t* to) { ScalesAndMinima::each_twice(ScalesAndMinima(b + 4).scales, to); }
    static void minima(const uint8_t* b, int16_t* to) { ScalesAndMinima::each_twice(ScalesAndMinima(b + 4).minima, to); }
};
template <> struct Block<Q5_K> : BlockSizes<Q5_K> {
    static constexpr int MOST = 31, MINIMUM_AT = 2;
    static void codes(const uint8_t* b, int s, uint8_t* to) {
        for (int i = 0; i < 32; i++) to[i] = (b[48 + s / 2 * 32 + i] >> s % 2 * 4 & 15) | (b[16 + i] >> s & 1) << 4;
    }
    static void scales(const uint8_t* b, int16_t* to) { Block<Q4_K>::scales(b, to); }
    static void minima(const uint8_t* b, int16_t* to) { Block<Q4_K>::minima(b, to); }
};
template <> struct Block<Q6_K> : BlockSizes<Q6_K> {
    static constexpr int OFFSET = 32, MOST = 63, SUB = 16, SCALE_AT = 208;
    static void codes(const uint8_t* b, int s, uint8_t* to) {
        const int half = s / 4, g = s % 4;
        const uint8_t *low = b + half * 64 + g % 2 * 32, *high = b + 128 + half * 32;
        for (int i = 0; i < 32; i++) to[i] = (low[i] >> g / 2 * 4 & 15) | (high[i] >> 2 * g & 3) << 4;
    }
    static void scales(const uint8_t* b, int16_t* to) {
        for (int i = 0; i < 16; i++) to[i] = int8_t(b[192 + i]);
    }
};
template <> struct Block<IQ4_XS> : BlockSizes<IQ4_XS> {
    static constexpr int OFFSET = 128, MOST = 241;
    static void codes(const uint8_t* b, int s, uint8_t* to) {
        split_nibbles(b + 8 + s * 16, to);
        look_up(IQ4_CODES, to);
    }
    static void scales(const uint8_t* b, int16_t* to) {
        const uint32_t low = read<uint32_t>(b + 4), high = read<uint16_t>(b + 2);
        for (int i = 0; i < 16; i++) to[i] = int16_t((low >> i / 2 * 4 & 15) | (high >> i / 2 * 2 & 3) << 4) - 32;
    }
};

// 2^(e - 128): half of what an E8M0 scale stands for, as MXFP4's codes are twice theirs.
INLINE float half_power(uint8_t e) {
    const uint32_t bits = e < 2 ? 0x00200000u << e : uint32_t(e - 1) << 23;
    return read<float>(&bits);
}

template <Format f> INLINE float scale_of(const uint8_t* b) {
    if constexpr (f == MXFP4) return half_power(b[0]);
    else return to_float(f16{read<uint16_t>(b + Block<f>::SCALE_AT)});
}
template <Format f> INLINE float minimum_of(const uint8_t* b) {
    if constexpr (Block<f>::MINIMUM_AT < 0) return 0.0f;
    else return to_float(f16{read<uint16_t>(b + Block<f>::MINIMUM_AT)});
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
