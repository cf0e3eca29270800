// Recurrent layers on whole steps.
#include <algorithm>
#include <cstring>

#include "bytes.h"
#include "ops.h"

namespace moebius {
namespace {

constexpr int CONV_CHANNELS = 512;  // that one item convolves, at most

// Weights (channels, taps) as (taps, channels) in float32, of `count` channels from `first`; a bias is one of one tap.
void by_taps(const void* weight, Dtype dtype, int first, int count, int taps, float* out) {
    for (int i = 0; i < count; i++)
        for (int tap = 0; tap < taps; tap++) {
            const size_t from = size_t(first + i) * taps + tap;
            float& to = out[size_t(tap) * count + i];
            if (dtype == F32) {
                to = static_cast<const float*>(weight)[from];
                continue;
            }
            const uint32_t bits = uint32_t(static_cast<const uint16_t*>(weight)[from]) << 16;
            std::memcpy(&to, &bits, sizeof to);
        }
}

}  // namespace

int Ops::divided_columns(int columns, int items) const {
    int parts = 1;
    while (items * parts < few_items() && 32 * parts <= columns) parts *= 2;
    return ((columns + parts - 1) / parts + 15) / 16 * 16;
}

void Ops::causal_conv(const CausalConv& c) {
    std::lock_guard<std::mutex> only(one_caller_);
    const StepStates& step = *c.step;
    const size_t size = size_of(c.dtype), state_rows = c.taps - 1;
    const int most = divided_columns(std::min(c.channels, CONV_CHANNELS), (c.channels + CONV_CHANNELS - 1) / CONV_CHANNELS);
    pool_.run((c.channels + most - 1) / most, [&](int item, int thread) {
        const int first = item * most, count = std::min(most, c.channels - first);
        float *weights = scratch_[thread].need(size_t(c.taps + 1) * count), *bias = weights + size_t(c.taps) * count;
        by_taps(c.weight, c.weight_dtype, first, count, c.taps, weights);
        if (c.bias) by_taps(c.bias, c.bias_dtype, first, count, 1, bias);
        for (int b = 0; b < step.sequences(); b++) {
            const size_t row = step.query_start[b];
            ConvSequence s;
            s.x = at(c.x, (row * c.stride + first) * size), s.x_stride = c.stride;
            s.rows = step.query_start[b + 1] - step.query_start[b], s.channels = count, s.taps = c.taps;
            s.weights = weights, s.bias = c.bias ? bias : nullptr;
            s.state = step.kept ? at(c.state, (step.slots[b] * state_rows * c.channels + first) * size) : nullptr;
            s.stride = c.channels, s.silu = c.silu, s.out = at(c.out, (row * c.channels + first) * size);
            kernels_->causal_conv[c.dtype](s);
        }
    });
}

// One item for each sequence and value head; where these are few, for some of a head's columns.
void Ops::gated_delta(const GatedDelta& g) {
    std::lock_guard<std::mutex> only(one_caller_);
    const DeltaSizes& sizes = g.sizes;
    const StepStates& step = *g.step;
    const size_t size = size_of(g.dtype), of_a_head = size_t(sizes.key_dim) * sizes.value_dim;
    const int heads = step.sequences() * sizes.value_heads, columns = divided_columns(sizes.value_dim, heads);
    const int parts = (sizes.value_dim + columns - 1) / columns;
    pool_.run(heads * parts, [&](int item, int thread) {
        const int first = item % parts * columns, head = item / parts % sizes.value_heads, b = item / parts / sizes.value_heads;
        const int row = step.query_start[b], key = sizes.key_head(head) * sizes.key_dim, value = head * sizes.value_dim + first;
        const char *qkv = at(g.qkv, size_t(row) * sizes.qkv() * size), *gates = at(g.gates, size_t(row) * g.gates_stride * size);
        float* scratch = scratch_[thread].need(delta_scratch(sizes.key_dim) + (step.kept ? 0 : of_a_head));
        DeltaHead d;
        d.q = at(qkv, key * size), d.k = at(qkv, (sizes.key_heads * sizes.key_dim + key) * size);
        d.v = at(qkv, (sizes.values_at() + value) * size), d.qkv_stride = sizes.qkv();
        d.b = at(gates, head * size), d.a = at(gates, (sizes.value_heads + head) * size), d.gates_stride = g.gates_stride;
        d.rows = step.query_start[b + 1] - row, d.key_dim = sizes.key_dim, d.columns = std::min(columns, sizes.value_dim - first);
        d.decay = g.decay[head], d.dt_bias = g.dt_bias[head];
        d.state = scratch + delta_scratch(sizes.key_dim), d.state_stride = sizes.value_dim;
        if (step.kept) d.state = g.state + (size_t(step.slots[b]) * sizes.value_heads + head) * of_a_head + first;
        else std::fill_n(d.state, of_a_head, 0.0f);
        d.out = at(g.out, (size_t(row) * sizes.out() + value) * size), d.out_stride = sizes.out();
        kernels_->gated_delta[g.dtype](d, scratch);
    });
}

void Ops::gated_norm(const GatedNorm& n, int rows) {
    const size_t size = size_of(n.dtype), row_bytes = size_t(n.heads) * n.size * size, gates_bytes = n.gates_stride * size;
    const auto norm = kernels_->gated_norm[n.dtype][n.weight.dtype];
    pool_.run(rows, [&](int t, int) {
        norm(at(n.x, t * row_bytes), at(n.gates, t * gates_bytes), n.weight.values, n.eps, n.heads, n.size, n.function, at(n.out, t * row_bytes));
    });
}

void Ops::gate_heads(const GateHeads& g, int rows) {
    const size_t size = size_of(g.dtype), head_bytes = g.size * size, row_bytes = g.heads * head_bytes;
    pool_.run(rows, [&](int t, int) {
        for (int h = 0; h < g.heads; h++) {
            const void* gates = at(g.gates, (size_t(t) * g.gates_stride + size_t(h) * g.head_stride) * size);
            const size_t head = t * row_bytes + h * head_bytes;
            kernels_->gate_head[g.dtype](at(g.x, head), gates, g.size, g.single, g.function, at(g.out, head));
        }
    });
}

}  // namespace moebius
