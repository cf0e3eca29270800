// Attention of one sequence's rows over its paged keys and values, with a running softmax (FlashAttention-2,
// arXiv 2307.08691) over tiles of keys at fixed absolute positions.
//
// A row is one query token and one head. What is done to a row depends on its position, window and keys alone: tiles
// that it may not see leave its state as it is, bit for bit, so that rows can share tiles in any grouping.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

constexpr int VECTORS = KEY_TILE / KEY_LANES;
constexpr float FAR_BELOW = -1e30f;  // instead of minus infinity, whose difference with itself is no number

// A vector of groups of 16 neighbouring keys, for k: [n][lane]; for v: [pair][n].
struct Tile {
    const uint32_t* k[VECTORS];
    size_t k_stride[VECTORS];  // groups between inner dimensions
    const uint32_t* v[VECTORS];
    int keys;  // how many exist
};

template <class T> struct Row {
    const T* q;
    T* out;
    int first, last;  // keys that it sees
    float sink;
    bool has_sink;
    const float* bias;  // of its head, at its own position; or null
    int position;
};

template <class T> constexpr int per_group() { return 4 / sizeof(T); }

// The groups of one (block, kv head).
template <class T> INLINE const uint32_t* head_of(const AttentionBlock& a, const CacheShape& s, int block) {
    return a.cache + s.head_at(a.block_table[block], a.kv_head) / sizeof(uint32_t);
}

// Copies key `position` into lane `lane` of a packed tile; blocks whose size is no multiple of 16 go this way.
template <class T>
INLINE void gather_key(const AttentionBlock& a, const CacheShape& s, int position, uint32_t* k, uint32_t* v, int lane) {
    const uint32_t* head = head_of<T>(a, s, position / s.block_size);
    int slot = position % s.block_size, inner = int(s.k_groups / s.block_size);
    for (int n = 0; n < inner; n++) k[n * KEY_LANES + lane] = head[size_t(n) * s.block_size + slot];
    if (s.shared) return;
    constexpr int g = per_group<T>();
    const T* from = reinterpret_cast<const T*>(head + s.k_groups + size_t(slot / g) * s.padded_dim) + slot % g;
    T* to = reinterpret_cast<T*>(v + size_t(lane / g) * s.padded_dim) + lane % g;
    for (int n = 0; n < s.padded_dim; n++) to[n * g] = from[n * g];
}

// Fills lane `lane` of a packed tile with zeros.
template <class T> INLINE void clear_key(const CacheShape& s, int inner, uint32_t* k, uint32_t* v, int lane) {
    for (int n = 0; n < inner; n++) k[n * KEY_LANES + lane] = 0;
    constexpr int g = per_group<T>();
    T* to = reinterpret_cast<T*>(v + size_t(lane / g) * s.padded_dim) + lane % g;
    for (int n = 0; n < s.padded_dim; n++) to[n * g] = 0;
}

#if defined(__AVX512F__)
// rows[j] = lane j of each of sixteen vectors at k, `stride` groups apart.
INLINE void lanes_as_rows(const uint32_t* k, size_t stride, __m512i* rows) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(k + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // Quarter q of a[4 * i + c] is lane 4 * q + c of vectors 4 * i to 4 * i + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512i even = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), odd = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        const __m512i later = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88), last = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(even, later, 0x88), rows[8 + c] = _mm512_shuffle_i32x4(even, later, 0xdd);
        rows[4 + c] = _mm512_shuffle_i32x4(odd, last, 0x88), rows[12 + c] = _mm512_shuffle_i32x4(odd, last, 0xdd);
    }
}
#endif

