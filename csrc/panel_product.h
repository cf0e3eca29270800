// Products of tiles of x with panels of weights. A sum's arithmetic, to the bit (and so for one row elsewhere):
//
//   exact integers in a block, then      sum = fma(float(I), d_w * d_x, sum)
//   with sub-blocks' minima              sum = fma(-float(J), dmin_w * d_x, sum), J the sum of minima times sums of x's codes
//   with one minimum                     sum = fma(float(S), m_w * d_x, sum), S the sum of x's codes
//
// of the blocks of each virtual lane (panel_kinds.h), and these by their tree.
#pragma once
#include "panel_tiles.h"
#include "panel_unpack.h"

namespace moebius {
namespace MOEBIUS_ISA {

// A block of a panel times a block of a tile of M rows.
template <class K, int M> struct BlockProduct {
    const char *panel, *tile;

    template <class Vector> INLINE_MEMBER Vector weights(int vector) const { return read<Vector>(panel + vector * VECTOR); }
    INLINE_MEMBER const char* word(int word, int row) const { return tile + (word * M + row) * 4; }
    INLINE_MEMBER int32_t quad(int word, int row) const { return read<int32_t>(this->word(word, row)); }

    // totals[row] = I
    INLINE_MEMBER void integers(Ints* totals) const {
        if constexpr (SCHEME == QUADS || SCHEME == PLAIN) quads(totals);
        else if constexpr (K::CHAIN == 0) signed_pairs(totals);
        else pairs(totals);
    }

    INLINE_MEMBER void quads([[maybe_unused]] Ints* totals) const {
#if !defined(__AVX2__) || defined(__AVX512VNNI__)
        Ints sums[M];
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) totals[i] = Ints{};
#pragma GCC unroll 1
        for (int s = 0; s < K::SUBS; s++) {
            const char *w_codes = panel + s * K::SUB / 4 * VECTOR, *x_codes = tile + s * K::SUB * M;
            const char* starts = word(K::STARTS_AT + s, 0);
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) sums[i] = K::STARTS ? all_ints(read<int32_t>(starts + i * 4)) : Ints{};
#pragma GCC unroll 8
            for (int j = 0; j < K::SUB / 4; j++) {
                const Words w = read<Words>(w_codes + j * VECTOR);
#pragma GCC unroll 16
                for (int i = 0; i < M; i++) sums[i] = plus_quads(sums[i], w, x_codes + (j * M + i) * 4);
            }
            const Ints scale = K::SCALED ? weights<Ints>(K::SCALES_AT + s) : Ints{};
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) totals[i] = K::SCALED ? totals[i] + sums[i] * scale : sums[i];
        }
#endif
    }

    // The scales, or ones, that halves are multiplied by as they are added up to 32 bits.
    INLINE_MEMBER Ints factors(int s) const {
        if constexpr (K::SCALED) return weights<Ints>(K::SCALES_AT + s);
        else return all_ints(0x00010001);
    }
    INLINE_MEMBER void pairs([[maybe_unused]] Ints* totals) const {
#if defined(__AVX2__)
        constexpr int CHAINS = K::SUB / 4 / K::CHAIN;  // of a sub-block
        Ints sums[M];
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) totals[i] = Ints{};
#pragma GCC unroll 1
        for (int c = 0; c < K::SUBS * CHAINS; c++) {
            const char *w_codes = panel + c * K::CHAIN * VECTOR, *x_codes = tile + c * K::CHAIN * 4 * M;
            const char* starts = word(K::STARTS_AT + c, 0);
            static_assert(!K::STARTS || CHAINS == 1);
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) sums[i] = K::STARTS ? all_ints(read<int32_t>(starts + i * 4)) : Ints{};
#pragma GCC unroll 8
            for (int j = 0; j < K::CHAIN; j++) {
                const Words w = read<Words>(w_codes + j * VECTOR);
#pragma GCC unroll 16
                for (int i = 0; i < M; i++) sums[i] = plus_halves(sums[i], w, read<int32_t>(x_codes + (j * M + i) * 4));
            }
            const Ints scale = factors(c / CHAINS);
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) totals[i] = plus_pairs(totals[i], sums[i], scale);
        }
#endif
    }
    INLINE_MEMBER void signed_pairs([[maybe_unused]] Ints* totals) const {
#if defined(__AVX2__)
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) totals[i] = weights<Ints>(K::LIFT_AT);
#pragma GCC unroll 1
        for (int s = 0; s < K::SUBS; s++) {
            const Ints scale = factors(s);
            const char *w_codes = panel + s * K::SUB / 4 * VECTOR, *x_codes = tile + s * K::SUB * M;
#pragma GCC unroll 8
            for (int j = 0; j < K::SUB / 4; j++) {
                const Words w = read<Words>(w_codes + j * VECTOR), sizes = byte_sizes(w), turned = negative_bytes(w);
#pragma GCC unroll 16
                for (int i = 0; i < M; i++) {
                    const Words x = (Words)all_ints(read<int32_t>(x_codes + (j * M + i) * 4));
                    totals[i] = plus_pairs(totals[i], halves_of_products(sizes, x ^ turned), scale);
                }
            }
        }
