// Quantised rows of x as tiles: TILE rows, or the next power of two for what is left, beside each other quad by quad.
#pragma once
#include "panel_kinds.h"

namespace moebius {
namespace MOEBIUS_ISA {

// M words of as many rows, and their halves.
template <int M> struct RowWords {
    typedef int32_t type __attribute__((vector_size(4 * M)));
    typedef uint16_t halves __attribute__((vector_size(4 * M)));
    typedef float floats __attribute__((vector_size(4 * M)));
};
template <int M> using Row = typename RowWords<M>::type;
template <int M> using RowHalves = typename RowWords<M>::halves;

// out[quad][row] = the quads of M rows, sixteen bytes of each at once
template <int M> INLINE void side_by_side(const int8_t* const* rows, size_t at, char* out) {
#if defined(__AVX2__)
    auto sixteen = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at)); };
    if constexpr (M == 8) {
        __m256i v[4], turned[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) v[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(r)), sixteen(r + 4), 1);
        transpose_words(v, turned);
        memcpy(out, turned, sizeof turned);
        return;
    }
    if constexpr (M == 4) {
        const __m128i v[4] = {sixteen(0), sixteen(1), sixteen(2), sixteen(3)};
        __m128i turned[4];
        transpose_words(v, turned);
        memcpy(out, turned, sizeof turned);
        return;
    }
#endif
    for (int j = 0; j < 4; j++)
        for (int r = 0; r < M; r++) memcpy(out + (j * M + r) * 4, rows[r] + at + 4 * j, 4);
}

// The sums of two and two codes of each quad, as the halves of its word.
template <int M> INLINE RowHalves<M> pair_sums(Row<M> quads) {
#if defined(__AVX2__)
    if constexpr (M == 8) return (RowHalves<M>)_mm256_maddubs_epi16(_mm256_set1_epi8(1), (__m256i)quads);
    if constexpr (M == 4) return (RowHalves<M>)_mm_maddubs_epi16(_mm_set1_epi8(1), (__m128i)quads);
#endif
    const Row<M> low = ((quads << 24) >> 24) + ((quads << 16) >> 24), high = ((quads << 8) >> 24) + (quads >> 24);
    return (RowHalves<M>)((low & 0xffff) | (high << 16));
}
template <int M> INLINE Row<M> sum_of_halves(RowHalves<M> pairs) { return (((Row<M>)pairs << 16) >> 16) + ((Row<M>)pairs >> 16); }

// What the starts and minima of a block need: sums over parts of x, as small as the smallest sub-block.
template <class K, int M> INLINE void pack_sums(int offset, char* to) {
    constexpr int PART = K::SUB > 32 ? 16 : K::SUB, PARTS = K::ELEMENTS / PART, PARTS_OF_SUB = K::SUB / PART;
    auto word = [&](int i) { return to + i * 4 * M; };
    auto set = [&](int i, auto row) { memcpy(word(i), &row, sizeof row); };
    RowHalves<M> pairs[PARTS];
#pragma GCC unroll 16
    for (int p = 0; p < PARTS; p++) {
        pairs[p] = pair_sums<M>(read<Row<M>>(word(p * PART / 4)));
#pragma GCC unroll 8
        for (int quad = 1; quad < PART / 4; quad++) pairs[p] += pair_sums<M>(read<Row<M>>(word(p * PART / 4 + quad)));
    }
    if constexpr (K::STARTS && SCHEME == PAIRS)
        for (int p = 0; p < PARTS; p++) set(K::STARTS_AT + p, pairs[p] * uint16_t(-offset));
    if constexpr (K::STARTS && SCHEME == QUADS)
        for (int s = 0; s < K::SUBS; s++) {
            Row<M> sum = {};
            for (int p = s * PARTS_OF_SUB; p < (s + 1) * PARTS_OF_SUB; p++) sum += sum_of_halves<M>(pairs[p]);
            set(K::STARTS_AT + s, sum * -offset);
        }
    if constexpr (K::MINIMA == ONE_MINIMUM)
        set(K::SUMS_AT, __builtin_convertvector(sum_of_halves<M>(pairs[0]), typename RowWords<M>::floats));
    if constexpr (K::MINIMA == SUB_MINIMA) {
        static_assert(PART == K::MINIMUM_SUB);
        for (int i = 0; i < K::MINIMUM_PAIRS; i++)
            set(K::SUMS_AT + i, (sum_of_halves<M>(pairs[2 * i]) & 0xffff) | (sum_of_halves<M>(pairs[2 * i + 1]) << 16));
    }
}

// One block of M rows, whose codes lie from `at` on.
template <class K, int M> INLINE void pack_block(const int8_t* const* rows, size_t at, const float* scales, int offset, char* to) {
#pragma GCC unroll 2
    for (int i = 0; i < K::ELEMENTS / 16; i++) side_by_side<M>(rows, at + 16 * i, to + 16 * i * M);
    if constexpr (K::STARTS || K::MINIMA != NO_MINIMA) pack_sums<K, M>(offset, to);
    memcpy(to + K::DX_AT * 4 * M, scales, 4 * M);
}

template <class K, int M> void pack_tile(const QuantisedRow* x, int m, int blocks, int offset, char* to) {
    const int8_t* rows[M];
    for (int r = 0; r < M; r++) rows[r] = x[min_of(r, m - 1)].codes;  // rows beyond m: any, whose sums are not written
    each_block(blocks, [&](int b) {
        float scales[M];
        for (int r = 0; r < M; r++) scales[r] = x[min_of(r, m - 1)].scales[b];
        pack_block<K, M>(rows, size_t(b) * K::ELEMENTS, scales, offset, to);
        to += K::TILE_WORDS * 4 * M;
    });
}

template <Format TYPE> constexpr size_t tile_block_bytes() { return KindOf<TYPE>::type::TILE_WORDS * 4; }

template <Format TYPE> void pack_tiles(const QuantisedRow* x, int m, int blocks, void* to) {
    using K = typename KindOf<TYPE>::type;
    constexpr int offset = unsigned_offset<TYPE>();
    char* at = static_cast<char*>(to);
    for (int i = 0; i < m;) {
        const int rows = rows_of_tile(m - i, TILE), here = min_of(rows, m - i);
        if (rows == 2) pack_tile<K, 2>(x + i, here, blocks, offset, at);
        else if (rows == 4) pack_tile<K, 4>(x + i, here, blocks, offset, at);
        else pack_tile<K, TILE>(x + i, here, blocks, offset, at);
        i += rows, at += rows * blocks * tile_block_bytes<TYPE>();
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
