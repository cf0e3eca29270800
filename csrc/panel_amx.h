// Products of tiles of x with panels by AMX, which adds up products of signed bytes, up to 64 neighbours of 16 rows of x and 16
// of weights at once. Panels are its right operand as they lie, quads below each other; rows of x lie side by side in 64 bytes
// (32 in blocks of 32).
//
// Its sums are as long as a block: scales of sub-blocks are multiplied into the codes, which then have up to thirteen bits, in
// two planes: the low seven bits, and what is left. What the tiles have found is scaled and added as everywhere.
#pragma once
#include "amx_tiles.h"
#include "panel_product.h"

namespace moebius {
namespace MOEBIUS_ISA {

// Registers: 0 to 3 sums, of a few blocks or of both planes; 4 and 5 rows of x, 6 and 7 weights, turn and turn about, so that one
// is loaded while the other is read.
template <int SUM, int STEP_OF_2> INLINE void plus_step(const char* x, size_t x_stride, const char* w) {
    constexpr int LEFT = 4 + STEP_OF_2, RIGHT = 6 + STEP_OF_2;
    tile_load<LEFT>(x, x_stride), tile_load<RIGHT>(w, LINE_BYTES);
    tile_dot_of_bytes<SUM, LEFT, RIGHT>();
}

template <class K, int M> struct TileProduct {
    static constexpr int STEPS = K::ELEMENTS == 32 ? 1 : K::ELEMENTS / LINE_BYTES;
    static constexpr int ROW = K::ELEMENTS / STEPS;                      // bytes of a row of x in one step
    static constexpr int AT_ONCE = K::PLANES == 2 ? 2 : 4;               // blocks, so that no sum waits for the one before
    static constexpr size_t PANEL_BYTES = size_t(K::PANEL_VECTORS) * VECTOR, TILE_BYTES_OF_BLOCK = size_t(K::TILE_WORDS) * 4 * M;

    alignas(64) int32_t found[4][M][LANES];

    static void configure() {
        TileShapes shapes;
        shapes.set(0, 4, M, LINE_BYTES);
        shapes.set(4, 2, M, ROW);
        shapes.set(6, 2, ROW / 4, LINE_BYTES);
        configure_tiles(shapes);
    }

    template <int SUM> INLINE_MEMBER void find_one(const char* panel, const char* tile) {
        tile_zero<SUM>();
        if constexpr (K::PLANES == 2) tile_zero<SUM + 1>();
#pragma GCC unroll 4
        for (int step = 0; step < STEPS; step++) {
            const char *x = tile + step * M * ROW, *w = panel + step * ROW * LANES;
            if constexpr (K::PLANES == 2) {
                // One load of x for both planes.
                tile_load<4>(x, ROW), tile_load<6>(w, LINE_BYTES);
                tile_dot_of_bytes<SUM, 4, 6>();
                tile_load<7>(w + K::QUADS_OF_BLOCK * VECTOR, LINE_BYTES);
                tile_dot_of_bytes<SUM + 1, 4, 7>();
            } else {
                plus_step<SUM, SUM % 2>(x, ROW, w);
            }
        }
        tile_store<SUM>(found[SUM], LINE_BYTES);
        if constexpr (K::PLANES == 2) tile_store<SUM + 1>(found[SUM + 1], LINE_BYTES);
    }
    // Of `count` blocks, at most AT_ONCE.
    INLINE_MEMBER void find(const char* panel, const char* tile, int count) {
        find_one<0>(panel, tile);
        if constexpr (K::PLANES == 2) {
            if (count > 1) find_one<2>(panel + PANEL_BYTES, tile + TILE_BYTES_OF_BLOCK);
        } else {
            if (count > 1) find_one<1>(panel + PANEL_BYTES, tile + TILE_BYTES_OF_BLOCK);
            if (count > 2) find_one<2>(panel + 2 * PANEL_BYTES, tile + 2 * TILE_BYTES_OF_BLOCK);
            if (count > 3) find_one<3>(panel + 3 * PANEL_BYTES, tile + 3 * TILE_BYTES_OF_BLOCK);
        }
    }
    INLINE_MEMBER Ints integers(int block, int row) const {
        const int at = block * K::PLANES;
        const Ints low = read<Ints>(found[at][row]);
        if constexpr (K::PLANES == 1) return low;
        else return low + read<Ints>(found[at + 1][row]) * (1 << PLANE_BITS);
    }

    void run(const char* panel, const char* tile, int blocks, Fetch& fetch, float* c, int ldc, int rows, int width) {
        LaneTree<M> tree;
        const int lanes = lanes_of(blocks);
        for (int i = 0, block = 0; i < lanes; i++) {
            Floats sums[M] = {};
            for (int left = blocks_of_lane(visited(i, lanes), blocks); left > 0; left--, block++) {
                if (block % AT_ONCE == 0) find(panel, tile, min_of(AT_ONCE, blocks - block));
                const BlockProduct<K, M> product = {panel, tile};
                const Floats d = product.template weights<Floats>(K::D_AT);
#pragma GCC unroll 16
                for (int r = 0; r < M; r++)
                    sums[r] = fused(to_floats(integers(block % AT_ONCE, r)), d * product.scale(r), sums[r]);
                if constexpr (K::MINIMA != NO_MINIMA) product.add_minima(sums);
                fetch.step();
                panel += PANEL_BYTES, tile += TILE_BYTES_OF_BLOCK;
            }
            tree.add(i, sums);
        }
        write_tile(tree.whole(lanes), c, ldc, rows, width);
    }
};

template <class K, int M>
void tiles_by_panels(const char* tiles, int m, const char* panels, int n, int blocks, Fetch& fetch, float* c, int ldc) {
    using Product = TileProduct<K, M>;
    Product product;
    Product::configure();
    for (int i = 0; i < m; i += M, tiles += blocks * Product::TILE_BYTES_OF_BLOCK)
        for (int j = 0; j < n; j += LANES)
            product.run(panels + j / LANES * blocks * Product::PANEL_BYTES, tiles, blocks, fetch, c + size_t(i) * ldc + j, ldc,
                        min_of(M, m - i), min_of(LANES, n - j));
    release_tiles();
}

template <Format TYPE>
void amx_panels_product(const void* tiles, int m, const void* panels, int n, int blocks, const Stretch& next, float* c, int ldc) {
    using K = typename KindOf<TYPE>::type;
    const char *x = static_cast<const char*>(tiles), *w = static_cast<const char*>(panels);
    const int whole = m / TILE * TILE, left = m - whole;
    Fetch fetch(next, ((m - 1) / TILE + 1) * ((n - 1) / LANES + 1) * blocks);
    if (whole) tiles_by_panels<K, TILE>(x, whole, w, n, blocks, fetch, c, ldc);
    if (left == 0) return;
    x += size_t(whole) * blocks * tile_block_bytes<TYPE>(), c += size_t(whole) * ldc;
    switch (rows_of_tile(left, TILE)) {
        case 2: return tiles_by_panels<K, 2>(x, left, w, n, blocks, fetch, c, ldc);
        case 4: return tiles_by_panels<K, 4>(x, left, w, n, blocks, fetch, c, ldc);
        case 8: return tiles_by_panels<K, 8>(x, left, w, n, blocks, fetch, c, ldc);
        default: return tiles_by_panels<K, TILE>(x, left, w, n, blocks, fetch, c, ldc);
    }
}

// One block of up to M rows, as BlockProduct reads it but for the codes.
template <class K, int M> INLINE void amx_pack_block(const QuantisedRow* x, int m, int b, char* to) {
    constexpr int ROW = TileProduct<K, M>::ROW;
    auto word = [&](int i, int row) { return to + (i * M + row) * 4; };
    for (int r = 0; r < M; r++) {
        const QuantisedRow& row = x[min_of(r, m - 1)];
        for (int i = 0; i < K::ELEMENTS; i += ROW) memcpy(to + i * M + r * ROW, row.codes + size_t(b) * K::ELEMENTS + i, ROW);
        memcpy(word(K::DX_AT, r), row.scales + b, 4);
        if constexpr (K::MINIMA == ONE_MINIMUM) {
            const float sum = float(static_cast<const int32_t*>(row.sums)[b]);
            memcpy(word(K::SUMS_AT, r), &sum, 4);
        }
        if constexpr (K::MINIMA == SUB_MINIMA) {
            // Of sixteen codes each, those of even sixteens and then the odd ones.
            const int16_t* sums = static_cast<const int16_t*>(row.sums) + b * 16;
            for (int p = 0; p < K::MINIMUM_PAIRS; p++) {
                int16_t pair[2];
                if (K::MINIMUM_SUB == 16) pair[0] = sums[p], pair[1] = sums[8 + p];
                else pair[0] = sums[2 * p] + sums[8 + 2 * p], pair[1] = sums[2 * p + 1] + sums[9 + 2 * p];
                memcpy(word(K::SUMS_AT + p, r), pair, 4);
            }
        }
    }
}

template <class K, int M> void amx_pack_tile(const QuantisedRow* x, int m, int blocks, char* to) {
    each_block(blocks, [&](int b) {
        amx_pack_block<K, M>(x, m, b, to);
        to += TileProduct<K, M>::TILE_BYTES_OF_BLOCK;
    });
}

template <Format TYPE> void amx_pack_tiles(const QuantisedRow* x, int m, int blocks, void* to) {
    using K = typename KindOf<TYPE>::type;
    char* at = static_cast<char*>(to);
    for (int i = 0; i < m;) {
        const int rows = rows_of_tile(m - i, TILE), here = min_of(rows, m - i);
        switch (rows) {
            case 2: amx_pack_tile<K, 2>(x + i, here, blocks, at); break;
            case 4: amx_pack_tile<K, 4>(x + i, here, blocks, at); break;
            case 8: amx_pack_tile<K, 8>(x + i, here, blocks, at); break;
            default: amx_pack_tile<K, TILE>(x + i, here, blocks, at);
        }
        i += rows, at += rows * blocks * tile_block_bytes<TYPE>();
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