#endif
    }

    INLINE_MEMBER void add(Floats* sums) const {
        Ints totals[M];
        integers(totals);
        const Floats d = weights<Floats>(K::D_AT);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) sums[i] = fused(to_floats(totals[i]), d * scale(i), sums[i]);
        if constexpr (K::MINIMA != NO_MINIMA) add_minima(sums);
    }
    INLINE_MEMBER Floats scale(int row) const { return all_floats(read<float>(word(K::DX_AT, row))); }
    INLINE_MEMBER void add_minima(Floats* sums) const {
        const Floats minimum = weights<Floats>(K::D_AT + 1);
        if constexpr (K::MINIMA == ONE_MINIMUM) {
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) sums[i] = fused(all_floats(read<float>(word(K::SUMS_AT, i))), minimum * scale(i), sums[i]);
        } else {
            Ints totals[M];
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) totals[i] = Ints{};
#pragma GCC unroll 8
            for (int p = 0; p < K::MINIMUM_PAIRS; p++) {
                const Ints minima = weights<Ints>(K::MINIMA_AT + p);
#pragma GCC unroll 16
                for (int i = 0; i < M; i++) totals[i] = plus_pairs(totals[i], minima, all_ints(quad(K::SUMS_AT + p, i)));
            }
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) sums[i] = fused_less(to_floats(totals[i]), minimum * scale(i), sums[i]);
        }
    }
};

// The sums of virtual lanes on their way to one, as the bits of a number that counts them: kept[i] is the sum of 2^i lanes.
template <int M> struct LaneTree {
    Floats kept[5][M];

    INLINE_MEMBER void add(int lane, const Floats* sums) {
        Floats now[M];
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) now[i] = sums[i];
        int level = 0;
        for (; lane & 1; lane /= 2, level++)
#pragma GCC unroll 16
            for (int i = 0; i < M; i++) now[i] = kept[level][i] + now[i];
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) kept[level][i] = now[i];
    }
    INLINE_MEMBER const Floats* whole(int lanes) const { return kept[__builtin_ctz(lanes)]; }
};

INLINE void write_tile(const Floats* sums, float* c, int ldc, int rows, int width) {
    for (int r = 0; r < rows; r++) {
        if (width == LANES) put(c + size_t(r) * ldc, sums[r]);
        else put_some(c + size_t(r) * ldc, sums[r], width);
    }
}

// c[row][0 .. width) of one tile and one panel
template <class K, int M>
void tile_product(const char* panel, const char* tile, int blocks, Fetch& fetch, float* c, int ldc, int rows, int width) {
    LaneTree<M> tree;
    const int lanes = lanes_of(blocks);
    for (int i = 0; i < lanes; i++) {
        Floats sums[M] = {};
        for (int b = blocks_of_lane(visited(i, lanes), blocks); b > 0; b--) {
            BlockProduct<K, M>{panel, tile}.add(sums);
            fetch.step();
            panel += K::PANEL_VECTORS * VECTOR, tile += K::TILE_WORDS * 4 * M;
        }
        tree.add(i, sums);
    }
    write_tile(tree.whole(lanes), c, ldc, rows, width);
}

template <Format TYPE>
void panels_product(const void* tiles, int m, const void* panels, int n, int blocks, const Stretch& next, float* c, int ldc) {
    using K = typename KindOf<TYPE>::type;
    const size_t panel_bytes = blocks * panel_block_bytes<TYPE>();
    const char* tile = static_cast<const char*>(tiles);
    Fetch fetch(next, ((m - 1) / TILE + 1) * ((n - 1) / LANES + 1) * blocks);
    for (int i = 0; i < m;) {
        const int rows = rows_of_tile(m - i, TILE), here = min_of(rows, m - i);
        for (int j = 0; j < n; j += LANES) {
            const char* panel = static_cast<const char*>(panels) + j / LANES * panel_bytes;
            float* to = c + size_t(i) * ldc + j;
            const int width = min_of(LANES, n - j);
            if (rows == 2) tile_product<K, 2>(panel, tile, blocks, fetch, to, ldc, here, width);
            else if (rows == 4) tile_product<K, 4>(panel, tile, blocks, fetch, to, ldc, here, width);
            else tile_product<K, TILE>(panel, tile, blocks, fetch, to, ldc, here, width);
        }
        i += rows, tile += rows * blocks * tile_block_bytes<TYPE>();
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
