// Compiled once for each instruction set, with -DMOEBIUS_ISA=name and its flags. Includes no standard templates: the
// linker would merge their instances across units, and run one unit's instructions on another's processor.
#include "attention.h"
#include "pointwise.h"
#include "product.h"

#define MOEBIUS_JOIN2(a, b) a##b
#define MOEBIUS_JOIN(a, b) MOEBIUS_JOIN2(a, b)
#define MOEBIUS_TEXT2(a) #a
#define MOEBIUS_TEXT(a) MOEBIUS_TEXT2(a)

namespace moebius {

const Kernels* MOEBIUS_JOIN(kernels_, MOEBIUS_ISA)() {
    using namespace MOEBIUS_ISA;
    static const Kernels kernels = {
        MOEBIUS_TEXT(MOEBIUS_ISA),
        {product<bf16>, product<float>},
        {store_row<bf16>, store_row<float>},
        {add_bias<bf16>, add_bias<float>},
        {gated<bf16>, gated<float>},
        {combine<bf16>, combine<float>},
        {rms_norm<bf16>, rms_norm<float>},
        {rotate<bf16>, rotate<float>},
        {attention<bf16>, attention<float>},
        softmax_stats,
        exp_row,
    };
    return &kernels;
}

}  // namespace moebius
