// moebius._cpu: what ops/cpu calls. Each operation on rows is a record whose fields are named on both sides; it is run at once
// or noted in a program. Arrays come as addresses: a tensor's data_ptr() costs a tenth of a conversion, and a decoder makes
// some eight calls a layer. ops/cpu checks dtypes, shapes and contiguity. What computes releases the GIL.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind_call.h"
#include "exchange_bindings.h"
#include "latent_bindings.h"
#include "recurrent_bindings.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moebius;

namespace {

using Addresses = std::vector<Address>;

std::vector<const void*> pointers(const Addresses& addresses) {
    std::vector<const void*> p;
    for (Address a : addresses) p.push_back(array<const void>(a));
    return p;
}

using Matrices = std::vector<Matrix>;

// The scales of codes, and zero points of signed ones, int8, or biases, or neither; block_columns share one.
void set_groups(Matrix& w, Address scales, int scale_type, int block_columns, Address zeros, bool copy_zeros, Address biases) {
    const int elements = FORMAT_SIZES[w.format].elements;
    const bool good = scales && block_columns > 0 && block_columns % elements == 0 && w.columns % block_columns == 0;
    if (!good) throw std::invalid_argument("codes need scales of groups, each of whole blocks of a row");
    if (scale_type < 0 || scale_type >= SCALE_TYPES || (scale_type == E8M0_SCALES) != (w.format == MXFP4_PLANES))
        throw std::invalid_argument("scales of this type are read with other codes");
    if ((biases != 0) != is_affine(w.format)) throw std::invalid_argument("affine codes alone need biases");
    if (zeros && w.format != INT4) throw std::invalid_argument("zero points are read with codes of four bits alone");
    w.groups = {ScaleType(scale_type), block_columns / elements, array<const void>(scales), array<const int8_t>(zeros),
                array<const void>(biases)};
    if (!zeros || !copy_zeros) return;
    const int8_t* from = array<const int8_t>(zeros);
    w.zeros = std::make_shared<const std::vector<int8_t>>(from, from + int64_t(w.rows) * (w.columns / block_columns));
    w.groups.zeros = w.zeros->data();
}

// Which column each is, int32: all of them.
void set_order(Matrix& w, Address order) {
    if (!has_planes(w.format)) throw std::invalid_argument("columns of codes with scales beside them alone have an order of their own");
    const int32_t* from = array<const int32_t>(order);
    w.order = std::make_shared<const std::vector<int32_t>>(from, from + w.columns);
    std::vector<bool> seen(w.columns);
    for (int32_t column : *w.order) {
        if (column < 0 || column >= w.columns || seen[column]) throw std::invalid_argument("an order of columns has to name each of them once");
        seen[column] = true;
    }
}

// Numbers the orders of matrices that the same rows meet, those that are equal alike.
template <class Each> void number_orders(const std::vector<Each*>& matrices) {
    int numbers = 0;
    for (size_t i = 0; i < matrices.size(); i++) {
        Matrix& w = *matrices[i];
        if (!w.order) continue;
        for (size_t j = 0; j < i && !w.order_number; j++)
            if (matrices[j]->order && *matrices[j]->order == *w.order) w.order = matrices[j]->order, w.order_number = matrices[j]->order_number;
        if (!w.order_number) w.order_number = ++numbers;
    }
}

// scales: of FP8 float32, of which a copy is kept.
Matrix make_matrix(int format, int rows, int columns, Address data, Address scales, int block_rows, int block_columns, int scale_type,
                   Address zeros, bool copy_zeros, Address biases, Address order) {
    Matrix w{Format(format), rows, columns, array<const void>(data)};
    if (has_planes(w.format)) set_groups(w, scales, scale_type, block_columns, zeros, copy_zeros, biases);
    if (order) set_order(w, order);
    if (w.format != FP8) return w;
    if (!scales || block_rows < 1 || block_columns < 1) throw std::invalid_argument("codes of FP8 need scales, and the sizes of their blocks");
    w.block_rows = block_rows, w.block_columns = block_columns;
    const float* from = array<const float>(scales);
    const int64_t count = (int64_t(rows) + block_rows - 1) / block_rows * w.scales_of_a_row();
    w.scales = std::make_shared<const std::vector<float>>(from, from + count);
    return w;
}

// Throws std::invalid_argument for a matrix of other columns, or in a format that has no kernels. wide: rows may be widened for it.
void require_product(Dtype dtype, const Matrix& w, int columns, bool wide = false) {
    if (w.columns != columns) throw std::invalid_argument("a matrix of " + std::to_string(w.columns) + " columns where the input has " + std::to_string(columns));
    if (w.format < 0 || w.format >= ALL_FORMATS || !(reads(dtype, w.format) || (wide && w.format == F32_MATRIX))) throw std::invalid_argument("no kernel reads this format in this dtype");
    if (w.columns % FORMAT_SIZES[w.format].elements) throw std::invalid_argument("rows of " + std::to_string(w.columns) + " elements are no whole blocks");
}

// Throws std::invalid_argument for other than `count` matrices (rows, columns), or so many biases or none.
void require_experts(Dtype dtype, size_t count, const Matrices& matrices, int rows, int columns, const Addresses& biases) {
    for (const Matrix& w : matrices) {
        require_product(dtype, w, columns);
        if (w.rows != rows) throw std::invalid_argument("an expert's matrix of " + std::to_string(w.rows) + " rows where the first one's sizes ask for " + std::to_string(rows));
    }
    if (matrices.size() != count || (biases.size() != count && !biases.empty()))
        throw std::invalid_argument("not as many matrices or biases of each kind as there are experts, " + std::to_string(count));
}

Experts make_experts(int dtype, int hidden, int width, const Activation& activation, const Matrices& gate, const Matrices& up, const Matrices& down,
                     const Addresses& gate_bias, const Addresses& up_bias, const Addresses& down_bias, bool on_disk, bool interleaved) {
    require_experts(Dtype(dtype), gate.size(), gate, interleaved ? 2 * width : width, hidden, gate_bias);
    if (interleaved && (!up.empty() || up_bias.size() != gate_bias.size()))
        throw std::invalid_argument("rows of gate and up that take turns are one matrix, with as many biases of each");
    if (!interleaved && (!up.empty() || !up_bias.empty())) require_experts(Dtype(dtype), gate.size(), up, width, hidden, up_bias);
    require_experts(Dtype(dtype), gate.size(), down, hidden, width, down_bias);
    bool holes = false;
    for (const Matrix& w : gate) holes |= w.data == nullptr;
    Experts e{Dtype(dtype), hidden, width, activation, gate, up, down, pointers(gate_bias), pointers(up_bias), pointers(down_bias), holes, on_disk, interleaved};
    for (size_t i = 0; i < e.gate.size(); i++) {
        if (e.up.empty()) number_orders<Matrix>({&e.gate[i]});
        else number_orders<Matrix>({&e.gate[i], &e.up[i]});
        number_orders<Matrix>({&e.down[i]});
    }
    return e;
}

// Throws std::invalid_argument for a sequence whose tokens its table has no blocks for, or a row that sees no key.
void set_step(StepAttention& step, Address query_start, Address seq_lens, Address block_table, int batch, int width, Address first_keys,
              bool whole) {
    const int32_t *starts = array<const int32_t>(query_start), *lens = array<const int32_t>(seq_lens);
    const int32_t* firsts = array<const int32_t>(first_keys);
    const int32_t* table = array<const int32_t>(block_table);
    for (int b = 0; b < batch; b++) {
        const int rows = starts[b + 1] - starts[b], seen = whole ? 1 : rows, first = firsts ? firsts[b] : 0;
        if (rows >= 0 && starts[0] == 0 && first >= 0 && first <= lens[b] - seen && lens[b] <= int64_t(width) * step.block_size) continue;
        throw std::invalid_argument("a sequence of " + std::to_string(lens[b]) + " tokens, " + std::to_string(rows) + " of them new, in " +
                                    std::to_string(width) + " blocks of " + std::to_string(step.block_size));
    }
    step.query_start.assign(starts, starts + batch + 1);
    step.seq_lens.assign(lens, lens + batch);
    step.block_table.assign(table, table + size_t(batch) * width);
    step.table_width = width, step.last_block = -1;
    for (int32_t block : step.block_table) step.last_block = std::max(step.last_block, block);
    step.first_keys.assign(firsts, firsts ? firsts + batch : firsts);
    step.whole = whole;
}

Linear make_linear(int dtype, const Matrices& weights, const Addresses& biases) {
    Linear l{Dtype(dtype), weights.at(0).columns, 0, {}};
    for (size_t i = 0; i < weights.size(); i++) {
        require_product(l.dtype, weights[i], l.in, true);
        l.layers.push_back({weights[i], array<const void>(biases.at(i)), l.out});
        l.out += weights[i].rows;
    }
    std::vector<Matrix*> all;
    for (Linear::Layer& layer : l.layers) all.push_back(&layer.weight);
    number_orders(all);
    return l;
}

struct Embed {
    Dtype dtype;
    Matrix table;
    float multiplier;
    const int64_t* ids;
    void* out;
    void operator()(Ops& ops, int rows) const { ops.embed(dtype, table, ids, rows, multiplier, out); }
};

struct LinearCall {
    const Linear* layers;
    const void* x;
    bool wide;
    void* out;
    void operator()(Ops& ops, int rows) const { ops.linear(*layers, x, rows, out, wide); }
};

struct ExpertsCall {
    const Experts* experts;
    const void* x;
    const float* weights;
    const int64_t* ids;
    int top_k;
    void *inner, *outer, *out;
    void operator()(Ops& ops, int rows) const { ops.experts(*experts, x, rows, weights, ids, top_k, inner, outer, out); }
};

struct ExpertRows {
    const Experts* experts;
    const void* x;
    const int64_t* ids;
    int top_k;
    void *inner, *out;
    void operator()(Ops& ops, int rows) const { ops.expert_rows(*experts, x, rows, ids, top_k, inner, out); }
};

struct Combine {
    Dtype dtype;
    const void* x;
    const float* weights;
    int top_k, size;
    void* out;
    void operator()(Ops& ops, int rows) const { ops.combine(dtype, x, weights, rows, top_k, size, out); }
};

struct AddGated {
    Dtype dtype;
    const void *a, *b;
    const float* gate;
    int size;
    void* out;
    void operator()(Ops& ops, int rows) const { ops.add_gated(dtype, a, b, gate, rows, size, out); }
};

struct Rotation {
    const int64_t* positions;
    const float* inverse;
    int half;
    float factor;
    float *cos, *sin;
    void operator()(Ops& ops, int rows) const { ops.rotation(positions, rows, inverse, half, factor, cos, sin); }
};

struct Divide {
    const float* x;
    int size;
    float divisor;
    float* out;
    void operator()(Ops& ops, int rows) const { ops.divide(x, rows, size, divisor, out); }
};

struct Softcap {
    const float* x;
    int size;
    float cap;
    float* out;
    void operator()(Ops& ops, int rows) const { ops.softcap(x, rows, size, cap, out); }
};

struct Route {
    const RouterSettings* settings;
    const float *logits, *bias, *expert_scale;
    float* weights;
    int64_t* ids;
    RouterTally tally;
    void operator()(Ops& ops, int rows) const { ops.route(*settings, logits, rows, bias, expert_scale, weights, ids, tally); }
};

struct WithinCapacityCall : WithinCapacity {
    // Throws std::invalid_argument for other rows than the plan's.
    void operator()(Ops& ops, int rows) const {
        if (rows != step->rows()) throw std::invalid_argument(std::to_string(rows) + " rows, where sequences of " + std::to_string(step->rows()) + " were planned");
        ops.within_capacity(*this);
    }
};

struct RmsNormCall : RmsNorm {
    void operator()(Ops& ops, int rows) const { ops.rms_norm(*this, rows); }
};

struct ClipCall : Clip {
    void operator()(Ops& ops, int rows) const { ops.clip(*this, rows); }
};

struct RotateAndStoreCall : RotateAndStore {
    int blocks;
    // Throws std::out_of_range for a slot that the cache has not.
    void operator()(Ops& ops, int rows) const {
        const int64_t count = int64_t(blocks) * shape->block_size;
        for (int t = 0; t < rows; t++)
            if (slots[t] < 0 || slots[t] >= count) throw std::out_of_range("slot " + std::to_string(slots[t]) + " is none of " + std::to_string(count));
        ops.rotate_and_store(*this, rows);
    }
};

struct AttentionCall : Attention {
    int blocks;
    // Throws std::out_of_range for a block that the cache has not, std::invalid_argument for other rows than the
    // plan's, or blocks of another size.
    void operator()(Ops& ops, int rows) const {
        if (step->last_block >= blocks) throw std::out_of_range("block " + std::to_string(step->last_block) + " is none of " + std::to_string(blocks));
        if (step->block_size != shape->block_size) throw std::invalid_argument("attention was planned for blocks of " + std::to_string(step->block_size) + " tokens, not " + std::to_string(shape->block_size));
        if (shape->shared && step->window) throw std::invalid_argument("attention to latents has no window");
        const int planned = step->query_start.empty() ? 0 : step->query_start.back();
        if (rows != planned) throw std::invalid_argument(std::to_string(rows) + " rows of queries, where attention was planned for " + std::to_string(planned));
        ops.attention(*this);
    }
};

void bind_calls(nb::module_& m) {
    using V = void;
    bind_call<Embed>(m, "Embed", [](Embed* self, int dtype, const Matrix& table, float multiplier, Address ids, Address out) {
        require_product(Dtype(dtype), table, table.columns);
        new (self) Embed{Dtype(dtype), table, multiplier, array<int64_t>(ids), array<V>(out)};
    }, "dtype"_a, "table"_a, "multiplier"_a, "ids"_a, "out"_a);
    bind_call<LinearCall>(m, "LinearCall", [](LinearCall* self, const Linear& layers, Address x, bool wide, Address out) {
        new (self) LinearCall{&layers, array<V>(x), wide, array<V>(out)};
    }, "layers"_a, "x"_a, "wide"_a, "out"_a);
    bind_call<ExpertsCall>(m, "ExpertsCall", [](ExpertsCall* self, const Experts& experts, Address x, Address weights, Address ids, int top_k,
                                                Address inner, Address outer, Address out) {
        new (self) ExpertsCall{&experts, array<V>(x), array<float>(weights), array<int64_t>(ids), top_k, array<V>(inner), array<V>(outer),
                               array<V>(out)};
    }, "experts"_a, "x"_a, "weights"_a, "ids"_a, "top_k"_a, "inner"_a, "outer"_a, "out"_a);
    bind_call<ExpertRows>(m, "ExpertRows", [](ExpertRows* self, const Experts& experts, Address x, Address ids, int top_k, Address inner,
                                              Address out) {
        new (self) ExpertRows{&experts, array<V>(x), array<int64_t>(ids), top_k, array<V>(inner), array<V>(out)};
    }, "experts"_a, "x"_a, "ids"_a, "top_k"_a, "inner"_a, "out"_a);
    bind_call<Combine>(m, "Combine", [](Combine* self, int dtype, Address x, Address weights, int top_k, int size, Address out) {
        new (self) Combine{Dtype(dtype), array<V>(x), array<float>(weights), top_k, size, array<V>(out)};
    }, "dtype"_a, "x"_a, "weights"_a, "top_k"_a, "size"_a, "out"_a);
    bind_call<AddGated>(m, "AddGated", [](AddGated* self, int dtype, Address a, Address b, Address gate, int size, Address out) {
        new (self) AddGated{Dtype(dtype), array<V>(a), array<V>(b), array<float>(gate), size, array<V>(out)};
    }, "dtype"_a, "a"_a, "b"_a, "gate"_a, "size"_a, "out"_a);
    bind_call<RmsNormCall>(m, "RmsNorm", [](RmsNormCall* self, int dtype, Address x, Address update, float multiplier, Address weight, int weight_dtype,
                                            int size, int stride, float eps, Address sum, Address out, bool less_mean, Address scale) {
        new (self) RmsNormCall{{Dtype(dtype), array<V>(x), array<V>(update), multiplier, norm_weight(dtype, weight, weight_dtype), size, stride,
                                eps, array<V>(sum), array<V>(out), less_mean, array<float>(scale)}};
    }, "dtype"_a, "x"_a, "update"_a, "multiplier"_a, "weight"_a, "weight_dtype"_a, "size"_a, "stride"_a, "eps"_a, "sum"_a, "out"_a, "less_mean"_a = false,
       "scale"_a = 0);
    bind_call<ClipCall>(m, "Clip", [](ClipCall* self, int dtype, Address x, int size, float limit, Address out) {
        new (self) ClipCall{{Dtype(dtype), array<V>(x), size, limit, array<V>(out)}};
    }, "dtype"_a, "x"_a, "size"_a, "limit"_a, "out"_a);
    bind_call<Divide>(m, "Divide", [](Divide* self, Address x, int size, float divisor, Address out) {
        new (self) Divide{array<float>(x), size, divisor, array<float>(out)};
    }, "x"_a, "size"_a, "divisor"_a, "out"_a);
    bind_call<Softcap>(m, "Softcap", [](Softcap* self, Address x, int size, float cap, Address out) {
        new (self) Softcap{array<float>(x), size, cap, array<float>(out)};
    }, "x"_a, "size"_a, "cap"_a, "out"_a);
    bind_call<Rotation>(m, "Rotation", [](Rotation* self, Address positions, Address inverse, int half, float factor, Address cos, Address sin) {
        new (self) Rotation{array<int64_t>(positions), array<float>(inverse), half, factor, array<float>(cos), array<float>(sin)};
    }, "positions"_a, "inverse"_a, "half"_a, "factor"_a, "cos"_a, "sin"_a);
    bind_call<RotateAndStoreCall>(m, "RotateAndStore", [](RotateAndStoreCall* self, int dtype, const CacheShape& shape, int blocks, Address qkv, int q_heads,
                                                          bool gated, Address cos, Address sin, int half, bool interleaved, Address q_norm,
                                                          Address k_norm, int norm_dtype, float eps, Address slots, Address cache, Address key_offset,
                                                          Address q_out, bool turned_first, bool keys_as_values, bool normed_values,
                                                          bool queries_alone) {
        new (self) RotateAndStoreCall{{Dtype(dtype), &shape, array<V>(qkv), q_heads, gated, array<float>(cos), array<float>(sin), half,
                                       interleaved, norm_weight(dtype, q_norm, norm_dtype), norm_weight(dtype, k_norm, norm_dtype), eps, array<int64_t>(slots), array<uint32_t>(cache),
                                       array<V>(q_out), array<float>(key_offset), turned_first, keys_as_values, normed_values, queries_alone},
                                      blocks};
    }, "dtype"_a, "shape"_a, "blocks"_a, "qkv"_a, "q_heads"_a, "gated"_a, "cos"_a, "sin"_a, "half"_a, "interleaved"_a, "q_norm"_a, "k_norm"_a, "norm_dtype"_a, "eps"_a, "slots"_a, "cache"_a,
       "key_offset"_a, "q_out"_a, "turned_first"_a, "keys_as_values"_a = false, "normed_values"_a = false, "queries_alone"_a = false);
    bind_call<AttentionCall>(m, "Attention", [](AttentionCall* self, int dtype, const CacheShape& shape, int blocks, const StepAttention& step,
                                                Address cache, Address key_offset, Address q, int q_heads, float scale, float softcap, Address sinks, Address out,
                                                Address bias, int reach) {
        new (self) AttentionCall{{Dtype(dtype), &shape, &step, array<uint32_t>(cache), array<V>(q), q_heads, scale, softcap,
                                  array<float>(sinks), array<V>(out), array<float>(key_offset), array<float>(bias), reach}, blocks};
    }, "dtype"_a, "shape"_a, "blocks"_a, "step"_a, "cache"_a, "key_offset"_a, "q"_a, "q_heads"_a, "scale"_a, "softcap"_a, "sinks"_a, "out"_a,
       "bias"_a = 0, "reach"_a = 0);
    bind_call<WithinCapacityCall>(m, "WithinCapacity", [](WithinCapacityCall* self, const StepStates& step, Address weights, Address ids, int top_k,
                                                          int experts, int capacity, Address out) {
        new (self) WithinCapacityCall{{&step, array<float>(weights), array<int64_t>(ids), top_k, experts, capacity, array<float>(out)}};
    }, "step"_a, "weights"_a, "ids"_a, "top_k"_a, "experts"_a, "capacity"_a, "out"_a);
    bind_call<Route>(m, "Route", [](Route* self, const RouterSettings& settings, Address logits, Address bias, Address weights, Address ids,
                                    Address pairs, Address sums, Address expert_scale) {
        new (self) Route{&settings, array<float>(logits), array<float>(bias), array<float>(expert_scale), array<float>(weights),
                         array<int64_t>(ids), {array<int64_t>(pairs), array<double>(sums)}};
    }, "settings"_a, "logits"_a, "bias"_a, "weights"_a, "ids"_a, "pairs"_a, "sums"_a, "expert_scale"_a = 0);
}

}  // namespace

