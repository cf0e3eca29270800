// Compiled once for each instruction set, with -DMOEBIUS_ISA=name and its flags. Includes no standard templates: the
// linker would merge their instances across units, and run one unit's instructions on another's processor.
#include "attention_int8.h"
#include "fp8_product.h"
#include "ordered_product.h"
#include "pointwise.h"
#include "recurrent.h"
#if defined(__AVX512F__)
#include "attention_16.h"
#include "product_16.h"
#define MOEBIUS_PACK(T) nullptr
#define MOEBIUS_16_OR_8(kernel, ...) kernel##_16<__VA_ARGS__>
#else
#include "attention_8.h"
#include "product_8.h"
#define MOEBIUS_PACK(T) pack_8<T>
#define MOEBIUS_16_OR_8(kernel, ...) kernel##_8<__VA_ARGS__>
#endif
#if defined(MOEBIUS_AMX)
#include "amx_attention.h"
#include "amx_product.h"
#define MOEBIUS_BF16(plain, amx) amx
#else
#define MOEBIUS_BF16(plain, amx) plain
#endif

#define MOEBIUS_TEXT2(a) #a
#define MOEBIUS_TEXT(a) MOEBIUS_TEXT2(a)

namespace moebius {
namespace MOEBIUS_ISA {

const BlockKernels* block_kernels();  // blocks_isa.cpp

const Fp8Kernels FP8_BESIDE_FLOATS = {F32, F16_MATRIX, 256.0f, halve_fp8, fp8_product<float>};

const Kernels* kernels() {
    static const Kernels table = {
        MOEBIUS_TEXT(MOEBIUS_ISA),
        {MOEBIUS_BF16(MOEBIUS_PACK(bf16), amx_pack), MOEBIUS_PACK(float)},
        {{MOEBIUS_BF16((MOEBIUS_16_OR_8(product, bf16, bf16)), amx_product), nullptr, nullptr},
         {MOEBIUS_16_OR_8(product, float, bf16), MOEBIUS_16_OR_8(product, float, float), MOEBIUS_16_OR_8(product, float, f16)}},
        {{ordered_product<bf16, bf16>, nullptr, nullptr},
         {ordered_product<float, bf16>, ordered_product<float, float>, ordered_product<float, f16>}},
        {
#if defined(__AVX512BF16__)
            {BF16, BF16_MATRIX, 1.0f, widen_fp8, MOEBIUS_BF16(fp8_product<bf16>, nullptr)},
#else
            FP8_BESIDE_FLOATS,
#endif
            FP8_BESIDE_FLOATS,
        },
        block_kernels(),
        {{scaled_row<bf16, bf16>, scaled_row<bf16, float>, nullptr}, {scaled_row<float, bf16>, scaled_row<float, float>, scaled_row<float, f16>}},
        {store_row<bf16>, store_row<float>},
        {add_bias<bf16>, add_bias<float>},
        {gated<bf16>, gated<float>},
        {combine<bf16>, combine<float>},
        {{rms_norm<bf16, bf16>, rms_norm<bf16, float>}, {nullptr, rms_norm<float, float>}},
        {{rotate<bf16, bf16>, rotate<bf16, float>}, {nullptr, rotate<float, float>}},
        {{rotate_wide<bf16, bf16>, rotate_wide<bf16, float>}, {nullptr, rotate_wide<float, float>}},
        {quantise<bf16>, quantise<float>},
        {MOEBIUS_BF16(MOEBIUS_16_OR_8(attention, bf16), amx_attention), MOEBIUS_16_OR_8(attention, float)},
        {attention_int8<bf16>, attention_int8<float>},
        {join_splits<bf16>, join_splits<float>},
        {conv_weights<bf16>, conv_weights<float>},
        {causal_conv<bf16>, causal_conv<float>},
        {gated_delta<bf16>, gated_delta<float>},
        {kimi_delta<bf16>, kimi_delta<float>},
        {selective_scan<bf16>, selective_scan<float>},
        {{gated_norm<bf16, bf16>, gated_norm<bf16, float>}, {nullptr, gated_norm<float, float>}},
        {{grouped_norm<bf16, bf16>, grouped_norm<bf16, float>}, {nullptr, grouped_norm<float, float>}},
        {gate_head<bf16>, gate_head<float>},
        softmax_stats,
        exp_row,
    };
    return &table;
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
