// The single-threaded kernels that every instruction set provides, as one table of functions an instruction set.
//
// A kernel computes a block that one thread owns; ops.cpp spreads blocks over threads. P1 (batch invariant) rests on this: a
// row's result is computed by the same operations in the same order whatever rows surround it, so no kernel's result
// depends on m, on how columns are chunked, or on which block of the KV cache a token lies in.
//
// Legend: T, of what is computed with, is uint16_t (bfloat16) or float; a weight matrix has a format. A "group" is 32 bits: two bfloat16 neighbours of the inner dimension, or one
// float. Products accumulate in float32.
#pragma once
#include <cstddef>
#include <cstdint>

#include "block_kernels.h"
#include "formats.h"

namespace moebius {

// What a KV cache holds: numbers of a Dtype, or codes of 8 bits with a scale for each token and head.
enum CacheType { BF16_CACHE = BF16, F32_CACHE = F32, INT8_CACHE = 2 };
enum ActivationKind { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, CLAMPED_SWIGLU = 4, RELU_SQUARED = 5 };

// How an expert's gate and up become one: act(gate) * up; or, of CLAMPED_SWIGLU, (u + 1) * g * sigmoid(alpha * g), with g the gate,
// at most `limit`, and u the up between -limit and limit.
struct Activation {
    ActivationKind kind;
    float alpha, limit;

    Activation(ActivationKind kind, float alpha = 0, float limit = 0) : kind(kind), alpha(alpha), limit(limit) {}
};

// What the gates of heads go through.
enum GateFunction { SILU_GATE = 0, SIGMOID_GATE = 1, SOFTPLUS_GATE = 2, IDENTITY_GATE = 3 };

// A norm's weight is of its row's dtype; or, beside bfloat16, float32, and then nothing is rounded before the product with it.
struct NormWeight {
    const void* values;  // or null, where there may be none
    Dtype dtype;
};

// Keys of a tile of attention, at absolute positions i * KEY_TILE; a constant of the kernel (P1).
constexpr int KEY_TILE = 64;
// Long contexts are summed in splits at absolute positions i * KEY_SPLIT, combined in order.
constexpr int KEY_SPLIT = 1024;
// Terms of a softmax over the vocabulary that are summed in float32; the sums of blocks are summed in float64.
constexpr int SUM_BLOCK = 1024;
// Keys that lie next to each other in the layout that the attention kernel reads.
constexpr int KEY_LANES = 16;

// One layer's KV cache, (block, kv head) after (block, kv head):
//   k  [key_dim / g][block_size] groups, g elements a group     v  [ceil(block_size / g)][padded_dim] groups over tokens
// so that the lanes of a vector are keys in q k^T and dimensions of values in p v. padded_dim is value_dim rounded up to 16.
// Groups are 32 bits, but of codes 16, pairs of them; behind these lie the scales of the keys and of the values in float16,
// [block_size] each. Where they are shared there are no v: a token's value is the first value_dim numbers of its key.
struct CacheShape {
    int block_size, kv_heads, key_dim, value_dim, padded_dim;
    CacheType type;
    bool shared;
    int per_group;
    size_t k_groups, v_groups;  // of one (block, kv head)
    size_t stride;              // bytes from one block to the next, in between which others may lie

