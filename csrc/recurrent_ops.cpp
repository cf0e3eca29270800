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

namespace {

// The states of a step's sequences, (rows, columns) of each head. An item is of one sequence and head and, where these are few,
// of some columns.
struct StateItems {
    const StepStates& step;
    const int heads, rows, columns;
    const int most, parts;  // columns of an item, and how many items share a head's
    float* const states;

    StateItems(const StepStates& step, int heads, int rows, int columns, int most, float* states)
        : step(step), heads(heads), rows(rows), columns(columns), most(most), parts((columns + most - 1) / most), states(states) {}
    int count() const { return step.sequences() * heads * parts; }
    int sequence(int item) const { return item / parts / heads; }
    int head(int item) const { return item / parts % heads; }
    int column(int item) const { return item % parts * most; }
    int columns_of(int item) const { return std::min(most, columns - column(item)); }
    int first_row(int item) const { return step.query_start[sequence(item)]; }
    size_t of_a_head() const { return size_t(rows) * columns; }
    float* state(int item) const {
        return states + (size_t(step.slots[sequence(item)]) * heads + head(item)) * of_a_head() + column(item);
    }

    // What a kernel reads of an item; `zeros` has room for a head's state where none is kept.
    template <class Head> void set(Head& h, int item, float* zeros) const {
        h.rows = step.query_start[sequence(item) + 1] - first_row(item), h.columns = columns_of(item);
        h.state = step.kept ? state(item) : zeros, h.state_stride = columns;
        // While one row passes, the next state can come; while many do, it would only be in the way.
        h.next = step.kept && h.rows == 1 && item + 1 < count() ? state(item + 1) : nullptr;
        if (!step.kept) std::fill_n(h.state, of_a_head(), 0.0f);
    }
};

}  // namespace

void Ops::gated_delta(const GatedDelta& g) {
    std::lock_guard<std::mutex> only(one_caller_);
    const DeltaSizes& sizes = g.sizes;
    const StepStates& step = *g.step;
    const size_t size = size_of(g.dtype);
    const int heads = step.sequences() * sizes.value_heads;
    const StateItems items(step, sizes.value_heads, sizes.key_dim, sizes.value_dim, divided_columns(sizes.value_dim, heads), g.state);
    const auto kernel = g.channels ? kernels_->kimi_delta[g.dtype] : kernels_->gated_delta[g.dtype];
    const size_t ready = delta_scratch(sizes.key_dim, g.channels);
    pool_.run(items.count(), [&](int item, int thread) {
        const int head = items.head(item), row = items.first_row(item), key = sizes.key_head(head) * sizes.key_dim;
        const int value = head * sizes.value_dim + items.column(item);
        const char *qkv = at(g.qkv, size_t(row) * sizes.qkv() * size), *gates = at(g.gates, size_t(row) * g.gates_stride * size);
        float* scratch = scratch_[thread].need(ready + (step.kept ? 0 : items.of_a_head()));
        DeltaHead d;
        items.set(d, item, scratch + ready);
        d.q = at(qkv, key * size), d.k = at(qkv, (sizes.key_heads * sizes.key_dim + key) * size);
        d.v = at(qkv, (sizes.values_at() + value) * size), d.qkv_stride = sizes.qkv();
        d.b = at(gates, head * size), d.gates_stride = g.gates_stride;
        d.key_dim = sizes.key_dim, d.decay = g.decay[head];
        if (g.channels) {
            d.channels = at(g.channels, (size_t(row) * g.channels_stride + head * sizes.key_dim) * size), d.channels_stride = g.channels_stride;
            d.channel_bias = g.dt_bias + size_t(head) * sizes.key_dim, d.channel_decay = g.channel_decay;
        } else {
            d.a = at(gates, (sizes.value_heads + head) * size), d.dt_bias = g.dt_bias[head];
        }
        d.out = at(g.out, (size_t(row) * sizes.out() + value) * size), d.out_stride = sizes.out();
        kernel(d, scratch);
    });
}

void Ops::selective_scan(const SelectiveScan& s) {
    std::lock_guard<std::mutex> only(one_caller_);
    const ScanSizes& sizes = s.sizes;
    const StepStates& step = *s.step;
    const size_t size = size_of(s.dtype), ready = delta_scratch(sizes.state_dim);
    const int most = divided_columns(sizes.head_dim, step.sequences() * sizes.heads);
    const StateItems items(step, sizes.heads, sizes.state_dim, sizes.head_dim, most, s.state);
    pool_.run(items.count(), [&](int item, int thread) {
        const int head = items.head(item), row = items.first_row(item), value = head * sizes.head_dim + items.column(item);
        const char* xbc = at(s.xbc, size_t(row) * sizes.xbc() * size);
        float* scratch = scratch_[thread].need(ready + (step.kept ? 0 : items.of_a_head()));
        ScanHead h;
        items.set(h, item, scratch + ready);
        h.x = at(xbc, value * size), h.b = at(xbc, sizes.b_at(head) * size), h.c = at(xbc, sizes.c_at(head) * size);
        h.xbc_stride = sizes.xbc();
        h.dt = at(s.dt, (size_t(row) * s.dt_stride + head) * size), h.dt_stride = s.dt_stride;
        h.state_dim = sizes.state_dim, h.decay = s.decay[head], h.dt_bias = s.dt_bias[head], h.skip = s.skip[head];
        h.out = at(s.out, (size_t(row) * sizes.out() + value) * size), h.out_stride = sizes.out();
        kernels_->selective_scan[s.dtype](h, scratch);
    });
}

void Ops::grouped_norm(const GroupedNorm& n, int rows) {
    std::lock_guard<std::mutex> only(one_caller_);
    const size_t size = size_of(n.dtype), row_bytes = size_t(n.groups) * n.size * size, gates_bytes = n.gates_stride * size;
    const auto norm = kernels_->grouped_norm[n.dtype][n.weight.dtype];
    pool_.run(rows, [&](int t, int thread) {
        norm(at(n.x, t * row_bytes), at(n.gates, t * gates_bytes), n.weight.values, n.eps, n.groups, n.size, scratch_[thread].need(n.size),
             at(n.out, t * row_bytes));
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
