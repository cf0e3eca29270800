// Attention over keys and values in codes of 8 bits. A row's query is quantised to 16 bits with one scale, and so are its
// weights of each tile of keys, times the values' scales: both products are then sums of integers, exact in any order, and
// finer than bfloat16's by far. Half the bytes of a bfloat16 cache are read, and as many steps computed.
//
// Between the products stands attention.h's softmax, in float32. What lies in the cache where no key is seen may be anything:
// its score is masked, its weight is zero, and codes are never no number.
#pragma once
#include "attention.h"
#include "codes.h"

namespace moebius {
namespace MOEBIUS_ISA {

// Rows, and vectors of sixteen keys or dimensions, whose sums fill the registers.
#if defined(__AVX512F__)
constexpr int CODE_ROWS = 4, CODE_VECTORS = 4;
#else
constexpr int CODE_ROWS = 2, CODE_VECTORS = 2;
#endif
// Numbers that are all this small are quantised to zeros: the inverse of their scale could be infinite.
constexpr float NEXT_TO_NOTHING = 1e-30f;
constexpr int MOST_KEY = 127, MOST_WEIGHT = 32767;
static_assert(int64_t(KEY_TILE) * MOST_WEIGHT * MOST_KEY <= INT32_MAX, "a tile's values are summed in 32 bits");

// For each vector of 16 neighbouring keys: pairs of codes, for k [pair][lane], for v [pair of keys][n], and their scales.
struct CodeTile {
    const int8_t *k[VECTORS], *v[VECTORS];
    const f16 *k_scale[VECTORS], *v_scale[VECTORS];
    size_t k_stride;  // bytes between pairs of dimensions
    int keys;         // how many exist
};

struct CodeTiles {
    // As find_tile does.
    static __attribute__((always_inline)) CodeTile find(const AttentionBlock& a, const CacheShape& s, int seen, int start, int stop, float* packed) {
        CodeTile t;
        t.keys = min_of(KEY_TILE, stop - start);
        const bool whole = s.block_size % KEY_LANES == 0;
        t.k_stride = 2 * (whole ? s.block_size : KEY_LANES);
        const int first = min_of(VECTORS - 1, max_of(0, seen - start) / KEY_LANES);
        for (int i = first; i < VECTORS && i * KEY_LANES < t.keys; i++) {
            const int position = start + i * KEY_LANES;
            if (!whole) {
                gather(a, s, max_of(seen, position), min_of(stop, position + KEY_LANES), position, reinterpret_cast<int8_t*>(packed), i, t);
                continue;
            }
            const int8_t* head = head_at(a, s, position / s.block_size);
            const int slot = position % s.block_size;
            t.k[i] = head + 2 * slot, t.v[i] = head + 2 * s.k_groups + size_t(slot) * s.padded_dim;
            t.k_scale[i] = scales_at(head, s) + slot, t.v_scale[i] = t.k_scale[i] + s.block_size;
        }
        for (int i = 0; i < VECTORS; i++)  // Of which no key is seen: any that may be read will do.
            if (i < first || i * KEY_LANES >= t.keys)
                t.k[i] = t.k[first], t.v[i] = t.v[first], t.k_scale[i] = t.k_scale[first], t.v_scale[i] = t.v_scale[first];
        return t;
    }

private:
    static const int8_t* head_at(const AttentionBlock& a, const CacheShape& s, int block) {
        return reinterpret_cast<const int8_t*>(a.cache) + s.head_at(a.block_table[block], a.kv_head);
    }
    static const f16* scales_at(const int8_t* head, const CacheShape& s) {
        return reinterpret_cast<const f16*>(head + 2 * (s.k_groups + s.v_groups));
    }

