// Products of quantised activations with weights in blocks: what every instruction set provides, and how activations lie.
//
// The bits of a result are the same on every instruction set. With blocks of B elements, b = 0, 1, ...:
//   a row of x is quantised block by block (quantise.h): x_i is about c_i * d_x[b], c_i from -127 to 127;
//   inside a block all is integers, and exact: I = sum of scale * code * c over the block, J = sum of minimum * c;
//   blocks are added in float32, in sixteen lanes of which lane l takes b = l, l + 16, ... in order, from 0:
//       lane = fma(float(I), d_w[b] * d_x[b], lane), then, where a format has minima,
//       lane = fma(-float(J), dmin_w[b] * d_x[b], lane)            (blocks of 256), or
//       lane = fma(float(sum of c), m_w[b] * d_x[b], lane)         (blocks of 32)
//   and lanes by one tree: 16 to 8 (l, l + 8), to 4 (l, l + 4), to 2, to 1.
// It depends on the row of x and the row of w alone (P1).
#pragma once
#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace moebius {

constexpr int BLOCK_FORMATS = FORMATS - DENSE_FORMATS;
constexpr int BLOCK_LANES = 16;

// The elements of a block of x: as many as of the weights that it meets. PAIRS_BY_32: with the codes at even places of each
// block before those at odd ones, as weights that lie in pairs are unpacked; a sum of whole numbers does not depend on it.
enum BlockSize { BY_32 = 0, BY_256 = 1, PAIRS_BY_32 = 2, BLOCK_SIZES = 3 };
constexpr BlockSize block_size(Format format) {
    return FORMAT_SIZES[format].elements == 256 ? BY_256 : in_pairs(format) ? PAIRS_BY_32 : BY_32;
}

// Where the parts of a quantised row lie, counted in bytes from its beginning; each begins at a cache line, as rows do.
//   codes   int8, in the order of x (or as PAIRS_BY_32 says); behind blocks of 32 the first one once more, as whoever reads blocks in pairs goes on with
//           the next row of weights
//   halves  by 32 alone: the codes once more, the first sixteen of all blocks and then the second ones, as four-bit weights lie;
//           each with as many first blocks once more as lets four be read at once
//   scales  float32 d_x, one a block, zeros up to a multiple of sixteen
//   sums    of codes. By 32: int32, one a block, zeros likewise. By 256: int16, sixteen a block, each of sixteen codes: those
//           of the even sixteens (0, 2, ...), then those of the odd ones
struct QuantisedShape {
    BlockSize size;
    int blocks;  // of a row

    constexpr QuantisedShape(BlockSize size, int k) : size(size), blocks(k / elements_of(size)) {}
    static constexpr int elements_of(BlockSize size) { return size == BY_256 ? 256 : 32; }
    constexpr bool by_32() const { return size != BY_256; }
    constexpr int padded() const { return (blocks + BLOCK_LANES - 1) / BLOCK_LANES * BLOCK_LANES; }
    constexpr size_t halves_at() const { return in_lines(size_t(blocks + by_32()) * elements_of(size)); }
    constexpr size_t half_bytes() const { return by_32() ? in_lines(size_t(blocks + 3) * 16) : 0; }
    constexpr size_t scales_at() const { return halves_at() + 2 * half_bytes(); }
    constexpr size_t sums_at() const { return scales_at() + size_t(padded()) * sizeof(float); }
    constexpr size_t row_bytes() const {
        return sums_at() + (by_32() ? size_t(padded()) * sizeof(int32_t) : in_lines(size_t(blocks) * 16 * sizeof(int16_t)));
    }
    static constexpr size_t in_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }
};

struct QuantisedRow {
    const int8_t* codes;
    const int8_t* halves[2];
    const float* scales;
    const void* sums;

    QuantisedRow() = default;
    // Row i of what `quantise` wrote.
    QuantisedRow(const void* quantised, int i, const QuantisedShape& shape) {
        const char* row = static_cast<const char*>(quantised) + i * shape.row_bytes();
        codes = reinterpret_cast<const int8_t*>(row);
        for (int half = 0; half < 2; half++) halves[half] = codes + shape.halves_at() + half * shape.half_bytes();
        scales = reinterpret_cast<const float*>(row + shape.scales_at());
        sums = row + shape.sums_at();
    }
};

// The scales of rows of blocks, where they lie in a plane of their own: one for each so many blocks of a row, row after row,
// which both begin at the same row.
enum ScaleType { BF16_SCALES = BF16_MATRIX, F32_SCALES = F32_MATRIX, F16_SCALES = F16_MATRIX, E8M0_SCALES, SCALE_TYPES };
constexpr int SCALE_BYTES[SCALE_TYPES] = {2, 4, 2, 1};
struct GroupScales {
    ScaleType type = BF16_SCALES;
    int blocks = 1;                 // that share one
    const void* data = nullptr;
    const int8_t* zeros = nullptr;  // what signed codes are to be made less, likewise, or null
    const void* biases = nullptr;   // of affine formats, as scales
};

struct PanelKernels;  // panels.h

struct BlockKernels {
    // Quantises m rows of k elements; `to` is aligned to a cache line and takes m * row_bytes() bytes.
    void (*quantise[2][BLOCK_SIZES])(const void* const* x, int m, int k, void* to);
    // c[i][j] = the product of row i of m quantised ones with row j of n consecutive rows of weights, of so many blocks each.
    // `groups` are those rows' where they have_planes.
    // `next` is where the weights lie that will be read after these, or null.
    void (*product[BLOCK_FORMATS])(const void* quantised, int m, const void* w, int n, int blocks, const GroupScales& groups, const void* next,
                                    float* c, int ldc);
    // One row of so many blocks as float32 numbers.
    void (*widened[BLOCK_FORMATS])(const void* row, int blocks, const GroupScales& groups, float* to);
    // Products of many rows.
    const PanelKernels* panels;
};

}  // namespace moebius
