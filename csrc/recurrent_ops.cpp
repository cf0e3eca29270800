// Recurrent layers on whole steps.
#include <algorithm>

#include "bytes.h"
#include "ops.h"

namespace moebius {

constexpr int CONV_CHANNELS = 512;  // that one item convolves, at most

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
        kernels_->conv_weights[c.weight_dtype](at(c.weight, size_t(first) * c.taps * size_of(c.weight_dtype)), count, c.taps, weights);
        if (c.bias) kernels_->conv_weights[c.bias_dtype](at(c.bias, first * size_of(c.bias_dtype)), count, 1, bias);
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
    // The columns of a state that are an item's.
    auto state_of = [&](int item) {
        const int of_a_sequence = parts * sizes.value_heads, b = item / of_a_sequence, within = item % of_a_sequence;
        return g.state + size_t(step.slots[b]) * sizes.value_heads * of_a_head + within / parts * of_a_head + within % parts * columns;
    };
    const int items = heads * parts;
    pool_.run(items, [&](int item, int thread) {
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
        d.state = step.kept ? state_of(item) : scratch + delta_scratch(sizes.key_dim), d.state_stride = sizes.value_dim;
        // While one row passes, the next state can come; while many do, it would only be in the way.
        d.next = step.kept && d.rows == 1 && item + 1 < items ? state_of(item + 1) : nullptr;
        if (!step.kept) std::fill_n(d.state, of_a_head, 0.0f);
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
