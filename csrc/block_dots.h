// The integers of sixteen blocks of weights, each with its block of a quantised row: plain loops, and NEON's products of
// bytes. Instruction sets that know better have the same function with their vectors (block_dots_8.h, block_dots_16.h).
#pragma once
#include "block_formats.h"
#include "block_kernels.h"

namespace moebius {
namespace MOEBIUS_ISA {

// What is still to be taken off a code of the sums that are found here.
template <Format f> constexpr int offset_of() { return 0; }

// The sum of (code - OFFSET) * c of sixteen elements.
template <int OFFSET> INLINE int32_t dot_of_sixteen(const uint8_t* codes, const int8_t* x) {
#if defined(MOEBIUS_NEON)
    const int8x16_t w = vreinterpretq_s8_u8(vsubq_u8(vld1q_u8(codes), vdupq_n_u8(OFFSET))), c = vld1q_s8(x);
    // Two products of up to 128 * 127 fit sixteen bits.
    const int16x8_t pairs = vmlal_high_s8(vmull_s8(vget_low_s8(w), vget_low_s8(c)), w, c);
    return vaddlvq_s16(pairs);
#else
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += (codes[i] - OFFSET) * x[i];
    return sum;
#endif
}

// Blocks of 32: the sum of (code - offset) * c.
template <Format f> INLINE int32_t dot_of_32(const uint8_t* w, const int8_t* x) {
    uint8_t codes[32];
    Block<f>::codes(w, 0, codes);
    return dot_of_sixteen<Block<f>::OFFSET>(codes, x) + dot_of_sixteen<Block<f>::OFFSET>(codes + 16, x + 16);
}

// Blocks of 256: the sum of scale * (code - offset) * c.
template <Format f> INLINE int32_t dot_of_256(const uint8_t* w, const int8_t* x) {
    uint8_t codes[32];
    int16_t scales[16];
    Block<f>::scales(w, scales);
    int32_t sum = 0;
    for (int s = 0; s < 8; s++) {
        Block<f>::codes(w, s, codes);
        for (int i = 0; i < 2; i++) sum += scales[2 * s + i] * dot_of_sixteen<Block<f>::OFFSET>(codes + i * 16, x + s * 32 + i * 16);
    }
    return sum;
}
// And of minimum * c, from the sums of sixteen codes.
template <Format f> INLINE int32_t minima_of_256(const uint8_t* w, const int16_t* x_sums) {
    int16_t minima[16];
    Block<f>::minima(w, minima);
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += minima[i] * x_sums[i % 2 * 8 + i / 2];
    return sum;
}

// dots[i][t] (and minima[i][t]), rows STRIDE apart, of blocks w + t * BYTES for t < 16, with block `at` and those after it,
// round and round, of M rows of x. `at` goes on.
template <Format f, int M, int STRIDE>
INLINE void dots_of_16(const uint8_t* w, const QuantisedRow* x, int& at, int blocks, int32_t* dots, int32_t* minima) {
    using B = Block<f>;
    for (int t = 0; t < 16; t++, w += B::BYTES) {
        for (int i = 0; i < M; i++) {
            const int8_t* codes = x[i].codes + at * B::ELEMENTS;
            if constexpr (B::ELEMENTS == 32) dots[i * STRIDE + t] = dot_of_32<f>(w, codes);
            else dots[i * STRIDE + t] = dot_of_256<f>(w, codes);
            if constexpr (B::ELEMENTS == 256 && B::MINIMUM_AT >= 0)
                minima[i * STRIDE + t] = minima_of_256<f>(w, static_cast<const int16_t*>(x[i].sums) + at * 16);
        }
        at = at + 1 < blocks ? at + 1 : 0;
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
