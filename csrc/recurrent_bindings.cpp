#include "recurrent_bindings.h"

#include <algorithm>

#include "bind_call.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moebius;

namespace {

// Throws std::invalid_argument for sequences that are not one behind the other, or share a state.
void set_step(StepStates& step, Address query_start, Address slots, int batch, bool kept) {
    const int32_t *starts = array<const int32_t>(query_start), *own = array<const int32_t>(slots);
    for (int b = 0; b < batch; b++)
        if (starts[0] != 0 || starts[b + 1] < starts[b]) throw std::invalid_argument("a step's sequences are not one behind the other");
    step.query_start.assign(starts, starts + batch + 1);
    step.kept = kept;
    step.slots.clear(), step.last_slot = -1;
    if (!kept) return;
    step.slots.assign(own, own + batch);
    std::vector<int32_t> sorted = step.slots;
    std::sort(sorted.begin(), sorted.end());
    if (!sorted.empty() && sorted.front() < 0) throw std::invalid_argument("slot " + std::to_string(sorted.front()) + " is none");
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) throw std::invalid_argument("two sequences have their states in slot " + std::to_string(*twice));
    if (!sorted.empty()) step.last_slot = sorted.back();
}

// Throws std::out_of_range for a slot that the states have not, std::invalid_argument for other rows than the plan's, or where
// it keeps states and there are none.
void check_step(const StepStates& step, int rows, bool given, int slots) {
    if (rows != step.rows()) throw std::invalid_argument(std::to_string(rows) + " rows, where states were planned for " + std::to_string(step.rows()));
    if (step.kept && !given) throw std::invalid_argument("the step's states are kept, and none are given");
    if (step.last_slot >= slots) throw std::out_of_range("slot " + std::to_string(step.last_slot) + " is none of " + std::to_string(slots));
}

struct CausalConvCall : CausalConv {
    int slots;
    void operator()(Ops& ops, int rows) const {
        check_step(*step, rows, state || taps == 1, slots);
        ops.causal_conv(*this);
    }
};

struct GatedDeltaCall : GatedDelta {
    int slots;
    void operator()(Ops& ops, int rows) const {
        check_step(*step, rows, state, slots);
        ops.gated_delta(*this);
    }
};

struct SelectiveScanCall : SelectiveScan {
    int slots;
    void operator()(Ops& ops, int rows) const {
        check_step(*step, rows, state, slots);
        ops.selective_scan(*this);
    }
};

struct GroupedNormCall : GroupedNorm {
    void operator()(Ops& ops, int rows) const { ops.grouped_norm(*this, rows); }
};

struct GatedNormCall : GatedNorm {
    void operator()(Ops& ops, int rows) const { ops.gated_norm(*this, rows); }
};

struct GateHeadsCall : GateHeads {
    void operator()(Ops& ops, int rows) const { ops.gate_heads(*this, rows); }
};

}  // namespace

