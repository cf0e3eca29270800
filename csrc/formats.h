// Number formats: what is computed in, and what matrices of weights are stored in.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moebius {

enum Dtype { BF16 = 0, F32 = 1 };

// How a row of a matrix lies in its file: plain numbers, or blocks of bytes that hold codes and their scales (GGUF's types,
// laid out as block_formats.h says). Of those from MXFP4_PLANES on the blocks are codes alone, and the scales of groups of them
// lie in a plane of their own (GroupScales), as Hugging Face's directories have them. Of FP8 the rows are codes alone too, whose
// scales are Matrix::scales.
enum Format {
    BF16_MATRIX = 0, F32_MATRIX, F16_MATRIX, DENSE_FORMATS,
    Q4_0 = DENSE_FORMATS, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS,
    MXFP4_PLANES, INT4, INT8, INT8_WORDS, AFFINE4, AFFINE8, FORMATS,
    FP8 = FORMATS, ALL_FORMATS
};
// What a template has for each format of blocks, in their order.
#define MOEBIUS_EACH_BLOCK_FORMAT(of)                                                                                     \
    {of<Q4_0>, of<Q4_1>, of<Q5_0>, of<Q5_1>, of<Q8_0>, of<IQ4_NL>, of<MXFP4>,                                             \
     of<Q2_K>, of<Q3_K>, of<Q4_K>, of<Q5_K>, of<Q6_K>, of<IQ4_XS>,                                                        \
     of<MXFP4_PLANES>, of<INT4>, of<INT8>, of<INT8_WORDS>, of<AFFINE4>, of<AFFINE8>}

// A block of so many elements takes so many bytes, and is aligned to nothing; a plain number is a block of one.
struct FormatSize {
    const char* name;
    int elements, bytes;
};
constexpr FormatSize FORMAT_SIZES[ALL_FORMATS] = {
    {"bfloat16", 1, 2}, {"float32", 1, 4},  {"float16", 1, 2},  {"q4_0", 32, 18},   {"q4_1", 32, 20},   {"q5_0", 32, 22},
    {"q5_1", 32, 24},   {"q8_0", 32, 34},   {"iq4_nl", 32, 18}, {"mxfp4", 32, 17},  {"q2_k", 256, 84},  {"q3_k", 256, 110},
    {"q4_k", 256, 144}, {"q5_k", 256, 176}, {"q6_k", 256, 210}, {"iq4_xs", 256, 136},
    {"mxfp4_planes", 32, 16}, {"int4", 32, 16}, {"int8", 32, 32}, {"int8_words", 32, 32}, {"affine4", 32, 16}, {"affine8", 32, 32},
    {"fp8", 1, 1},
};

constexpr bool is_blocks(Format format) { return format >= DENSE_FORMATS && format < FORMATS; }
constexpr bool has_planes(Format format) { return format >= MXFP4_PLANES && format < FORMATS; }
// Whose four-bit codes lie in pairs: of each byte the low one is an even column's, the high one the next.
constexpr bool in_pairs(Format format) { return format == MXFP4_PLANES || format == INT4 || format == AFFINE4; }
// Numbers are scale * code + bias, of codes without a sign.
constexpr bool is_affine(Format format) { return format == AFFINE4 || format == AFFINE8; }
// Plain numbers are read in place where each has its exact value in the dtype; blocks meet quantised activations in any, and
// FP8 is widened to what it is multiplied by.
constexpr bool reads(Dtype dtype, Format format) { return is_blocks(format) || format == FP8 || dtype == F32 || format == BF16_MATRIX; }

}  // namespace moebius