    CacheShape(int block_size, int kv_heads, int key_dim, int value_dim, CacheType type, bool shared = false, size_t stride = 0)
        : block_size(block_size), kv_heads(kv_heads), key_dim(key_dim), value_dim(value_dim), padded_dim((value_dim + 15) / 16 * 16),
          type(type), shared(shared), per_group(type == F32_CACHE ? 1 : 2),
          k_groups(size_t(block_size) * ((key_dim + per_group - 1) / per_group)),
          v_groups(shared ? 0 : size_t((block_size + per_group - 1) / per_group) * padded_dim), stride(stride ? stride : block_bytes()) {}
    size_t head_bytes() const {  // of one (block, kv head)
        const size_t groups = k_groups + v_groups;
        return type == INT8_CACHE ? (2 * groups + 4 * block_size + 3) / 4 * 4 : 4 * groups;
    }
    size_t block_bytes() const { return head_bytes() * kv_heads; }
    size_t head_at(size_t block, int head) const { return block * stride + head * head_bytes(); }  // in bytes
};

// Some rows of one sequence and one kv head: `queries` consecutive tokens with `group` query heads each.
struct AttentionBlock {
    const void* q;           // (tokens, q_heads, key_dim) at the first query's first head of the group
    void* out;               // (tokens, q_heads, value_dim) at the same place
    size_t q_stride, out_stride;  // elements between tokens
    int queries, group;
    int first_position;      // of the first query
    int window;              // 0: none; else a query at p sees p - window + 1 .. p
    float scale, softcap;    // softcap 0: none
    const float* sinks;      // of the group's heads, or null
    const uint32_t* cache;   // the layer's
    const int32_t* block_table;
    int kv_head;
    int split = -1;          // -1: all keys; else only those of this split, and the rows' states stay in scratch
    const float* key_offset = nullptr;  // (key_dim,): what codes of keys were made less, where it is to be added back
    float* room = nullptr;   // for all of the scratch but the rows' states; else that is behind these
    int first_key = 0;   // no row sees a key before
    int last_key = -1;   // of an encoder, and of what it gives: all rows see the keys up to this one, wherever they are themselves
    // What is added to the score of a key d behind the query (before it: d < 0), of the group's first head bias[d], of the next
    // bias_stride further; farther than `reach` as there. Or null.
    const float* bias = nullptr;
    size_t bias_stride = 0;
    int reach = 0;
};

// The scales of n rows of codes, of so many columns each: those of row j begin at rows[j].
struct Fp8Scales {
    const float* const* rows;
    int columns;
    float smaller;  // how many times smaller widened codes are

    float of(int row, int block) const { return rows[row][block] * smaller; }
};

// How layers of a dtype meet codes of FP8 (fp8.h): as rows of x of `x`, and codes widened to `widened`, each so many times
// smaller.
struct Fp8Kernels {
    Dtype x;
    Format widened;
    float smaller;
    void (*widen)(const uint8_t* codes, int n, uint16_t* to);
    // The products of m rows of x, packed block by block where `pack` is, with n rows of k codes where they lie, to the bit those
    // with widened ones. Null where there is none.
    void (*product)(const void* const* x, int m, const void* w, int n, int k, const Fp8Scales& scales, const void* next, float* c, int ldc);
};

// Some channels of one sequence's rows, convolved over time. Strides are elements between rows.
struct ConvSequence {
    const void* x;
    size_t x_stride;
    int rows, channels, taps;
    const float* weights;  // (taps, channels), the oldest input's first
    const float* bias;     // (channels,) or null
    void* state;           // taps - 1 rows: the inputs before, oldest first, and then the last ones; or null for zeros
    size_t stride;         // of state and out
    bool silu;
    void* out;
};

// How fast channels of keys decay by themselves: by decay * softplus(f), or, below `lower`'s zero, by lower * sigmoid(-decay * f).
struct ChannelDecay {
    float lower = 0;       // 0: the former
    bool rounded = false;  // to the dtype of f, before its exponential is taken
};

// Rows of one sequence and one value head, by the gated delta rule: some columns of its state.
struct DeltaHead {
    const void *q, *k, *v;  // at the head's values of the first row, v at the first column
    size_t qkv_stride;
    const void *b, *a;      // its gates of the first row
    size_t gates_stride;
    int rows, key_dim, columns;
    float decay, dt_bias;
    float* state;           // (key_dim, columns), state_stride floats between rows
    size_t state_stride;
    const float* next;      // where the state lies that will be read after this one, or null
    void* out;              // at the first column
    size_t out_stride;
    // Where channels decay by themselves, instead of a and dt_bias: at the head's first one, of the first row.
    const void* channels;
    size_t channels_stride;
    const float* channel_bias;  // (key_dim,)
    ChannelDecay channel_decay;
};
// Rows whose queries, keys and gates are made ready at a time: as many as there are lanes.
constexpr int DELTA_ROWS = 16;
inline size_t delta_scratch(int key_dim, bool channels = false) { return size_t(channels ? 4 : 2) * DELTA_ROWS * key_dim; }

// Rows of one sequence and one head of a selective state space (Mamba 2): some columns of its state.
struct ScanHead {
    const void *x, *b, *c;  // of the first row: the head's x at the first column, and its group's B and C
    size_t xbc_stride;
    const void* dt;         // the head's of the first row
    size_t dt_stride;
    int rows, state_dim, columns;
    float decay, dt_bias, skip;
    float* state;           // (state_dim, columns), state_stride floats between rows
    size_t state_stride;
    const float* next;      // where the state lies that will be read after this one, or null
    void* out;              // at the first column
    size_t out_stride;
};

struct Kernels {
    const char* name;