void bind_recurrent(nb::module_& m) {
    using V = void;
    nb::class_<StepStates>(m, "StepStates")
        .def(nb::init<>())
        .def("set", &set_step, nb::kw_only(), "query_start"_a, "slots"_a, "batch"_a, "kept"_a);
    bind_call<CausalConvCall>(m, "CausalConv", [](CausalConvCall* self, int dtype, const StepStates& step, Address x, int stride, int channels,
                                                  int taps, Address weight, int weight_dtype, Address bias, int bias_dtype, Address state,
                                                  int slots, bool silu, Address out) {
        new (self) CausalConvCall{{Dtype(dtype), &step, array<V>(x), stride, channels, taps, array<V>(weight), Dtype(weight_dtype),
                                   array<V>(bias), Dtype(bias_dtype), array<V>(state), silu, array<V>(out)}, slots};
    }, "dtype"_a, "step"_a, "x"_a, "stride"_a, "channels"_a, "taps"_a, "weight"_a, "weight_dtype"_a, "bias"_a, "bias_dtype"_a, "state"_a,
       "slots"_a, "silu"_a, "out"_a);
    bind_call<GatedDeltaCall>(m, "GatedDelta", [](GatedDeltaCall* self, int dtype, const StepStates& step, int key_heads, int value_heads,
                                                  int key_dim, int value_dim, bool tiled, Address qkv, Address gates, int gates_stride,
                                                  Address decay, Address dt_bias, Address state, int slots, Address out, Address channels,
                                                  int channels_stride, float lower, bool rounded) {
        new (self) GatedDeltaCall{{Dtype(dtype), &step, {key_heads, value_heads, key_dim, value_dim, tiled}, array<V>(qkv), array<V>(gates),
                                   gates_stride, array<float>(decay), array<float>(dt_bias), array<float>(state), array<V>(out),
                                   array<V>(channels), channels_stride, {lower, rounded}}, slots};
    }, "dtype"_a, "step"_a, "key_heads"_a, "value_heads"_a, "key_dim"_a, "value_dim"_a, "tiled"_a, "qkv"_a, "gates"_a, "gates_stride"_a,
       "decay"_a, "dt_bias"_a, "state"_a, "slots"_a, "out"_a, "channels"_a = 0, "channels_stride"_a = 0, "lower"_a = 0.0f, "rounded"_a = false);
    bind_call<SelectiveScanCall>(m, "SelectiveScan", [](SelectiveScanCall* self, int dtype, const StepStates& step, int heads, int head_dim,
                                                        int state_dim, int groups, Address xbc, Address dt, int dt_stride, Address decay,
                                                        Address dt_bias, Address skip, Address state, int slots, Address out) {
        new (self) SelectiveScanCall{{Dtype(dtype), &step, {heads, head_dim, state_dim, groups}, array<V>(xbc), array<V>(dt), dt_stride,
                                      array<float>(decay), array<float>(dt_bias), array<float>(skip), array<float>(state), array<V>(out)},
                                     slots};
    }, "dtype"_a, "step"_a, "heads"_a, "head_dim"_a, "state_dim"_a, "groups"_a, "xbc"_a, "dt"_a, "dt_stride"_a, "decay"_a, "dt_bias"_a,
       "skip"_a, "state"_a, "slots"_a, "out"_a);
    bind_call<GroupedNormCall>(m, "GroupedNorm", [](GroupedNormCall* self, int dtype, Address x, Address gates, int gates_stride, Address weight,
                                                    int weight_dtype, float eps, int groups, int size, Address out) {
        new (self) GroupedNormCall{{Dtype(dtype), array<V>(x), array<V>(gates), gates_stride, norm_weight(dtype, weight, weight_dtype), eps,
                                    groups, size, array<V>(out)}};
    }, "dtype"_a, "x"_a, "gates"_a, "gates_stride"_a, "weight"_a, "weight_dtype"_a, "eps"_a, "groups"_a, "size"_a, "out"_a);
    bind_call<GatedNormCall>(m, "GatedNorm", [](GatedNormCall* self, int dtype, Address x, Address gates, int gates_stride, Address weight,
                                                int weight_dtype, float eps, int heads, int size, int function, Address out) {
        new (self) GatedNormCall{{Dtype(dtype), array<V>(x), array<V>(gates), gates_stride, norm_weight(dtype, weight, weight_dtype), eps,
                                  heads, size, GateFunction(function), array<V>(out)}};
    }, "dtype"_a, "x"_a, "gates"_a, "gates_stride"_a, "weight"_a, "weight_dtype"_a, "eps"_a, "heads"_a, "size"_a, "function"_a, "out"_a);
    bind_call<GateHeadsCall>(m, "GateHeads", [](GateHeadsCall* self, int dtype, Address x, int heads, int size, Address gates, int gates_stride,
                                                int head_stride, bool single, int function, Address out) {
        new (self) GateHeadsCall{{Dtype(dtype), array<V>(x), heads, size, array<V>(gates), gates_stride, head_stride, single,
                                  GateFunction(function), array<V>(out)}};
    }, "dtype"_a, "x"_a, "heads"_a, "size"_a, "gates"_a, "gates_stride"_a, "head_stride"_a, "single"_a, "function"_a, "out"_a);
}
