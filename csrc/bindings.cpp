// moebius._cpu: what ops/cpu.py calls. Arrays come as addresses: a tensor's data_ptr() costs a tenth of a conversion, and
// a decoder makes some eight calls a layer. ops/cpu.py checks dtypes, shapes and contiguity. Every call releases the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "ops.h"

namespace nb = nanobind;
using namespace moebius;

namespace {

using Address = uintptr_t;
using Addresses = std::vector<Address>;

template <class T> T* array(Address address) { return reinterpret_cast<T*>(address); }

std::vector<const void*> pointers(const Addresses& addresses) {
    std::vector<const void*> p;
    for (Address a : addresses) p.push_back(array<const void>(a));
    return p;
}

using Matrices = std::vector<Matrix>;

// Throws std::invalid_argument for a matrix of other columns, or in a format that has no kernels.
void require_product(Dtype dtype, const Matrix& w, int columns) {
    if (w.columns != columns) throw std::invalid_argument("a matrix of " + std::to_string(w.columns) + " columns where the input has " + std::to_string(columns));
    if (w.format < 0 || w.format >= FORMATS || !reads(dtype, w.format)) throw std::invalid_argument("no kernel reads this format in this dtype");
}

Experts make_experts(int dtype, int hidden, int width, int activation, const Matrices& gate, const Matrices& up, const Matrices& down,
                     const Addresses& gate_bias, const Addresses& up_bias, const Addresses& down_bias) {
    for (const Matrices* matrices : {&gate, &up}) for (const Matrix& w : *matrices) require_product(Dtype(dtype), w, hidden);
    for (const Matrix& w : down) require_product(Dtype(dtype), w, width);
    return {Dtype(dtype), hidden, width, Activation(activation), gate, up, down, pointers(gate_bias), pointers(up_bias), pointers(down_bias)};
}

void set_step(StepAttention& step, Address query_start, Address seq_lens, Address block_table, int batch, int width) {
    const int32_t *starts = array<const int32_t>(query_start), *lens = array<const int32_t>(seq_lens);
    const int32_t* table = array<const int32_t>(block_table);
    step.query_start.assign(starts, starts + batch + 1);
    step.seq_lens.assign(lens, lens + batch);
    step.block_table.assign(table, table + size_t(batch) * width);
    step.table_width = width;
}

Linear make_linear(int dtype, const Matrices& weights, const Addresses& biases) {
    Linear l{Dtype(dtype), weights.at(0).columns, 0, {}};
    for (size_t i = 0; i < weights.size(); i++) {
        require_product(l.dtype, weights[i], l.in);
        l.layers.push_back({weights[i], array<const void>(biases.at(i)), l.out});
        l.out += weights[i].rows;
    }
    return l;
}

// Calls what was noted on `rows` rows of its inputs, int64 each, which lie at `from`.
void run_program(const Program& program, int rows, const Addresses& from) {
    for (size_t i = 0; i < from.size(); i++) std::copy_n(array<const int64_t>(from[i]), rows, array<int64_t>(program.inputs.at(i)));
    for (const auto& call : program.calls) call(rows);
}

}  // namespace

