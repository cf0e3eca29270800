// Matrix products of bfloat16 on AMX. Weights are the left operand, where they lie: 16 rows of 32 elements, a cache line
// each. The few rows of x, "tokens" here, are the right operand, for which `amx_pack` turns them into pairs:
// [tile of 16 tokens][step of 32 elements][pair][token]. Results come as (weight, token) and are turned back.
//
// An output is summed in one accumulator, in order, 32 elements a step, the last step filled up with zeros: its bits depend
// on its two rows alone. The last tile of weights, or of tokens, is moved back to end at the last row, where there is room:
// what it computes twice comes out the same.
#pragma once
#include "amx_tiles.h"
#include "kernels.h"

namespace moebius {
namespace MOEBIUS_ISA {

constexpr int TILE_BYTES = TILE_LINES * LINE_BYTES;

// out[j][row] = rows[row][at + j] for sixteen rows and four columns of groups
INLINE void turn_4(const char* const* rows, int at, __m512i* out) {
    __m512i v[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        auto four = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + 4 * at)); };
        v[r] = _mm512_inserti32x4(_mm512_castsi128_si512(four(r)), four(r + 4), 1);
        v[r] = _mm512_inserti32x4(_mm512_inserti32x4(v[r], four(r + 8), 2), four(r + 12), 3);
    }
    __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    out[0] = _mm512_unpacklo_epi64(a, c), out[1] = _mm512_unpackhi_epi64(a, c);
    out[2] = _mm512_unpacklo_epi64(b, d), out[3] = _mm512_unpackhi_epi64(b, d);
}

// `left` elements of each of `count` rows, filled up with zeros to a tile
INLINE void fill_tile(const char* const* rows, int count, int left, char* to) {
    for (int r = 0; r < count; r++)
        _mm512_store_si512(to + r * LINE_BYTES, groups_some(reinterpret_cast<const bf16*>(rows[r]), left).v);
}

// The tokens of one tile, all steps.
INLINE void pack_tile(const char* const* rows, int k, char* to) {
    alignas(64) char last[TILE_BYTES];
    const char* from[TILE_LINES];
    for (int at = 0; at < k; at += STEP, to += TILE_BYTES) {
        for (int r = 0; r < TILE_LINES; r++) from[r] = rows[r] + at * sizeof(bf16);
        if (k - at < STEP) {
            fill_tile(from, TILE_LINES, k - at, last);
            for (int r = 0; r < TILE_LINES; r++) from[r] = last + r * LINE_BYTES;
        }
        __m512i pairs[4];
        for (int i = 0; i < TILE_LINES; i += 4) {
            turn_4(from, i, pairs);
            for (int j = 0; j < 4; j++) _mm512_storeu_si512(to + (i + j) * LINE_BYTES, pairs[j]);
        }
    }
}

// A single token's pairs already are a column: they are copied, 64 bytes a step.
inline void amx_pack(const void* const* x, int m, int k, void* to) {
    const int steps = (k + STEP - 1) / STEP, width = min_of(m, TILE_LINES);
    if (m == 1) {
        memcpy(to, x[0], k * sizeof(bf16));
        memset(static_cast<bf16*>(to) + k, 0, (steps * STEP - k) * sizeof(bf16));
        return;
    }
    for (int i = 0; i < m; i += TILE_LINES) {
        const char* rows[TILE_LINES];  // beyond the last token: any row, in columns that are not loaded
        for (int r = 0; r < TILE_LINES; r++) rows[r] = static_cast<const char*>(x[min_of(min_of(i, m - width) + r, m - 1)]);
        pack_tile(rows, k, static_cast<char*>(to) + size_t(i / TILE_LINES) * steps * TILE_BYTES);
    }
}

struct Factors {
    const char *w, *x;  // x as packed
    size_t w_stride, x_stride;
    int m, n, k;
    float* c;
    int ldc;
    int rows, width;  // of a tile: weights and tokens

    int steps() const { return (k + STEP - 1) / STEP; }
    int weight(int tile) const { return min_of(tile * TILE_LINES, n - rows); }
    int token(int tile) const { return min_of(tile * TILE_LINES, m - width); }
};

// Registers: 0 to 3 sums, [weights][tokens]; 4 and 5 weights; 6 and 7 tokens.
template <int W, int T> INLINE void add_step(const char* const* w, size_t w_stride, const char* const* x, size_t x_stride) {
    tile_load<4>(w[0], w_stride), tile_load<6>(x[0], x_stride);
    tile_dot<0, 4, 6>();
    if constexpr (T > 1) tile_load<7>(x[1], x_stride), tile_dot<1, 4, 7>();
    if constexpr (W > 1) tile_load<5>(w[1], w_stride), tile_dot<2, 5, 6>();
    if constexpr (W > 1 && T > 1) tile_dot<3, 5, 7>();
}