NB_MODULE(_cpu, m) {
    // Handles live in modules and may outlive the interpreter's orderly end.
    nb::set_leak_warnings(false);
    using release = nb::call_guard<nb::gil_scoped_release>;
    m.def("available", &available_kernels, "Instruction sets of this processor that there are kernels for, worst first.");

    m.def("formats", [] {
        std::vector<std::string> names;
        for (const FormatSize& format : FORMAT_SIZES) names.push_back(format.name);
        return names;
    }, "Formats of matrices, in the order of their numbers.");
    m.def("reads", [](int dtype, int format) { return reads(Dtype(dtype), Format(format)); },
          "Whether products of a dtype read matrices of a format where they lie.", "dtype"_a, "format"_a);
    nb::class_<Matrix>(m, "Matrix").def("__init__", [](Matrix* self, int format, int rows, int columns, Address data, Address scales,
                                                      int block_rows, int block_columns, int scale_type, Address zeros, bool copy_zeros, Address biases, Address order) {
        new (self) Matrix(make_matrix(format, rows, columns, data, scales, block_rows, block_columns, scale_type, zeros, copy_zeros, biases, order));
    }, nb::kw_only(), "format"_a, "rows"_a, "columns"_a, "data"_a, "scales"_a = 0, "block_rows"_a = 1, "block_columns"_a = 1,
       "scale_type"_a = 0, "zeros"_a = 0, "copy_zeros"_a = false, "biases"_a = 0, "order"_a = 0);
    nb::class_<Linear>(m, "Linear").def("__init__", [](Linear* self, int dtype, const Matrices& weights, const Addresses& biases) {
        new (self) Linear(make_linear(dtype, weights, biases));
    }, nb::kw_only(), "dtype"_a, "weights"_a, "biases"_a);
    nb::class_<Experts>(m, "Experts").def("__init__", [](Experts* self, int dtype, int hidden, int width, int activation, const Matrices& gate,
            const Matrices& up, const Matrices& down, const Addresses& gate_bias, const Addresses& up_bias, const Addresses& down_bias, bool on_disk, bool interleaved, float alpha, float limit) {
        new (self) Experts(make_experts(dtype, hidden, width, {ActivationKind(activation), alpha, limit}, gate, up, down, gate_bias, up_bias, down_bias, on_disk,
                                         interleaved));
    }, nb::kw_only(), "dtype"_a, "hidden"_a, "width"_a, "activation"_a, "gate"_a, "up"_a, "down"_a, "gate_bias"_a, "up_bias"_a, "down_bias"_a, "on_disk"_a = false, "interleaved"_a = false,
       "alpha"_a = 0.0f, "limit"_a = 0.0f)
        .def("assign", [](Experts& self, const Experts& other) { self = other; }, "other"_a);
    nb::class_<StepAttention>(m, "StepAttention")
        .def("__init__", [](StepAttention* self, int window, int block_size) {
            new (self) StepAttention();
            self->window = window, self->block_size = block_size;
        }, nb::kw_only(), "window"_a, "block_size"_a)
        .def("set", &set_step, nb::kw_only(), "query_start"_a, "seq_lens"_a, "block_table"_a, "batch"_a, "width"_a, "first_keys"_a = 0,
             "whole"_a = false);
    nb::class_<CacheShape>(m, "CacheShape")
        .def("__init__", [](CacheShape* self, int block_size, int kv_heads, int key_dim, int value_dim, int type, bool shared, size_t stride) {
            if (shared && (type == INT8_CACHE || value_dim > key_dim)) throw std::invalid_argument("a cache of latents holds numbers, of which values are the first");
            new (self) CacheShape(block_size, kv_heads, key_dim, value_dim, CacheType(type), shared, stride);
        }, nb::kw_only(), "block_size"_a, "kv_heads"_a, "key_dim"_a, "value_dim"_a, "type"_a, "shared"_a = false, "stride"_a = 0)
        .def_ro("stride", &CacheShape::stride)
        .def_prop_ro("block_bytes", &CacheShape::block_bytes);
    nb::class_<RouterSettings>(m, "RouterSettings").def(nb::init<int, int, int, int, int, int, int, float, float, float, float, float>(),
        nb::kw_only(), "num_experts"_a, "top_k"_a, "score"_a, "weight"_a, "num_groups"_a, "groups_kept"_a, "group_top2"_a, "group_fill"_a,
        "renorm_eps"_a, "scale"_a, "softcap"_a, "renorm_least"_a);
    nb::class_<Program>(m, "Program")
        .def("__init__", [](Program* self, const Addresses& columns, const std::vector<int>& counts) {
            new (self) Program();
            for (size_t i = 0; i < columns.size(); i++) self->columns.push_back({array<int64_t>(columns[i]), counts.at(i)});
        }, nb::kw_only(), "columns"_a, "counts"_a)
        .def("__len__", [](const Program& program) { return program.calls.size(); })
        .def("load", &Program::load, "columns"_a, "counts"_a)
        .def("run", &Program::run, "first"_a, "stop"_a, "counts"_a, release())
        .def("__call__", [](const Program& program, const Addresses& columns, const std::vector<int>& counts) {
            program.load(columns, counts);
            program.run(0, program.calls.size(), counts);
        }, "columns"_a, "counts"_a, release());

    nb::class_<Logits>(m, "Logits")
        .def("__init__", [](Logits* self, Address values, int count, int vocab) { new (self) Logits{array<float>(values), count, vocab}; })
        .def("allow", [](Logits& self, int row, Address ids, size_t words) { self.allow(row, array<const uint32_t>(ids), words); });
    nb::class_<Shaping>(m, "Shaping").def("__init__", [](Shaping* self, std::vector<int32_t> biased, std::vector<double> bias,
            std::vector<int32_t> seen, std::vector<int32_t> drawn, double repetition, double presence, double frequency,
            std::vector<int32_t> banned) {
        new (self) Shaping{std::move(biased), std::move(bias), std::move(seen), std::move(drawn), repetition, presence, frequency,
                           std::move(banned)};
    }, nb::arg("biased"), nb::arg("bias"), nb::arg("seen"), nb::arg("drawn"), nb::arg("repetition"), nb::arg("presence"),
       nb::arg("frequency"), nb::arg("banned"));
    nb::class_<Shaped>(m, "Shaped").def("restore", &Shaped::restore, release());

    nb::class_<Ops>(m, "Ops")
        .def(nb::init<const std::string&, int, bool, bool>(), "isa"_a, "threads"_a, "float_activations"_a = false, "ordered"_a = false)
        .def_prop_ro("name", &Ops::name)
        .def_prop_ro("threads", &Ops::threads)
        .def_prop_ro("scratch_bytes", &Ops::scratch_bytes)
        .def("most_scratch_bytes", &Ops::most_scratch_bytes, nb::kw_only(), "widest"_a, "shape"_a, "context"_a)
        .def("argmax", &Ops::argmax, release())
        .def("log_softmax_top_k", [](Ops& ops, const Logits& x, const std::vector<int32_t>& rows, const std::vector<int32_t>& counts,
                                     const std::vector<float>& temperatures, Address log_sums, Address values, Address ids) {
            ops.log_softmax_top_k(x, rows, counts, temperatures, array<double>(log_sums), array<float>(values), array<int64_t>(ids));
        }, release())
        .def("draw", &Ops::draw, release())
        .def("ranks", &Ops::ranks, release())
        .def("shape", &Ops::shape, release());
    bind_calls(m);
    bind_recurrent(m);
    bind_latent(m);
    bind_exchange(m);
}