NB_MODULE(_cpu, m) {
    // Handles live in modules and may outlive the interpreter's orderly end.
    nb::set_leak_warnings(false);
    using release = nb::call_guard<nb::gil_scoped_release>;
    m.def("available", &available_kernels, "Instruction sets of this processor that there are kernels for, worst first.");

    m.def("reads", [](int dtype, int format) { return reads(Dtype(dtype), Format(format)); },
          "Whether products of a dtype read matrices of a format where they lie.");
    nb::class_<Matrix>(m, "Matrix").def("__init__", [](Matrix* self, int format, int rows, int columns, Address data) {
        new (self) Matrix{Format(format), rows, columns, array<const void>(data)};
    });
    nb::class_<Linear>(m, "Linear").def("__init__", [](Linear* self, int dtype, const Matrices& weights, const Addresses& biases) {
        new (self) Linear(make_linear(dtype, weights, biases));
    });
    nb::class_<Experts>(m, "Experts").def("__init__", [](Experts* self, int dtype, int hidden, int width, int activation, const Matrices& gate,
            const Matrices& up, const Matrices& down, const Addresses& gate_bias, const Addresses& up_bias, const Addresses& down_bias) {
        new (self) Experts(make_experts(dtype, hidden, width, activation, gate, up, down, gate_bias, up_bias, down_bias));
    });
    nb::class_<StepAttention>(m, "StepAttention")
        .def("__init__", [](StepAttention* self, int window) {
            new (self) StepAttention();
            self->window = window;
        })
        .def("set", &set_step);
    nb::class_<Program>(m, "Program")
        .def("__init__", [](Program* self, const Addresses& inputs) { new (self) Program{{inputs.begin(), inputs.end()}, {}}; })
        .def("__call__", &run_program, release());
    nb::class_<CacheShape>(m, "CacheShape")
        .def("__init__", [](CacheShape* self, int block_size, int kv_heads, int head_dim, int dtype) {
            new (self) CacheShape(block_size, kv_heads, head_dim, Dtype(dtype));
        })
        .def_prop_ro("block_bytes", &CacheShape::block_bytes);
    nb::class_<RouterSettings>(m, "RouterSettings").def(nb::init<int, int, int, int, int, int, int, float, float, float, float>());

    nb::class_<Logits>(m, "Logits").def("__init__", [](Logits* self, Address values, int count, int vocab) {
        new (self) Logits{array<float>(values), count, vocab};
    });
    nb::class_<Shaping>(m, "Shaping").def("__init__", [](Shaping* self, std::vector<int32_t> biased, std::vector<double> bias,
            std::vector<int32_t> seen, std::vector<int32_t> drawn, double repetition, double presence, double frequency,
            std::vector<int32_t> banned) {
        new (self) Shaping{std::move(biased), std::move(bias), std::move(seen), std::move(drawn), repetition, presence, frequency,
                           std::move(banned)};
    }, nb::arg("biased"), nb::arg("bias"), nb::arg("seen"), nb::arg("drawn"), nb::arg("repetition"), nb::arg("presence"),
       nb::arg("frequency"), nb::arg("banned"));
    nb::class_<Shaped>(m, "Shaped").def("restore", &Shaped::restore, release());

    nb::class_<Ops>(m, "Ops")
        .def(nb::init<const std::string&, int>())
        .def_prop_ro("name", &Ops::name)
        .def_prop_ro("threads", &Ops::threads)
        .def("record", [](Ops& ops, Program* program) { ops.recorder = program; }, nb::arg().none())
        .def("embed", [](Ops& ops, int dtype, const Matrix& table, Address ids, int rows, float multiplier, Address out) {
            require_product(Dtype(dtype), table, table.columns);
            ops.submit(rows, [=, &ops](int r) {
                ops.embed(Dtype(dtype), table, array<const int64_t>(ids), r, multiplier, array<void>(out));
            });
        }, release())
        .def("linear", [](Ops& ops, const Linear& l, Address x, int rows, Address out, bool wide) {
            ops.submit(rows, [=, &ops, &l](int r) { ops.linear(l, array<const void>(x), r, array<void>(out), wide); });
        }, release())
        .def("experts", [](Ops& ops, const Experts& e, Address x, int rows, Address weights, Address ids, int top_k, Address out) {
            ops.submit(rows, [=, &ops, &e](int r) {
                ops.experts(e, array<const void>(x), r, array<const float>(weights), array<const int64_t>(ids), top_k, array<void>(out));
            });
        }, release())
        .def("add_gated", [](Ops& ops, int dtype, Address a, Address b, Address gate, int rows, int n, Address out) {
            ops.submit(rows, [=, &ops](int r) {
                ops.add_gated(Dtype(dtype), array<const void>(a), array<const void>(b), array<const float>(gate), r, n, array<void>(out));
            });
        }, release())
        .def("rms_norm", [](Ops& ops, int dtype, Address x, Address update, float multiplier, Address weight, int rows, int n, int stride,
                            float eps, Address sum, Address out) {
            ops.submit(rows, [=, &ops](int r) {
                ops.rms_norm(Dtype(dtype), array<const void>(x), array<const void>(update), multiplier, array<const void>(weight), r, n,
                             stride, eps, array<void>(sum), array<void>(out));
            });
        }, release())
        .def("rotation", [](Ops& ops, Address positions, int rows, Address inverse, int half, float factor, Address cos, Address sin) {
            ops.submit(rows, [=, &ops](int r) {
                ops.rotation(array<const int64_t>(positions), r, array<const float>(inverse), half, factor, array<float>(cos), array<float>(sin));
            });
        }, release())
        .def("rotate_and_store", [](Ops& ops, int dtype, const CacheShape& shape, Address qkv, int rows, int q_heads,
                                    Address cos, Address sin, int half, Address q_norm, Address k_norm, float eps, Address slots,
                                    Address cache, Address q_out) {
            ops.submit(rows, [=, &ops, &shape](int r) {
                ops.rotate_and_store(Dtype(dtype), shape, array<const void>(qkv), r, q_heads,
                                     array<const float>(cos), array<const float>(sin), half, array<const void>(q_norm),
                                     array<const void>(k_norm), eps, array<const int64_t>(slots), array<uint32_t>(cache), array<void>(q_out));
            });
        }, release())
        .def("attention", [](Ops& ops, int dtype, const CacheShape& shape, const StepAttention& step, int rows, Address cache, Address q,
                             int q_heads, float scale, float softcap, Address sinks, Address out) {
            ops.submit(rows, [=, &ops, &shape, &step](int) {
                ops.attention(Dtype(dtype), shape, step, array<const uint32_t>(cache), array<const void>(q), q_heads, scale, softcap,
                              array<const float>(sinks), array<void>(out));
            });
        }, release())
        .def("route", [](Ops& ops, const RouterSettings& r, Address logits, int rows, Address bias, Address weights, Address ids,
                         Address pairs, Address sums) {
            const RouterTally tally{array<int64_t>(pairs), array<double>(sums)};
            ops.submit(rows, [=, &ops, &r](int n) {
                ops.route(r, array<const float>(logits), n, array<const float>(bias), array<float>(weights), array<int64_t>(ids), tally);
            });
        }, release())
        .def("argmax", &Ops::argmax, release())
        .def("log_softmax_top_k", [](Ops& ops, const Logits& x, const std::vector<int32_t>& rows, const std::vector<int32_t>& counts,
                                     const std::vector<float>& temperatures, Address log_sums, Address values, Address ids) {
            ops.log_softmax_top_k(x, rows, counts, temperatures, array<double>(log_sums), array<float>(values), array<int64_t>(ids));
        }, release())
        .def("draw", &Ops::draw, release())
        .def("ranks", &Ops::ranks, release())
        .def("shape", &Ops::shape, release());
}
