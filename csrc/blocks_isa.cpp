// Products with weights in blocks, compiled once for each instruction set like isa.cpp.
#include "block_product.h"
#include "block_widened.h"
#include "panels.h"
#include "quantise.h"

namespace moebius {
namespace MOEBIUS_ISA {

const PanelKernels* panel_kernels();  // panels_isa.cpp

const BlockKernels* block_kernels() {
    static const BlockKernels table = {
        {{quantise_rows<bf16, BY_32>, quantise_rows<bf16, BY_256>, quantise_rows<bf16, PAIRS_BY_32>},
         {quantise_rows<float, BY_32>, quantise_rows<float, BY_256>, quantise_rows<float, PAIRS_BY_32>}},
        MOEBIUS_EACH_BLOCK_FORMAT(block_product),
        MOEBIUS_EACH_BLOCK_FORMAT(widen_row),
        panel_kernels(),
    };
    return &table;
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
