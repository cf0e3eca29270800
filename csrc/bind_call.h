// What bindings of operations share: addresses, and records of arguments as classes of Python.
#pragma once
#include <nanobind/nanobind.h>

#include <stdexcept>

#include "ops.h"
#include "program.h"

namespace moebius {

using Address = uintptr_t;

template <class T> T* array(Address address) { return reinterpret_cast<T*>(address); }

// Throws std::invalid_argument for a weight that no norm of a row of this dtype has.
inline NormWeight norm_weight(int dtype, Address weight, int weight_dtype) {
    if (weight_dtype != dtype && weight_dtype != F32) throw std::invalid_argument("a norm's weight is of its rows' dtype, or float32");
    return {array<const void>(weight), Dtype(weight_dtype)};
}

// A record of an operation's arguments as a class of Python: made from named fields, run, or noted in a program, which it and
// the operations then have to outlive.
template <class Call, class Make, class... Names> void bind_call(nanobind::module_& m, const char* name, Make make, const Names&... names) {
    namespace nb = nanobind;
    using namespace nb::literals;
    nb::class_<Call>(m, name)
        .def("__init__", make, nb::kw_only(), names...)
        .def("run", [](const Call& call, Ops& ops, int rows) { call(ops, rows); }, "ops"_a, "rows"_a,
             nb::call_guard<nb::gil_scoped_release>())
        .def("note", [](const Call& call, Ops& ops, Program& program, int count, int factor) {
            program.calls.push_back({[call, &ops](int rows) { call(ops, rows); }, count, factor});
        }, "ops"_a, "program"_a, "count"_a, "factor"_a);
}

}  // namespace moebius
