// Attention's two products of bfloat16 on AMX: the left operand is up to 16 rows of queries, or of their weights; the right
// one is the KV cache as it lies (kernels.h). The softmax between them is attention.h's.
//
// Keys are taken 16 at a time in both products, whatever the size of a block, and always in the same order.
#pragma once
#include "amx_tiles.h"
#include "attention.h"

namespace moebius {
namespace MOEBIUS_ISA {

static_assert(VECTORS == 4 && KEY_LANES == TILE_LINES, "the scores of a tile of keys fill four registers");

// Registers: 0 to 3 sums; 4 queries, 5 keys; 6 weights, 7 values.
class AmxRows {
public:
    AmxRows(const AttentionBlock& a, const CacheShape& s, const Row<bf16>* rows, const State* states, int count, float* scratch)
        : a_(a), s_(s), rows_(rows), states_(states), count_(count), height_(min_of(count, TILE_LINES)),
          steps_((s.key_dim + STEP - 1) / STEP), tail_((s.key_dim % STEP + 1) / 2), queries_(reinterpret_cast<bf16*>(scratch)) {
        const int held = (count + TILE_LINES - 1) / TILE_LINES * TILE_LINES;
        memset(queries_, 0, sizeof(bf16) * held * steps_ * STEP);
        for (int i = 0; i < count; i++) memcpy(queries_ + i * steps_ * STEP, rows[i].q, s.key_dim * sizeof(bf16));
        last_keys_ = reinterpret_cast<uint32_t*>(queries_ + held * steps_ * STEP);
        if (tail_) memset(last_keys_, 0, VECTORS * TILE_LINES * LINE_BYTES);
        last_values_ = last_keys_ + VECTORS * TILE_LINES * KEY_LANES;
        TileShapes shapes;
        shapes.set(0, 5, height_, LINE_BYTES);
        shapes.set(5, 1, TILE_LINES, LINE_BYTES);
        shapes.set(6, 1, height_, KEY_LANES * sizeof(bf16));
        shapes.set(7, 1, KEY_LANES / 2, LINE_BYTES);
        configure_tiles(shapes);
    }
    ~AmxRows() { release_tiles(); }

    void meet(const Tile& t, int start) {
        if (tail_) copy_last_keys(t);
        const uint32_t* values[VECTORS];
        for (int j = 0; j < VECTORS; j++) values[j] = t.v[j];
        if (t.keys % KEY_LANES) values[t.keys / KEY_LANES] = copy_last_values(t);
        for (int first = 0; first < count_; first += TILE_LINES) {
            alignas(64) float scores[TILE_LINES * KEY_TILE];
            all_scores(t, first, scores);
            for (int i = 0; i < min_of(TILE_LINES, count_ - first); i++) {
                const State& state = states_[first + i];
                float shrink = softmax_row<bf16>(a_, rows_[first + i], start, scores + i * KEY_TILE, state.largest, state.total);
                if (shrink == 1) continue;
                for (int n = 0; n < s_.padded_dim; n += 16) store(state.out + n, mul(load(state.out + n), all(shrink)));
            }
            float* out = states_[first].out;
            int n = 0;
            for (; n + 64 <= s_.padded_dim; n += 64) add_values<4>(scores, values, t.keys, n, out + n);
            for (; n < s_.padded_dim; n += 16) add_values<1>(scores, values, t.keys, n, out + n);
        }
    }

private:
    // The last groups of the inner dimension, in tiles that zeros fill up.
    void copy_last_keys(const Tile& t) {
        const int first = s_.key_dim / STEP * (STEP / 2);
        for (int j = 0; j < VECTORS; j++)
            for (int n = 0; n < tail_; n++)
                memcpy(last_keys_ + (j * TILE_LINES + n) * KEY_LANES, t.k[j] + (first + n) * t.k_stride[j], LINE_BYTES);
    }