    // Copies keys [from, to) to their lanes of vector i, which begins at `position`, packed.
    static void gather(const AttentionBlock& a, const CacheShape& s, int from, int to, int position, int8_t* packed, int i, CodeTile& t) {
        const int pairs = int(s.k_groups / s.block_size), code_bytes = KEY_LANES * (2 * pairs + s.padded_dim);
        int8_t *k = packed + size_t(i) * (code_bytes + 4 * KEY_LANES), *v = k + 2 * KEY_LANES * pairs;
        f16* scales = reinterpret_cast<f16*>(k + code_bytes);
        memset(k, 0, code_bytes + 4 * KEY_LANES);
        for (int p = from; p < to; p++) {
            const int8_t* head = head_at(a, s, p / s.block_size);
            const int slot = p % s.block_size, lane = p - position;
            for (int n = 0; n < pairs; n++) memcpy(k + 2 * (n * KEY_LANES + lane), head + 2 * (size_t(n) * s.block_size + slot), 2);
            const int8_t* value = head + 2 * s.k_groups + size_t(slot / 2) * 2 * s.padded_dim + slot % 2;
            int8_t* to_value = v + lane / 2 * 2 * s.padded_dim + lane % 2;
            for (int n = 0; n < s.padded_dim; n++) to_value[2 * n] = value[2 * n];
            scales[lane] = scales_at(head, s)[slot], scales[KEY_LANES + lane] = scales_at(head, s)[s.block_size + slot];
        }
        t.k[i] = k, t.v[i] = v, t.k_scale[i] = scales, t.v_scale[i] = scales + KEY_LANES;
    }
};

// sums[i][j] += the products of a[i] with vector j of b, `count` pairs of codes; b's lie `stride` bytes apart.
template <int R, int J>
INLINE void add_pairs(const int16_t* const* a, const int8_t* const* b, size_t stride, int count, I* sums) {
    I s[R * J];
    const int16_t* from[R];
    const int8_t* at[J];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) from[i] = a[i];
#pragma GCC unroll 4
    for (int j = 0; j < J; j++) at[j] = b[j];
#pragma GCC unroll 16
    for (int i = 0; i < R * J; i++) s[i] = sums[i];
    for (int n = 0; n < count; n++) {
        P codes[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) codes[j] = widened_pairs(at[j]), at[j] += stride;
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) {
            const P one = pair_all(read<uint32_t>(from[i] + 2 * n));
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) s[i * J + j] = add_products(s[i * J + j], one, codes[j]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R * J; i++) sums[i] = s[i];
}

// A quantised query; what its scores, sums of products of codes with a key's scale, are multiples of; and what each is less.
struct CodeQuery {
    const int16_t* codes;
    float unit, added;
};

// scores[row][key] = q . k for R rows and a whole tile
template <int R> KERNEL void code_scores(const CodeQuery* queries, const CodeTile& t, int pairs, float* scores) {
    constexpr int J = CODE_VECTORS;
    const int16_t* q[R];
    for (int i = 0; i < R; i++) q[i] = queries[i].codes;
    for (int v = 0; v < VECTORS; v += J) {
        I sums[R * J];
        for (I& sum : sums) sum = no_sums();
        add_pairs<R, J>(q, t.k + v, t.k_stride, pairs, sums);
        for (int j = 0; j < J; j++) {
            const V scale = load(t.k_scale[v + j]);
            for (int i = 0; i < R; i++) {
                const V score = mul(mul(to_floats(sums[i * J + j]), scale), all(queries[i].unit));
                store(scores + i * KEY_TILE + (v + j) * KEY_LANES, add(score, all(queries[i].added)));
            }
        }
    }
}

// Codes of a row's weights, each times its value's scale, of the keys from `first` to `last`; returns what they are multiples of.
INLINE float weight_codes(const CodeTile& t, int first, int last, int start, const float* weights, int16_t* codes) {
    V w[VECTORS], top = zero(), sum = zero();
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) w[j] = mul(load(weights + j * KEY_LANES), load(t.v_scale[j]));
    if (first > start || last < start + KEY_TILE - 1)
        for (int j = 0; j < VECTORS; j++) {
            const int base = start + j * KEY_LANES;
            w[j] = where_lanes(first - base, last + 1 - base, w[j], zero());
        }
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) top = maximum(w[j], top), sum = add(sum, w[j]);
    // The largest could lose what is no number; a sum does not.
    const float total = reduce_add(sum), largest = reduce_max(top) + (total - total);
    if (largest > NEXT_TO_NOTHING) {
        const V inverse = all(MOST_WEIGHT / largest);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) store_codes(codes + j * KEY_LANES, rounded(mul(w[j], inverse)));
    } else {
        memset(codes, 0, KEY_TILE * sizeof(int16_t));
    }
    return largest / MOST_WEIGHT;
}