    // Null where `product` reads rows of x as they lie; else re-packs m rows, and `product` takes one pointer, to the result.
    void (*pack[2])(const void* const* x, int m, int k, void* to);
    // c[i][j] = sum_k x[i][k] w[j][k] for m rows of x and n consecutive rows of w, ldw elements apart. `next` is where the
    // weights lie that will be read after these, or null. Null where a format is not read in a dtype.
    void (*product[2][DENSE_FORMATS])(const void* const* x, int m, const void* w, size_t ldw, int n, int k, const void* next, float* c, int ldc);
    // The same, from rows of x as they lie, summed in the order of every instruction set (ordered_product.h).
    void (*ordered[2][DENSE_FORMATS])(const void* const* x, int m, const void* w, int n, int k, float* c, int ldc);
    Fp8Kernels fp8[2];  // for layers of each dtype
    // Products with weights in blocks.
    const BlockKernels* blocks;
    // out = round(multiplier * row) of n values of a matrix of plain numbers, or of a row of blocks that was widened to float32
    void (*scaled_row[2][DENSE_FORMATS])(const void* row, float multiplier, int n, void* out);
    // out = round(c + bias); bias may be null.
    void (*store[2])(const float* c, int n, const void* bias, void* out);
    // c += bias
    void (*add_bias[2])(float* c, int n, const void* bias);
    // out = round(gate and up, joined)
    void (*gated[2])(const float* gate, const float* up, int n, const Activation& activation, void* out);
    // out = round(base + sum over k, in order, of weights[k] * rows[k]); base may be null.
    void (*combine[2])(const void* const* rows, const float* weights, int k, int n, const void* base, void* out);
    // sum = round(x + multiplier * update) where update is given (else sum is not written), times *scale where that is given, and
    // rounded again; out = norm(sum) * weight. Of norms there is one for each dtype of a row and of its weight; null for float32
    // with bfloat16. less_mean: of the sum less its mean.
    void (*rms_norm[2][2])(const void* x, const void* update, float multiplier, const float* scale, const void* weight, int n, float eps,
                           bool less_mean, void* sum, void* out);
    // One head: RMS norm where weight is given, then rotation of the first 2 * half values, in pairs of i and half + i, or
    // of 2i and 2i + 1 where they are interleaved; out may be x.
    void (*rotate[2][2])(const void* x, const void* weight, float eps, const float* cos, const float* sin, int half,
                         bool interleaved, int n, void* out);
    // The same without rounding, to float32.
    void (*rotate_wide[2][2])(const void* x, const void* weight, float eps, const float* cos, const float* sin, int half,
                              bool interleaved, int n, float* out);
    // Codes of n values less `less` (or null), as src/moebius/ops/reference/codes.py describes; returns their scale in float16.
    uint16_t (*quantise[2])(const void* x, const float* less, int n, int8_t* codes);
    void (*attention[2])(const AttentionBlock& block, const CacheShape& shape, float* scratch);
    void (*attention_int8[2])(const AttentionBlock& block, const CacheShape& shape, float* scratch);  // over codes
    // The rest of `attention` from the scratches of `count` consecutive splits, `stride` floats apart.
    void (*join_splits[2])(const AttentionBlock& block, const CacheShape& shape, float* scratch, size_t stride, int count);
    // Recurrent layers. Weights (channels, taps) of each dtype become what ConvSequence wants.
    void (*conv_weights[2])(const void* weight, int channels, int taps, float* out);
    void (*causal_conv[2])(const ConvSequence& s);
    void (*gated_delta[2])(const DeltaHead& d, float* scratch);
    void (*kimi_delta[2])(const DeltaHead& d, float* scratch);  // where channels decay by themselves
    void (*selective_scan[2])(const ScanHead& d, float* scratch);
    // Of each head of n values: out = norm(x) * weight, rounded where both are of one dtype, times gate(g), rounded.
    void (*gated_norm[2][2])(const void* x, const void* g, const void* weight, float eps, int heads, int n, GateFunction gate, void* out);
    // out = norm(x * silu(g)) * weight, of each group of n values by itself, rounded as by rms_norm. scratch: n floats.
    void (*grouped_norm[2][2])(const void* x, const void* g, const void* weight, float eps, int groups, int n, float* scratch, void* out);
    // out = round(x * round(gate(g))); `single`: one g for all n values.
    void (*gate_head[2])(const void* x, const void* g, int n, bool single, GateFunction gate, void* out);
    // Largest value (NaN where any value is not finite), its lowest index, and the sum of exp((x - largest) * factor)
    // where `sum` is given.
    void (*softmax_stats)(const float* x, int n, float factor, float* largest, int* at, double* sum);
    // out[i] = exp((x[i] - shift) * factor); returns their sum
    float (*exp_row)(const float* x, int n, float shift, float factor, float* out);
};

// Bytes that `pack` writes at most: tiles of 16 rows by 32 elements of bfloat16, or rows of so many steps of 32 floats.
inline size_t packed_bytes(int m, int k) {
    const size_t steps = (k + 31) / 32, tiles = size_t(m + 15) / 16 * steps * 1024, rows = m * steps * 128;
    return tiles > rows ? tiles : rows;
}

// Attention's scratch, in floats: the state of each row, rows in sixteens; a tile of gathered keys and values; and what AMX
// adds, queries and the ends of a tile filled up with zeros, or eight lanes, queries and a tile in float32.
inline size_t state_floats(const CacheShape& s) { return KEY_TILE + 16 + 2 * s.padded_dim; }
inline size_t states_floats(int rows, const CacheShape& s) { return size_t((rows + 15) / 16 * 16) * state_floats(s); }
inline size_t gathered_floats(const CacheShape& s) { return KEY_TILE * (s.key_dim + s.padded_dim); }
inline size_t attention_scratch(int rows, const CacheShape& s) {
    const size_t padded_key = (s.key_dim + 15) / 16 * 16;
    const size_t queries = size_t(rows + 15) / 16 * 16 * (padded_key + 8), ends = KEY_TILE * 16 + 8 * s.padded_dim;
    return states_floats(rows, s) + gathered_floats(s) + queries + ends + KEY_TILE * (padded_key + s.padded_dim);
}

void write_key(Dtype dtype, const CacheShape& shape, uint32_t* cache, const void* k, int64_t slot, int head);
void write_kv(Dtype dtype, const CacheShape& shape, uint32_t* cache, const void* k, const void* v, int64_t slot, int head);
// A row of codes and their scale.
struct Codes {
    const int8_t* codes;
    uint16_t scale;
};
void write_codes(const CacheShape& shape, void* cache, const Codes& k, const Codes& v, int64_t slot, int head);

// Each instruction set's, in its namespace, as all that is compiled for it. Not every build has all (CMakeLists.txt).
namespace portable { const Kernels* kernels(); }
namespace avx2 { const Kernels* kernels(); }
namespace avx512 { const Kernels* kernels(); }
namespace avx512vnni { const Kernels* kernels(); }
namespace avx512bf16 { const Kernels* kernels(); }
namespace amx { const Kernels* kernels(); }
namespace amx_emulated { const Kernels* kernels(); }  // for tests
namespace neon { const Kernels* kernels(); }

}  // namespace moebius
