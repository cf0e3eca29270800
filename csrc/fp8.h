// Codes of eight bits that are floating-point numbers themselves (E4M3): a sign, four bits of exponent, three of mantissa.
// Included once by each instruction set, inside its own namespace, like simd.h.
#pragma once
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

// A row of k codes times the scale of the group that each is in, of which the last may be shorter. Each product is rounded
// once; the numbers of the codes are exact, and those that float32 would have to hold as subnormal ones never arise.
inline void widen_fp8(const void* row, int k, const float* scales, int group, float* to) {
    const uint8_t* codes = static_cast<const uint8_t*>(row);
    for (int start = 0; start < k; start += group, scales++) {
        const int stop = min_of(start + group, k);
        const float scale = *scales;
        for (int i = start; i < stop; i++) {
            const int32_t code = codes[i], size = code & 127;
            const float small = float(size) * 0x1p-9f;  // without a leading one
            int32_t bits;
            memcpy(&bits, &small, 4);
            bits = size < 8 ? bits : (size << 20) + (120 << 23);
            bits = size < 127 ? bits : 0x7fc00000;  // NaN
            bits |= int32_t(uint32_t(code & 128) << 24);
            float number;
            memcpy(&number, &bits, 4);
            to[i] = number * scale;
        }
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