// out[row] = out[row] * shrink[row] + unit[row] * (weights . v) for R rows and the 16 * J dimensions from n
template <int R, int J>
KERNEL void add_code_values(const int16_t* weights, const float* unit, const float* shrink, const CodeTile& t, int padded, int n, float* const* out) {
    I sums[R * J];
    for (I& sum : sums) sum = no_sums();
    for (int v = 0; v * KEY_LANES < t.keys; v++) {
        const int16_t* some[R];
        const int8_t* values[J];
        for (int i = 0; i < R; i++) some[i] = weights + i * KEY_TILE + v * KEY_LANES;
        for (int j = 0; j < J; j++) values[j] = t.v[v] + 2 * (n + 16 * j);
        add_pairs<R, J>(some, values, 2 * padded, (min_of(KEY_LANES, t.keys - v * KEY_LANES) + 1) / 2, sums);
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < J; j++) {
            float* to = out[i] + n + 16 * j;
            store(to, fma(to_floats(sums[i * J + j]), all(unit[i]), mul(load(to), all(shrink[i]))));
        }
}

template <class T> class CodeRows {
public:
    CodeRows(const AttentionBlock& a, const CacheShape& s, const Row<T>* rows, const State* states, int count, float* scratch)
        : a_(a), s_(s), rows_(rows), states_(states), count_(count), pairs_(int(s.k_groups / s.block_size)) {
        int16_t* codes = reinterpret_cast<int16_t*>(scratch);
        for (int i = 0; i < count; i++, codes += 2 * pairs_) queries_[i] = quantised_query(rows[i].q, codes);
    }

    void meet(const CodeTile& t, int start) {
        int i = 0;
        for (; i + CODE_ROWS <= count_; i += CODE_ROWS) meet_rows<CODE_ROWS>(t, start, i);
        for (; i < count_; i++) meet_rows<1>(t, start, i);
    }

private:
    CodeQuery quantised_query(const T* q, int16_t* codes) const {
        const float most = float(min_of(MOST_WEIGHT, INT32_MAX / MOST_KEY / s_.key_dim));
        auto value = [&](int i, int count) { return take(q + i, count); };
        const float largest = largest_of(s_.key_dim, value);
        memset(codes, 0, 4 * pairs_);
        if (largest > NEXT_TO_NOTHING) codes_of(s_.key_dim, most / largest, most, codes, value);
        V sum = zero();
        if (a_.key_offset) each_vector(s_.key_dim, [&](int i, int count) { sum = fma(take(q + i, count), take(a_.key_offset + i, count), sum); });
        return {codes, largest / most, reduce_add(sum)};
    }

    template <int R> void meet_rows(const CodeTile& t, int start, int first) {
        alignas(64) float scores[R * KEY_TILE];
        alignas(64) int16_t weights[R * KEY_TILE];
        float shrink[R], unit[R], *out[R];
        code_scores<R>(queries_ + first, t, pairs_, scores);
        for (int i = 0; i < R; i++) {
            const Row<T>& row = rows_[first + i];
            const State& state = states_[first + i];
            float* own = scores + i * KEY_TILE;
            shrink[i] = softmax_row<float>(a_, row, start, own, state.largest, state.total);
            unit[i] = weight_codes(t, row.first, row.last, start, own, weights + i * KEY_TILE);
            out[i] = state.out;
        }
        int n = 0;
        for (; n + 16 * CODE_VECTORS <= s_.padded_dim; n += 16 * CODE_VECTORS)
            add_code_values<R, CODE_VECTORS>(weights, unit, shrink, t, s_.padded_dim, n, out);
        for (; n < s_.padded_dim; n += 16) add_code_values<R, 1>(weights, unit, shrink, t, s_.padded_dim, n, out);
    }

    const AttentionBlock& a_;
    const CacheShape& s_;
    const Row<T>* rows_;
    const State* states_;
    int count_, pairs_;  // of rows; of a key's codes
    CodeQuery queries_[MOST_ROWS];
};

template <class T> void attention_int8(const AttentionBlock& a, const CacheShape& s, float* scratch) { attention<T, CodeRows<T>, CodeTiles>(a, s, scratch); }

}  // namespace MOEBIUS_ISA
}  // namespace moebius
