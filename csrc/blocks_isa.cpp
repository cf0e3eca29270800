// Products with weights in blocks, compiled once for each instruction set like isa.cpp.
#include "block_product.h"
#include "block_widened.h"
#include "fp8.h"
#include "panels.h"
#include "quantise.h"

// In the order of the formats.
#define MOEBIUS_EACH(kernel)                                                                                               \
    {kernel<Q4_0>, kernel<Q4_1>, kernel<Q5_0>, kernel<Q5_1>, kernel<Q8_0>, kernel<IQ4_NL>, kernel<MXFP4>,                  \
     kernel<Q2_K>, kernel<Q3_K>, kernel<Q4_K>, kernel<Q5_K>, kernel<Q6_K>, kernel<IQ4_XS>}

namespace moebius {
namespace MOEBIUS_ISA {

const PanelKernels* panel_kernels();  // panels_isa.cpp

const BlockKernels* block_kernels() {
    static const BlockKernels table = {
        {{quantise_by_32<bf16>, quantise_by_256<bf16>}, {quantise_by_32<float>, quantise_by_256<float>}},
        MOEBIUS_EACH(block_product),
        MOEBIUS_EACH(widen_row),
        halve_fp8,
        panel_kernels(),
    };
    return &table;
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
