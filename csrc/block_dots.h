// The integers of sixteen blocks of weights, each with its block of a quantised row: plain loops. Instruction sets that
// know better have the same function with their vectors (block_dots_8.h, block_dots_16.h).
#pragma once
#include "block_formats.h"
#include "block_kernels.h"

namespace moebius {
namespace MOEBIUS_ISA {

// What is taken off a code as the dot products here read it.
template <Format f> constexpr int offset_of() { return Block<f>::OFFSET; }

// Blocks of 32: the sum of code * c, without the offset.
template <Format f> INLINE int32_t dot_of_32(const uint8_t* w, const int8_t* x) {
    uint8_t codes[32];
    Block<f>::codes(w, 0, codes);
    int32_t sum = 0;
    for (int i = 0; i < 32; i++) sum += codes[i] * x[i];
    return sum;
}

// Blocks of 256: the sum of scale * (code - offset) * c, and of minimum * c.
template <Format f> INLINE void dot_of_256(const uint8_t* w, const int8_t* x, const int16_t* x_sums, int32_t* dot, int32_t* minima) {
    using B = Block<f>;
    uint8_t codes[32];
    int16_t factors[16];
    B::scales(w, factors);
    int32_t sum = 0;
    for (int s = 0; s < 8; s++) {
        B::codes(w, s, codes);
        int32_t halves[2] = {0, 0};
        for (int i = 0; i < 32; i++) halves[i / 16] += codes[i] * x[s * 32 + i];
        for (int i = 0; i < 2; i++) sum += factors[2 * s + i] * (halves[i] - B::OFFSET * x_sums[i * 8 + s]);
    }
    *dot = sum;
    if constexpr (B::MINIMUM_AT >= 0) {
        B::minima(w, factors);
        int32_t least = 0;
        for (int i = 0; i < 16; i++) least += factors[i] * x_sums[i % 2 * 8 + i / 2];
        *minima = least;
    }
}

// dots[i][t] (and minima[i][t]), rows STRIDE apart, of blocks w + t * BYTES for t < 16, with block `at` and those after it,
// round and round, of M rows of x. `at` goes on.
template <Format f, int M, int STRIDE>
INLINE void dots_of_16(const uint8_t* w, const QuantisedRow* x, int& at, int blocks, int32_t* dots, int32_t* minima) {
    using B = Block<f>;
    for (int t = 0; t < 16; t++) {
        for (int i = 0; i < M; i++) {
            if constexpr (B::ELEMENTS == 32)
                dots[i * STRIDE + t] = dot_of_32<f>(w + t * B::BYTES, x[i].codes + at * 32);
            else
                dot_of_256<f>(w + t * B::BYTES, x[i].codes + at * 256, static_cast<const int16_t*>(x[i].sums) + at * 16,
                              dots + i * STRIDE + t, minima + i * STRIDE + t);
        }
        at = at + 1 < blocks ? at + 1 : 0;
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
