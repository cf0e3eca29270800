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

template <Format f>
constexpr PanelFormat panel_format = {panel_block_bytes<f>(), tile_block_bytes<f>(), unpack_panel<f>,
                                      MOEBIUS_PANELS(pack_tiles)<f>, MOEBIUS_PANELS(panels_product)<f>};

const PanelKernels* panel_kernels() {
    static const PanelKernels table = {
        LANES,
        TILE,
        MOEBIUS_EACH_BLOCK_FORMAT(panel_format),
    };
    return &table;
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
