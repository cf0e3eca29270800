// Products of quantised activations with weights in blocks for many rows of x, by the arithmetic of block_kernels.h: rows of
// weights are unpacked once, to panels, and all rows of x pass over them, in tiles.
#pragma once
#include <cstddef>

#include "block_kernels.h"

namespace moebius {

// Rows of x in the tile that begins where `left` are left, of which the last ones may be none: a power of two from 2 on.
inline int rows_of_tile(int left, int most) {
    int rows = 2;
    while (rows < left && rows < most) rows *= 2;
    return rows;
}
// What so many rows fill up, in all their tiles.
inline int rows_of_tiles(int rows, int most) {
    const int whole = rows / most * most;
    return whole + (rows > whole ? rows_of_tile(rows - whole, most) : 0);
}

// Bytes that will be read soon, if any.
struct Stretch {
    const void* from = nullptr;
    size_t bytes = 0;
};

struct PanelFormat {
    size_t panel_bytes, row_bytes;  // of a panel, and of a row of x in a tile, for each block
    // The n rows of weights from w on, at most a panel's, of so many blocks each.
    void (*unpack)(const void* w, int n, int blocks, const GroupScales& groups, void* to);
    // m rows of x as tiles.
    void (*pack)(const QuantisedRow* x, int m, int blocks, void* to);
    // c[i][j] = the product of row i of m in tiles with row j of n in panels. Meanwhile fetches what will be unpacked next.
    void (*product)(const void* tiles, int m, const void* panels, int n, int blocks, const Stretch& next, float* c, int ldc);
};

struct PanelKernels {
    int panel, tile;  // rows
    PanelFormat formats[BLOCK_FORMATS];

    const PanelFormat& of(Format format) const { return formats[format - DENSE_FORMATS]; }
};

}  // namespace moebius
