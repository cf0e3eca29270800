// Activations in eight bits, block by block of a row: c_i = x_i * (127 / a) rounded to the nearest whole number, ties to even,
// with a the largest |x_i| of the block, and their scale d_x = a / 127. Plain loops that any compiler vectorises, because
// their steps give the same bits however wide the vectors are.
//
// A block that holds an infinity or a NaN gets codes 0 and the scale NaN, so that its products are NaN. One whose largest
// value is under 2^-100 counts as zeros: its reciprocal could be infinite, and products with it as small as nothing.
#pragma once
#include "block_kernels.h"
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

INLINE uint32_t bits_of(float x) { return read<uint32_t>(&x); }

// Writes the codes of B values, and the sums of each SUMMED of them; returns their scale.
template <int B, int SUMMED> INLINE float quantise_block(const float* x, int8_t* codes, int32_t* sums) {
    int32_t largest = 0;  // as whole numbers, floats without their signs have the order of their sizes, then infinity, then NaN
    for (int i = 0; i < B; i++) {
        const int32_t size = int32_t(bits_of(x[i]) & 0x7fffffffu);
        largest = largest > size ? largest : size;
    }
    const float a = read<float>(&largest);
    const bool finite = largest < 0x7f800000, none = largest < int32_t(27u << 23);  // 2^-100
    if (!finite || none) {
        memset(codes, 0, B);
        for (int i = 0; i < B / SUMMED; i++) sums[i] = 0;
        return finite ? 0.0f : __builtin_nanf("");
    }
    const float inverse = 127.0f / a;
    // Added to what is smaller than 2^22, this leaves whole numbers in the last bits, rounded as every addition is.
    constexpr float SHIFT = 0x1.8p23f;
    for (int i = 0; i < B; i++) codes[i] = int8_t(bits_of(x[i] * inverse + SHIFT) - bits_of(SHIFT));
    for (int i = 0; i < B / SUMMED; i++) {
        int32_t sum = 0;
        for (int j = 0; j < SUMMED; j++) sum += codes[i * SUMMED + j];
        sums[i] = sum;
    }
    return a / 127.0f;
}

template <class T, int B> INLINE const float* as_floats(const T* x, float* room) {
    if constexpr (sizeof(T) == 4) return x;
    else {
        for (int i = 0; i < B; i++) room[i] = to_float(x[i]);
        return room;
    }
}

// A row's codes once more, halves of blocks together, and what is read behind its end (block_kernels.h).
INLINE void repeat_codes(int8_t* codes, const QuantisedShape& shape) {
    memcpy(codes + size_t(shape.blocks) * 32, codes, 32);
    for (int half = 0; half < 2; half++) {
        int8_t* to = codes + shape.halves_at() + half * shape.half_bytes();
        for (int b = 0; b < shape.blocks + 3; b++)
            memcpy(to + b * 16, codes + size_t(b < shape.blocks ? b : b % shape.blocks) * 32 + half * 16, 16);
    }
}

INLINE void evens_before_odds(int8_t* codes) {
    int8_t in_order[32];
    memcpy(in_order, codes, 32);
    for (int i = 0; i < 16; i++) codes[i] = in_order[2 * i], codes[16 + i] = in_order[2 * i + 1];
}

template <class T, BlockSize SIZE> void quantise_rows(const void* const* rows, int m, int k, void* to) {
    constexpr int B = QuantisedShape::elements_of(SIZE), SUMMED = SIZE == BY_256 ? 16 : 32;
    const QuantisedShape shape(SIZE, k);
    float room[B];
    for (int r = 0; r < m; r++) {
        const T* x = static_cast<const T*>(rows[r]);
        char* row = static_cast<char*>(to) + r * shape.row_bytes();
        int8_t* codes = reinterpret_cast<int8_t*>(row);
        float* scales = reinterpret_cast<float*>(row + shape.scales_at());
        void* row_sums = row + shape.sums_at();
        for (int b = 0; b < shape.blocks; b++) {
            int32_t sums[B / SUMMED];
            scales[b] = quantise_block<B, SUMMED>(as_floats<T, B>(x + size_t(b) * B, room), codes + size_t(b) * B, sums);
            if constexpr (SIZE == PAIRS_BY_32) evens_before_odds(codes + size_t(b) * B);
            if constexpr (SIZE != BY_256) static_cast<int32_t*>(row_sums)[b] = sums[0];
            else for (int i = 0; i < 16; i++) static_cast<int16_t*>(row_sums)[b * 16 + i % 2 * 8 + i / 2] = int16_t(sums[i]);
        }
        for (int b = shape.blocks; b < shape.padded(); b++) {
            scales[b] = 0.0f;
            if constexpr (SIZE != BY_256) static_cast<int32_t*>(row_sums)[b] = 0;
        }
        if constexpr (SIZE != BY_256) repeat_codes(codes, shape);
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
