// Products with weights in blocks, compiled once for each instruction set like isa.cpp.
#include "block_product.h"
#include "block_widened.h"
#include "panels.h"
#include "quantise.h"

#define MOEBIUS_JOIN2(a, b) a##b
#define MOEBIUS_JOIN(a, b) MOEBIUS_JOIN2(a, b)
// In the order of the formats.
#define MOEBIUS_EACH(kernel)                                                                                               \
    {kernel<Q4_0>, kernel<Q4_1>, kernel<Q5_0>, kernel<Q5_1>, kernel<Q8_0>, kernel<IQ4_NL>, kernel<MXFP4>,                  \
     kernel<Q2_K>, kernel<Q3_K>, kernel<Q4_K>, kernel<Q5_K>, kernel<Q6_K>, kernel<IQ4_XS>}

namespace moebius {

const BlockKernels* MOEBIUS_JOIN(block_kernels_, MOEBIUS_ISA)() {
    using namespace MOEBIUS_ISA;
    static const BlockKernels kernels = {
        {{quantise_by_32<bf16>, quantise_by_256<bf16>}, {quantise_by_32<float>, quantise_by_256<float>}},
        MOEBIUS_EACH(block_product),
        MOEBIUS_EACH(widen_row),
        MOEBIUS_JOIN(panel_kernels_, MOEBIUS_ISA)(),
    };
    return &kernels;
}

}  // namespace moebius