// The values of sixteen neighbouring keys, which are the keys' own first numbers, as they lie where they are not shared: v, of
// keys k whose groups are `stride` apart.
template <class T> static __attribute__((noinline)) void values_of_keys(const CacheShape& s, const uint32_t* k, size_t stride, uint32_t* v) {
    constexpr int g = per_group<T>();
    int m = 0;  // groups of a key
#if defined(__AVX512F__)
    for (; (m + 16) * g <= s.value_dim; m += 16) {
        __m512i keys[16];
        lanes_as_rows(k + m * stride, stride, keys);
        if constexpr (g == 1) {
#pragma GCC unroll 16
            for (int key = 0; key < 16; key++) _mm512_storeu_si512(v + size_t(key) * s.padded_dim + m, keys[key]);
        } else {
            const __m512i in_halves = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            // Element n of one key beside element n of the next: those below 16, then the others.
            const __m512i first = _mm512_add_epi16(in_halves, _mm512_set1_epi32(16 << 16)), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
#pragma GCC unroll 8
            for (int pair = 0; pair < 8; pair++) {
                uint32_t* to = v + size_t(pair) * s.padded_dim + 2 * m;
                _mm512_storeu_si512(to, _mm512_permutex2var_epi16(keys[2 * pair], first, keys[2 * pair + 1]));
                _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(keys[2 * pair], second, keys[2 * pair + 1]));
            }
        }
    }
#endif
    for (; m * g < s.value_dim; m++) {
        const uint32_t* lanes = k + m * stride;
        for (int i = 0; i < KEY_LANES; i += g) {
            uint32_t* to = v + size_t(i / g) * s.padded_dim + m * g;
            if constexpr (g == 1) to[0] = lanes[i];
            else to[0] = (lanes[i] & 0xffff) | lanes[i + 1] << 16, to[1] = lanes[i] >> 16 | (lanes[i + 1] & 0xffff0000u);
        }
    }
}

// Finds, or gathers into `packed`, the tile of keys from `start`. No key at or behind `stop` is read, and no block that ends
// before `seen`, the first key that a row sees: it was given back, and what another sequence writes there may be no number,
// which a weight of zero would not take away.
template <class T>
INLINE Tile find_tile(const AttentionBlock& a, const CacheShape& s, int seen, int start, int stop, uint32_t* packed) {
    Tile t;
    t.keys = min_of(KEY_TILE, stop - start);
    const int inner = int(s.k_groups / s.block_size), v_groups = KEY_LANES / per_group<T>() * s.padded_dim;
    const int first = min_of(VECTORS - 1, max_of(0, seen - start) / KEY_LANES);
    for (int i = first; i < VECTORS && i * KEY_LANES < t.keys; i++) {
        int position = start + i * KEY_LANES;
        uint32_t *k = packed + size_t(i) * (inner * KEY_LANES + v_groups), *v = k + inner * KEY_LANES;
        if (s.block_size % KEY_LANES == 0) {
            const uint32_t* head = head_of<T>(a, s, position / s.block_size);
            int slot = position % s.block_size;
            t.k[i] = head + slot, t.k_stride[i] = s.block_size;
            if (s.shared) values_of_keys<T>(s, t.k[i], t.k_stride[i], v), t.v[i] = v;
            else t.v[i] = head + s.k_groups + size_t(slot / per_group<T>()) * s.padded_dim;
            continue;
        }
        for (int lane = 0; lane < min_of(KEY_LANES, stop - position); lane++)
            position + lane < seen ? clear_key<T>(s, inner, k, v, lane) : gather_key<T>(a, s, position + lane, k, v, lane);
        t.k[i] = k, t.k_stride[i] = KEY_LANES, t.v[i] = v;
        if (s.shared) values_of_keys<T>(s, k, KEY_LANES, v);
    }
    // Vectors of which no key is seen are computed and masked. Any keys that may be read will do, and for those before the
    // first seen, values of zero; behind the last, values are not read.
    for (int i = 0; i < VECTORS; i++) {
        if (i >= first && i * KEY_LANES < t.keys) continue;
        t.k[i] = t.k[first], t.k_stride[i] = t.k_stride[first], t.v[i] = t.v[first];
        if (i < first) t.v[i] = static_cast<uint32_t*>(memset(packed + size_t(i) * v_groups, 0, size_t(v_groups) * 4));
    }
    return t;
}