// Writes one register of sums to c[token][weight].
template <int t> INLINE void write_sums(const Factors& f, int token, int weight) {
    float* c = f.c + size_t(token) * f.ldc + weight;
    if (f.width == 1) return tile_store<t>(c, sizeof(float));
    alignas(64) float sums[TILE_LINES][TILE_LINES];
    const char* rows[TILE_LINES];
    tile_store<t>(sums, LINE_BYTES);
    for (int r = 0; r < TILE_LINES; r++) rows[r] = reinterpret_cast<const char*>(sums[min_of(r, f.rows - 1)]);
    __m512i columns[4];
    for (int i = 0; i < f.width; i += 4) {
        turn_4(rows, i, columns);
        for (int j = i; j < min_of(i + 4, f.width); j++) store_some(c + size_t(j) * f.ldc, {_mm512_castsi512_ps(columns[j - i])}, f.rows);
    }
}

// W tiles of weights times T tiles of tokens. Meanwhile fetches the weights that are needed next, in the order of their
// addresses, into the second cache: 16 rows at once are more streams than a prefetcher follows.
template <int W, int T, bool FETCH> void amx_block(const Factors& f, int weight_tile, int token_tile, const char* ahead) {
    const char *w[W], *x[T];
    const size_t w_stride = f.w_stride, x_stride = f.x_stride;
    for (int i = 0; i < W; i++) w[i] = f.w + f.weight(weight_tile + i) * w_stride;
    for (int i = 0; i < T; i++) x[i] = f.x + size_t(token_tile + i) * f.steps() * TILE_LINES * x_stride;
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    int left = f.k;
    for (; left >= STEP; left -= STEP) {
        if constexpr (FETCH) {
#pragma GCC unroll 32
            for (int i = 0; i < W * TILE_LINES; i++) __builtin_prefetch(ahead + i * LINE_BYTES, 0, 2);
            ahead += W * TILE_BYTES;
        }
        add_step<W, T>(w, w_stride, x, x_stride);
        for (int i = 0; i < W; i++) w[i] += LINE_BYTES;
        for (int i = 0; i < T; i++) x[i] += TILE_LINES * x_stride;
    }
    if (left) {
        alignas(64) char last[W][TILE_BYTES];
        const char* rows[TILE_LINES];
        for (int i = 0; i < W; i++) {
            for (int r = 0; r < f.rows; r++) rows[r] = w[i] + r * w_stride;
            fill_tile(rows, f.rows, left, last[i]);
            w[i] = last[i];
        }
        add_step<W, T>(w, LINE_BYTES, x, x_stride);
    }
    const int weight = f.weight(weight_tile), token = f.token(token_tile);
    write_sums<0>(f, token, weight);
    if constexpr (T > 1) write_sums<1>(f, f.token(token_tile + 1), weight);
    if constexpr (W > 1) write_sums<2>(f, token, f.weight(weight_tile + 1));
    if constexpr (W > 1 && T > 1) write_sums<3>(f, f.token(token_tile + 1), f.weight(weight_tile + 1));
}

template <int W, int T> INLINE void amx_block(const Factors& f, int weight_tile, int token_tile, const char* ahead) {
    // Later tokens meet weights that lie in the second cache already.
    if (ahead && token_tile == 0) amx_block<W, T, true>(f, weight_tile, token_tile, ahead);
    else amx_block<W, T, false>(f, weight_tile, token_tile, ahead);
}

inline void amx_product(const void* const* x, int m, const void* w, size_t ldw, int n, int k, const void* next, float* c, int ldc) {
    const Factors f = {static_cast<const char*>(w), static_cast<const char*>(x[0]), ldw * sizeof(bf16), m == 1 ? 4u : size_t(LINE_BYTES),
                       m, n, k, c, ldc, min_of(n, TILE_LINES), min_of(m, TILE_LINES)};
    TileShapes shapes;
    shapes.set(0, 4, f.rows, 4 * f.width);
    shapes.set(4, 2, f.rows, LINE_BYTES);
    shapes.set(6, 2, TILE_LINES, 4 * f.width);
    configure_tiles(shapes);
    const int weight_tiles = (n + TILE_LINES - 1) / TILE_LINES, token_tiles = (m + TILE_LINES - 1) / TILE_LINES;
    for (int i = 0; i < weight_tiles; i += 2) {
        const char* ahead = i + 2 < weight_tiles ? f.w + f.weight(i + 2) * f.w_stride : static_cast<const char*>(next);
        for (int j = 0; j < token_tiles; j += 2) {
            const bool two_weights = i + 1 < weight_tiles, two_tokens = j + 1 < token_tiles;
            if (two_weights && two_tokens) amx_block<2, 2>(f, i, j, ahead);
            else if (two_weights) amx_block<2, 1>(f, i, j, ahead);
            else if (two_tokens) amx_block<1, 2>(f, i, j, ahead);
            else amx_block<1, 1>(f, i, j, ahead);
        }
    }
    release_tiles();
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
