// What the operations of recurrent layers are given; as in ops.h, pointers are to contiguous row-major arrays of the caller's.
#pragma once
#include <vector>

#include "kernels.h"

namespace moebius {

// The sequences of a step: which rows are whose, and in which slots their states lie.
struct StepStates {
    std::vector<int32_t> query_start, slots;
    bool kept = false;   // else states begin as zeros, and are not kept: there are no slots
    int last_slot = -1;  // the largest number

    int sequences() const { return query_start.empty() ? 0 : int(query_start.size()) - 1; }
    int rows() const { return query_start.empty() ? 0 : query_start.back(); }
};

struct CausalConv {
    Dtype dtype;
    const StepStates* step;
    const void* x;  // at the first channel of the first row
    int stride;     // elements between rows
    int channels, taps;
    const void* weight;  // (channels, taps), the oldest input's first
    Dtype weight_dtype;
    const void* bias;    // (channels,) or null
    Dtype bias_dtype;
    void* state;         // (slots, taps - 1, channels), or null where none is kept
    bool silu;
    void* out;           // (rows, channels)
};

// How the heads of a gated delta layer lie in a row: queries, keys, values.
struct DeltaSizes {
    int key_heads, value_heads, key_dim, value_dim;
    bool tiled;  // value head h has key head h mod key_heads; else neighbours share one

    int key_head(int h) const { return tiled ? h % key_heads : h / (value_heads / key_heads); }
    int values_at() const { return 2 * key_heads * key_dim; }
    int out() const { return value_heads * value_dim; }
    int qkv() const { return values_at() + out(); }
};

struct GatedDelta {
    Dtype dtype;
    const StepStates* step;
    DeltaSizes sizes;
    const void* qkv;    // (rows, sizes.qkv())
    const void* gates;  // at b of the first value head in the first row; a of the first one behind the last one's b
    int gates_stride;   // elements between rows
    const float* decay;    // (value_heads,), like dt_bias
    const float* dt_bias;
    float* state;       // (slots, value_heads, key_dim, value_dim), or null where none is kept
    void* out;          // (rows, sizes.out())
    // Where channels decay by themselves: at the first one in the first row, instead of a; dt_bias is (value_heads, key_dim) then.
    const void* channels = nullptr;
    int channels_stride = 0;  // elements between rows
    ChannelDecay channel_decay = {};
};

// How the heads of a selective state space lie in a row: x, then B and C of each group, which as many heads share.
struct ScanSizes {
    int heads, head_dim, state_dim, groups;

    int out() const { return heads * head_dim; }
    int b_at(int head) const { return out() + head / (heads / groups) * state_dim; }
    int c_at(int head) const { return b_at(head) + groups * state_dim; }
    int xbc() const { return out() + 2 * groups * state_dim; }
};

struct SelectiveScan {
    Dtype dtype;
    const StepStates* step;
    ScanSizes sizes;
    const void* xbc;       // (rows, sizes.xbc())
    const void* dt;        // at that of the first head in the first row
    int dt_stride;         // elements between rows
    const float* decay;    // (heads,), like dt_bias and skip
    const float* dt_bias;
    const float* skip;
    float* state;          // (slots, heads, state_dim, head_dim), or null where none is kept
    void* out;             // (rows, sizes.out())
};

struct GatedNorm {
    Dtype dtype;
    const void* x;     // (rows, heads * size), like out
    const void* gates; // at the first value's in the first row
    int gates_stride;  // elements between rows
    NormWeight weight; // (size,)
    float eps;
    int heads, size;
    GateFunction function;
    void* out;
};

struct GroupedNorm {
    Dtype dtype;
    const void* x;      // (rows, groups * size), like out
    const void* gates;  // at the first value's in the first row
    int gates_stride;   // elements between rows
    NormWeight weight;  // (groups * size,)
    float eps;
    int groups, size;
    void* out;
};

struct GateHeads {
    Dtype dtype;
    const void* x;      // (rows, heads, size), like out
    int heads, size;
    const void* gates;  // at the first head's in the first row
    int gates_stride, head_stride;  // elements between rows, and between heads
    bool single;        // one gate a head
    GateFunction function;
    void* out;
};

}  // namespace moebius
