// Products of many rows with weights in blocks, compiled once for each instruction set like isa.cpp.
#include "panels.h"
#if defined(MOEBIUS_AMX)
#include "panel_amx.h"
#define MOEBIUS_PANELS(kernel) amx_##kernel
#else
#include "panel_product.h"
#define MOEBIUS_PANELS(kernel) kernel
#endif

namespace moebius {
namespace MOEBIUS_ISA {

template <Format f> constexpr PanelFormat panel_format() {
    return {panel_block_bytes<f>(), tile_block_bytes<f>(), unpack_panel<f>, MOEBIUS_PANELS(pack_tiles)<f>,
            MOEBIUS_PANELS(panels_product)<f>};
}

const PanelKernels* panel_kernels() {
    static const PanelKernels table = {
        LANES,
        TILE,
        // In the order of the formats.
        {panel_format<Q4_0>(), panel_format<Q4_1>(), panel_format<Q5_0>(), panel_format<Q5_1>(), panel_format<Q8_0>(),
         panel_format<IQ4_NL>(), panel_format<MXFP4>(), panel_format<Q2_K>(), panel_format<Q3_K>(), panel_format<Q4_K>(),
         panel_format<Q5_K>(), panel_format<Q6_K>(), panel_format<IQ4_XS>()},
    };
    return &table;
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
