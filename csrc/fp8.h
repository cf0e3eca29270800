// Codes of eight bits that are floating-point numbers themselves (E4M3): a sign, four bits of exponent, three of mantissa.
// Included once by each instruction set, inside its own namespace, like simd.h.
#pragma once
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

// n codes as float16 numbers of which each is a 256th, which they all hold exactly: the exponent of one has eight more below
// it than the other's. All processors widen these fast, small ones too.
inline void halve_fp8(const uint8_t* codes, int n, uint16_t* to) {
    for (int i = 0; i < n; i++) {
        const uint16_t size = codes[i] & 127;
        const uint16_t half = size < 127 ? uint16_t(size << 7) : uint16_t(0x7e00);  // NaN
        to[i] = uint16_t(half | (codes[i] & 128) << 8);
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