// Functions of their own, so that the compiler sees one loop at a time, whose sums fit its registers.
#define KERNEL static __attribute__((noinline))

// What a row adds to the scores of sixteen keys from `start` on.
template <class R> INLINE V bias_of(const AttentionBlock& a, const R& row, int start) {
    float biases[KEY_LANES];
    for (int i = 0; i < KEY_LANES; i++) biases[i] = row.bias[max_of(-a.reach, min_of(start + i - row.position, a.reach))];
    return load(biases);
}

// Turns a row's scores of the keys from `start` on into weights rounded to T, in place, and updates its maximum and sum.
// Returns what the row's output so far is to be multiplied by.
template <class T, class R>
KERNEL float softmax_row(const AttentionBlock& a, const R& row, int start, float* scores, float* largest, float* total) {
    const int first = row.first, last = row.last;
    V s[VECTORS], top = all(*largest);
    const V scale = all(a.scale);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) s[j] = mul(load(scores + j * KEY_LANES), scale);
    if (a.softcap != 0)
        for (int j = 0; j < VECTORS; j++) s[j] = mul(hyperbolic_tangent(div(s[j], all(a.softcap))), all(a.softcap));
    if (row.bias)
        for (int j = 0; j < VECTORS; j++) s[j] = add(s[j], bias_of(a, row, start + j * KEY_LANES));
    if (first > start || last < start + KEY_TILE - 1)
        for (int j = 0; j < VECTORS; j++) {
            const int base = start + j * KEY_LANES;
            s[j] = where_lanes(first - base, last + 1 - base, s[j], all(-__builtin_inff()));
        }
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) top = maximum(s[j], top);
    const float before = *largest, now = reduce_max(top);
    V sum = zero();
    T* weights = reinterpret_cast<T*>(scores);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
        V p = exponential(sub(s[j], all(now)));
        sum = add(sum, p);
        store(weights + j * KEY_LANES, p);
    }
    const float shrink = before == now ? 1.0f : reduce_max(exponential(all(before - now)));
    *largest = now;
    *total = *total * shrink + reduce_add(sum);
    return shrink;
}

// A row's state: the running output, and that of the splits before, each with its largest score and sum of weights.
struct State {
    float *scores, *out, *out_before;
    float *largest, *total, *largest_before, *total_before;
};

INLINE State state_of(float* scratch, int row, const CacheShape& s) {
    const int padded = s.padded_dim;
    float* p = scratch + row * state_floats(s);
    float* m = p + KEY_TILE + 2 * padded;
    return {p, p + KEY_TILE, p + KEY_TILE + padded, m, m + 1, m + 2, m + 3};
}

INLINE void begin_split(const State& s, int padded) {
    for (int n = 0; n < padded; n += 16) store(s.out + n, zero());
    *s.largest = FAR_BELOW, *s.total = 0;
}

// Adds the split just done to those before it; a row that saw none of its keys stays as it was.
INLINE void end_split(const State& s, int padded) {
    if (*s.total == 0) return;
    float now = *s.largest_before > *s.largest ? *s.largest_before : *s.largest;
    float old_share = reduce_max(exponential(all(*s.largest_before - now))), new_share = reduce_max(exponential(all(*s.largest - now)));
    for (int n = 0; n < padded; n += 16)
        store(s.out_before + n, fma(load(s.out + n), all(new_share), mul(load(s.out_before + n), all(old_share))));
    *s.total_before = *s.total_before * old_share + *s.total * new_share;
    *s.largest_before = now;
}

