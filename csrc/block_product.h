// Products of one or a few quantised rows with weights in blocks, read where they lie, once.
//
// The rows of weights are one stretch of blocks. First the integers of a piece of it are found, sixteen blocks at a time,
// whichever rows they belong to, and their scales are copied out of the blocks; then each row's blocks are scaled and added, sixteen lanes at a time (block_kernels.h).
#pragma once
#include "group_scales.h"
#if defined(__AVX512F__)
#include "block_dots_16.h"
#elif defined(__AVX2__)
#include "block_dots_8.h"
#else
#include "block_dots.h"
#endif

namespace moebius {
namespace MOEBIUS_ISA {

constexpr int PIECE = 272;               // blocks, a multiple of the lanes; three rows of 90
constexpr int ROOM = PIECE + BLOCK_LANES;  // what is read of a piece's last lanes may lie behind it

// Of a piece's blocks: the sums of integers for M rows of x, and the scales as they are stored.
template <int M> struct Piece {
    alignas(64) int32_t dots[M][ROOM];
    alignas(64) int32_t minima[M][ROOM];
    alignas(64) uint16_t scales[ROOM];
    alignas(64) uint16_t least[ROOM];
};

// Of `count` blocks; up to so many as are readable, some that nobody asked for are found on the way.
template <Format f, int M>
INLINE void find_integers(const uint8_t* w, int count, int readable, const QuantisedRow* x, int first, int blocks, Piece<M>& piece) {
    using B = Block<f>;
    uint8_t last[BLOCK_LANES * B::BYTES];
    int at = first;
    for (int t = 0; t < count; t += BLOCK_LANES, w += BLOCK_LANES * B::BYTES) {
        if (readable - t < BLOCK_LANES) {  // filled up with zeros
            memset(last, 0, sizeof last);
            memcpy(last, w, size_t(readable - t) * B::BYTES);
            w = last;
        }
        dots_of_16<f, M, ROOM>(w, x, at, blocks, piece.dots[0] + t, piece.minima[0] + t);
        if constexpr (has_planes(f)) continue;
        for (int i = 0; i < BLOCK_LANES; i++) {
            const uint8_t* b = w + i * B::BYTES;
            if constexpr (f == MXFP4) piece.scales[t + i] = b[0];
            else piece.scales[t + i] = read<uint16_t>(b + B::SCALE_AT);
            if constexpr (B::MINIMUM_AT >= 0) piece.least[t + i] = read<uint16_t>(b + B::MINIMUM_AT);
        }
    }
}

template <Format f> INLINE V scales_from(const uint16_t* stored) {
    if constexpr (f == MXFP4) return half_powers(stored);
    else return load(reinterpret_cast<const f16*>(stored));
}

// The same with the scales, zero points or biases of groups; those from block `block` on are the first here.
template <Format f, int M>
INLINE V add_blocks_of_groups(const Piece<M>& piece, int i, int at, const QuantisedRow& x, int first, int count, const GroupScales& groups,
                              int block, V lanes) {
    for (int b = 0; b < count; b += BLOCK_LANES, at += BLOCK_LANES) {
        const int some = min_of(BLOCK_LANES, count - b);
        const V d_x = load(x.scales + first + b), d_w = of_groups(groups, groups.data, block + b, some);
        const V scales = first_lanes(mul(d_w, d_x), some);
        const int32_t *sums = static_cast<const int32_t*>(x.sums) + first + b, *dots = piece.dots[i] + at;
        const V whole = groups.zeros ? floats_less_zeros(dots, sums, offset_of<f>(), groups, block + b, some)
                                     : floats_less(dots, sums, offset_of<f>());
        lanes = fma(whole, scales, lanes);
        if constexpr (is_affine(f)) {
            V least = of_groups(groups, groups.biases, block + b, some);
            if (Block<f>::OFFSET) least = add(least, mul(d_w, all(float(Block<f>::OFFSET))));
            lanes = fma(floats(sums), first_lanes(mul(least, d_x), some), lanes);
        }
    }
    return lanes;
}

// lanes + the products of `count` blocks of one row, those from `first` on, with row i of x; they lie at `at` in the piece.
template <Format f, int M>
INLINE V add_blocks(const Piece<M>& piece, int i, int at, const QuantisedRow& x, int first, int count, const GroupScales& groups, int block,
                    V lanes) {
    using B = Block<f>;
    if constexpr (has_planes(f)) return add_blocks_of_groups<f>(piece, i, at, x, first, count, groups, block, lanes);
    for (int b = 0; b < count; b += BLOCK_LANES, at += BLOCK_LANES) {
        const int some = min_of(BLOCK_LANES, count - b);
        const V d_x = load(x.scales + first + b);
        const V scales = first_lanes(mul(scales_from<f>(piece.scales + at), d_x), some);
        V least = zero();
        if constexpr (B::MINIMUM_AT >= 0) least = first_lanes(mul(load(reinterpret_cast<const f16*>(piece.least + at)), d_x), some);
        if constexpr (B::ELEMENTS == 32) {
            const int32_t* sums = static_cast<const int32_t*>(x.sums) + first + b;
            lanes = fma(floats_less(piece.dots[i] + at, sums, offset_of<f>()), scales, lanes);
            if constexpr (B::MINIMUM_AT >= 0) lanes = fma(floats(sums), least, lanes);
        } else {
            lanes = fma(floats(piece.dots[i] + at), scales, lanes);
            if constexpr (B::MINIMUM_AT >= 0) lanes = fma(sub(zero(), floats(piece.minima[i] + at)), least, lanes);
        }
    }
    return lanes;
}

// The products of rows of at most eight blocks of 256 with all rows of x: as many as have room in the lanes at once.
template <Format f, int M>
INLINE void add_short_rows(const Piece<M>& piece, const QuantisedRow* x, int rows, int blocks, float* c, int ldc) {
    using B = Block<f>;
    const int log = blocks <= 2 ? 1 : blocks <= 4 ? 2 : 3, size = 1 << log, at_once = BLOCK_LANES / size;
    const Spread by_row(log, blocks);
    V d_x[M];
    for (int i = 0; i < M; i++) {
        float scales[BLOCK_LANES];
        for (int lane = 0; lane < BLOCK_LANES; lane++) scales[lane] = x[i].scales[lane & (size - 1)];
        d_x[i] = load(scales);
    }
    for (int r = 0, at = 0; r < rows; r += at_once, at += at_once * blocks) {
        const V d_w = spread(scales_from<f>(piece.scales + at), by_row);
        V least = zero();
        if constexpr (B::MINIMUM_AT >= 0) least = spread(load(reinterpret_cast<const f16*>(piece.least + at)), by_row);
        for (int i = 0; i < M; i++) {
            V lanes = fma(spread(floats(piece.dots[i] + at), by_row), mul(d_w, d_x[i]), zero());
            if constexpr (B::MINIMUM_AT >= 0)
                lanes = fma(sub(zero(), spread(floats(piece.minima[i] + at), by_row)), mul(least, d_x[i]), lanes);
            float sums[BLOCK_LANES];
            store(sums, sum_groups(add(lanes, zero()), log));  // with the empty lanes' zeros, which make 0 of -0
            for (int g = 0; g < min_of(at_once, rows - r); g++) c[size_t(i) * ldc + r + g] = sums[g << log];
        }
    }
}

// M rows of x by n of w.
template <Format f, int M>
INLINE void rows_by_blocks(const QuantisedRow* x, const uint8_t* w, int n, int blocks, const GroupScales& groups, float* c, int ldc) {
    const size_t row_bytes = size_t(blocks) * Block<f>::BYTES;
    Piece<M> piece;
    if (blocks > PIECE) {  // a row is several pieces
        for (int j = 0; j < n; j++, w += row_bytes) {
            V lanes[M];
            for (int i = 0; i < M; i++) lanes[i] = zero();
            for (int first = 0; first < blocks; first += PIECE) {
                const int count = min_of(PIECE, blocks - first);
                find_integers<f>(w + size_t(first) * Block<f>::BYTES, count, (n - j) * blocks - first, x, first, blocks, piece);
                for (int i = 0; i < M; i++) lanes[i] = add_blocks<f>(piece, i, 0, x[i], first, count, groups, j * blocks + first, lanes[i]);
            }
            for (int i = 0; i < M; i++) c[size_t(i) * ldc + j] = reduce_add(lanes[i]);
        }
        return;
    }
    const int rows = PIECE / blocks;
    for (int j = 0; j < n; j += rows, w += rows * row_bytes) {
        const int some = min_of(rows, n - j);
        find_integers<f>(w, some * blocks, (n - j) * blocks, x, 0, blocks, piece);
        if constexpr (Block<f>::ELEMENTS == 256)
            if (blocks <= 8) {
                add_short_rows<f>(piece, x, some, blocks, c + j, ldc);
                continue;
            }
        for (int r = 0; r < some; r++)
            for (int i = 0; i < M; i++)
                c[size_t(i) * ldc + j + r] = reduce_add(add_blocks<f>(piece, i, r * blocks, x[i], 0, blocks, groups, (j + r) * blocks, zero()));
    }
}

template <Format f>
void block_product(const void* quantised, int m, const void* w, int n, int blocks, const GroupScales& groups, const void*, float* c, int ldc) {
    const QuantisedShape shape(block_size(f), blocks * Block<f>::ELEMENTS);
    const uint8_t* weights = static_cast<const uint8_t*>(w);
    QuantisedRow x[4];
    for (int i = 0, some; i < m; i += some, c += some * size_t(ldc)) {
        some = m - i >= 4 ? 4 : m - i >= 2 ? 2 : 1;
        for (int r = 0; r < some; r++) x[r] = QuantisedRow(quantised, i + r, shape);
        if (some == 1) rows_by_blocks<f, 1>(x, weights, n, blocks, groups, c, ldc);
        else if (some == 2) rows_by_blocks<f, 2>(x, weights, n, blocks, groups, c, ldc);
        else rows_by_blocks<f, 4>(x, weights, n, blocks, groups, c, ldc);
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
