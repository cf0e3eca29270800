// Rows of weights in blocks as float32 numbers: for embeddings, and where activations are not quantised.
#pragma once
#include "group_scales.h"

namespace moebius {
namespace MOEBIUS_ISA {

// Each operation rounded as gguf-py rounds it.
template <Format f> INLINE void widen_block(const uint8_t* b, float* to) {
    using B = Block<f>;
    const float d = scale_of<f>(b), least = minimum_of<f>(b);
    uint8_t codes[32];
    int16_t scales[16], minima[16];
    if constexpr (B::ELEMENTS == 256) B::scales(b, scales);
    if constexpr (B::ELEMENTS == 256 && B::MINIMUM_AT >= 0) B::minima(b, minima);
    for (int s = 0; s < B::ELEMENTS / 32; s++) {
        B::codes(b, s, codes);
        for (int half = 0; half < 2; half++, to += 16) {
            const V code = sub(bytes_as_floats(codes + half * 16), all(float(B::OFFSET)));
            if constexpr (B::ELEMENTS == 32) {
                const V number = mul(code, all(d));
                store(to, B::MINIMUM_AT < 0 ? number : add(number, all(least)));
            } else {
                const V number = mul(code, all(d * float(scales[2 * s + half])));
                if constexpr (B::MINIMUM_AT < 0) store(to, number);
                else store(to, sub(number, all(least * float(minima[2 * s + half]))));
            }
        }
    }
}

// Each difference is a whole number, and each product is rounded once; then a bias is added.
template <Format f> INLINE void widen_group_block(const uint8_t* b, const GroupScales& groups, int block, float* to) {
    const float d = of_group(groups, groups.data, block);
    const int less = is_affine(f) ? 0 : Block<f>::OFFSET + zero_of_group(groups, block);
    uint8_t codes[32];
    float numbers[32];
    Block<f>::codes(b, 0, codes);
    for (int half = 0; half < 2; half++) {
        V number = mul(sub(bytes_as_floats(codes + half * 16), all(float(less))), all(d));
        if constexpr (is_affine(f)) number = add(number, all(of_group(groups, groups.biases, block)));
        store(numbers + half * 16, number);
    }
    for (int i = 0; i < 32; i++) to[i] = numbers[in_pairs(f) ? i / 2 + i % 2 * 16 : i];
}

template <Format f> void widen_row(const void* row, int blocks, const GroupScales& groups, float* to) {
    const uint8_t* b = static_cast<const uint8_t*>(row);
    if constexpr (has_planes(f))
        for (int i = 0; i < blocks; i++, b += Block<f>::BYTES, to += 32)
            widen_group_block<f>(b, groups, i, to);
    else for (int i = 0; i < blocks; i++) widen_block<f>(b + size_t(i) * Block<f>::BYTES, to + size_t(i) * Block<f>::ELEMENTS);
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