template <class T> INLINE void finish(const Row<T>& row, const State& s, int value_dim) {
    float total = *s.total_before, factor = 1;
    if (row.has_sink) {  // the sink is one more key without a value
        float now = row.sink > *s.largest_before ? row.sink : *s.largest_before;
        factor = reduce_max(exponential(all(*s.largest_before - now)));
        total = total * factor + reduce_max(exponential(all(row.sink - now)));
    }
    V scale = all(factor / total);
    for (int n = 0; n < value_dim; n += 16) {
        V value = mul(load(s.out_before + n), scale);
        value_dim - n >= 16 ? store(row.out + n, value) : store_some(row.out + n, value, value_dim - n);
    }
}

constexpr int MOST_ROWS = 64;

// The block's rows, with the states in `scratch` of rows that have met no split yet; returns how many.
template <class T> INLINE int find_rows(const AttentionBlock& a, const CacheShape& s, float* scratch, Row<T>* rows, State* states) {
    const int count = a.queries * a.group;
    for (int i = 0; i < count; i++) {
        int query = i / a.group, head = i % a.group, position = a.first_position + query;
        rows[i] = {static_cast<const T*>(a.q) + query * a.q_stride + size_t(head) * s.key_dim,
                   static_cast<T*>(a.out) + query * a.out_stride + size_t(head) * s.value_dim,
                   max_of(a.first_key, a.window ? position - a.window + 1 : 0), a.last_key < 0 ? position : a.last_key,
                   a.sinks ? a.sinks[head] : 0.0f, a.sinks != nullptr, a.bias ? a.bias + head * a.bias_stride : nullptr, position};
        states[i] = state_of(scratch, i, s);
        for (int n = 0; n < s.padded_dim; n += 16) store(states[i].out_before + n, zero());
        *states[i].largest_before = FAR_BELOW, *states[i].total_before = 0;
    }
    return count;
}

// Tiles of a cache that holds numbers of type T.
template <class T> struct PlainTiles {
    static __attribute__((always_inline)) Tile find(const AttentionBlock& a, const CacheShape& s, int seen, int start, int stop, float* packed) {
        return find_tile<T>(a, s, seen, start, stop, reinterpret_cast<uint32_t*>(packed));
    }
};

template <class T, class Rows, class Tiles = PlainTiles<T>> void attention(const AttentionBlock& a, const CacheShape& s, float* scratch) {
    Row<T> rows[MOST_ROWS];
    State states[MOST_ROWS];
    const int count = find_rows<T>(a, s, scratch, rows, states), stop = rows[count - 1].last + 1, whole = a.split < 0;
    float* gathered = a.room ? a.room : scratch + states_floats(count, s);
    for (int r = 0; r < count; r++) begin_split(states[r], s.padded_dim);
    Rows all_rows{a, s, rows, states, count, gathered + gathered_floats(s)};
    const int first = rows[0].first / KEY_TILE * KEY_TILE, end = whole ? stop : min_of(stop, (a.split + 1) * KEY_SPLIT);
    for (int start = whole ? first : max_of(first, a.split * KEY_SPLIT); start < end; start += KEY_TILE) {
        all_rows.meet(Tiles::find(a, s, rows[0].first, start, stop, gathered), start);
        if (whole && ((start + KEY_TILE) % KEY_SPLIT == 0 || start + KEY_TILE >= stop))
            for (int r = 0; r < count; r++) end_split(states[r], s.padded_dim), begin_split(states[r], s.padded_dim);
    }
    if (whole)
        for (int r = 0; r < count; r++) finish(rows[r], states[r], s.value_dim);
}

template <class T> void join_splits(const AttentionBlock& a, const CacheShape& s, float* scratch, size_t stride, int splits) {
    Row<T> rows[MOST_ROWS];
    State states[MOST_ROWS];
    const int count = find_rows<T>(a, s, scratch, rows, states);
    for (int r = 0; r < count; r++) {
        for (int i = 0; i < splits; i++) {
            State split = states[r], here = state_of(scratch + i * stride, r, s);
            split.out = here.out, split.largest = here.largest, split.total = here.total;
            end_split(split, s.padded_dim);
        }
        finish(rows[r], states[r], s.value_dim);
    }
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