    // The last keys' values, with zeros where no key is: what lies there may be no number.
    const uint32_t* copy_last_values(const Tile& t) {
        const int keys = t.keys % KEY_LANES;
        const uint32_t* from = t.v[t.keys / KEY_LANES];
        for (int pair = 0; pair < KEY_LANES / 2; pair++)
            for (int n = 0; n < s_.padded_dim; n += 16) {
                const int at = pair * s_.padded_dim + n;
                G values = 2 * pair < keys ? groups(from + at) : group_all(0);
                _mm512_storeu_si512(last_values_ + at, 2 * pair + 1 < keys ? values.v : low_halves(values).v);
            }
        return last_values_;
    }

    template <int j> void add_keys(const uint32_t* keys, size_t stride) {
        tile_load<5>(keys, stride * sizeof(uint32_t));
        tile_dot<j, 4, 5>();
    }

    // scores[row][key] = q . k for the rows from `first`
    void all_scores(const Tile& t, int first, float* scores) {
        const size_t stride = steps_ * LINE_BYTES, inner = s_.key_dim / STEP;
        const bf16* q = queries_ + size_t(first) * steps_ * STEP;
        const uint32_t* k[VECTORS];
        for (int j = 0; j < VECTORS; j++) k[j] = t.k[j];
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        for (size_t step = 0; step < inner; step++, q += STEP) {
            tile_load<4>(q, stride);
            add_keys<0>(k[0], t.k_stride[0]), add_keys<1>(k[1], t.k_stride[1]);
            add_keys<2>(k[2], t.k_stride[2]), add_keys<3>(k[3], t.k_stride[3]);
            for (int j = 0; j < VECTORS; j++) k[j] += TILE_LINES * t.k_stride[j];
        }
        if (tail_) {
            constexpr int TILE = TILE_LINES * KEY_LANES;
            tile_load<4>(q, stride);
            add_keys<0>(last_keys_, KEY_LANES), add_keys<1>(last_keys_ + TILE, KEY_LANES);
            add_keys<2>(last_keys_ + 2 * TILE, KEY_LANES), add_keys<3>(last_keys_ + 3 * TILE, KEY_LANES);
        }
        constexpr size_t row = KEY_TILE * sizeof(float);
        tile_store<0>(scores, row), tile_store<1>(scores + 16, row), tile_store<2>(scores + 32, row), tile_store<3>(scores + 48, row);
    }

    template <int c> void add_value(const uint32_t* values) {
        tile_load<7>(values + c * 16, s_.padded_dim * sizeof(uint32_t));
        tile_dot<c, 6, 7>();
    }

    // out[row] += weights . v for the 16 * C dimensions from n0
    template <int C> void add_values(const float* weights, const uint32_t* const* values, int keys, int n0, float* out) {
        const size_t stride = state_floats(s_) * sizeof(float);
        tile_load<0>(out, stride);
        if constexpr (C == 4) tile_load<1>(out + 16, stride), tile_load<2>(out + 32, stride), tile_load<3>(out + 48, stride);
        for (int j = 0; j * KEY_LANES < keys; j++) {
            tile_load<6>(reinterpret_cast<const bf16*>(weights) + j * KEY_LANES, KEY_TILE * sizeof(float));
            add_value<0>(values[j] + n0);
            if constexpr (C == 4) add_value<1>(values[j] + n0), add_value<2>(values[j] + n0), add_value<3>(values[j] + n0);
        }
        tile_store<0>(out, stride);
        if constexpr (C == 4) tile_store<1>(out + 16, stride), tile_store<2>(out + 32, stride), tile_store<3>(out + 48, stride);
    }

    const AttentionBlock& a_;
    const CacheShape& s_;
    const Row<bf16>* rows_;
    const State* states_;
    int count_, height_, steps_, tail_;  // tail_: groups in the last, unfilled step
    bf16* queries_;                      // (rows, steps * STEP), filled up with zeros
    uint32_t *last_keys_, *last_values_;
};

inline void amx_attention(const AttentionBlock& a, const CacheShape& s, float* scratch) { attention<bf16, AmxRows>(a, s, scratch); }

}  // namespace MOEBIUS_ISA
}  // namespace moebius
