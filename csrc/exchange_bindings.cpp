#include "exchange_bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "exchange.h"
#include "socket_exchange.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moebius;

namespace {

using Address = uintptr_t;

template <class T> T* array(Address address) { return reinterpret_cast<T*>(address); }

std::vector<int> numbers(uint64_t ranks) {
    std::vector<int> found;
    for (int r = 0; r < MOST_RANKS; r++)
        if (ranks >> r & 1) found.push_back(r);
    return found;
}

uint64_t bits(const std::vector<int>& ranks) {
    uint64_t found = 0;
    for (int r : ranks) found |= uint64_t(1) << r;
    return found;
}

// Raised with the ranks, and what is wrong with them.
PyObject* peers_lost_type = nullptr;

const char* name(Fault fault) {
    switch (fault) {
        case Fault::LATE: return "late";
        case Fault::GONE: return "gone";
        case Fault::LEFT: return "left";
        case Fault::OUT_OF_STEP: return "out of step";
    }
    return "lost";
}

void raise_peers_lost(const std::exception_ptr& thrown, void*) {
    try {
        std::rethrow_exception(thrown);
    } catch (const PeersLost& lost) {
        PyErr_SetObject(peers_lost_type, nb::make_tuple(nb::cast(numbers(lost.ranks)), name(lost.fault)).ptr());
    }
}

// What every exchange has.
template <class Exchange> void bind_operations(nb::class_<Exchange>& type) {
    using release = nb::call_guard<nb::gil_scoped_release>;
    type.def("agree", &Exchange::agree, "values"_a, release())
        .def("dispatch", [](Exchange& exchange, Address x, Address ids, int tokens, Address owners, int splits, int experts, Address rows,
                            Address ids_out) {
            return exchange.dispatch({array<void>(x), array<int64_t>(ids), tokens, array<int32_t>(owners), splits, experts}, array<void>(rows),
                                     array<int64_t>(ids_out));
        }, "x"_a, "ids"_a, "tokens"_a, "owners"_a, "splits"_a, "experts"_a, "rows"_a, "ids_out"_a, release())
        .def("combine", [](Exchange& exchange, Address outputs, Address back) {
            exchange.combine(array<void>(outputs), array<void>(back));
        }, "outputs"_a, "back"_a, release())
        .def("give_up", [](Exchange& exchange, const std::vector<int>& ranks) { exchange.give_up(bits(ranks)); }, "ranks"_a)
        .def_prop_ro("traffic", [](const Exchange& exchange) { return exchange.traffic(); });
}

}  // namespace

void bind_exchange(nb::module_& m) {
    peers_lost_type = PyErr_NewException("moebius._cpu.PeersLost", PyExc_Exception, nullptr);
    m.attr("PeersLost") = nb::borrow(peers_lost_type);
    nb::register_exception_translator(raise_peers_lost);

    nb::class_<ExchangeLayout>(m, "ExchangeLayout")
        .def("__init__", [](ExchangeLayout* self, int ranks, int tokens, int top_k, int gathered, int width, size_t row_bytes, std::string group,
                           uint64_t epoch) {
            new (self) ExchangeLayout{ranks, tokens, top_k, gathered, width, row_bytes, std::move(group), epoch};
            self->check();
        }, nb::kw_only(), "ranks"_a, "tokens"_a, "top_k"_a, "gathered"_a, "width"_a, "row_bytes"_a, "group"_a, "epoch"_a)
        .def_prop_ro("nbytes", &ExchangeLayout::bytes)
        .def("write", [](const ExchangeLayout& layout, Address segment, int cores) { layout.write(array<void>(segment), cores); }, "segment"_a,
             "cores"_a)
        .def("check", [](const ExchangeLayout& layout, Address segment, size_t bytes) { layout.check(array<void>(segment), bytes); },
             "segment"_a, "nbytes"_a);
    m.def("exchange_give_up", [](Address segment, const std::vector<int>& ranks) {
        array<ExchangeHeader>(segment)->give_up(bits(ranks));
    }, "segment"_a, "ranks"_a);

    nb::class_<ExchangeTraffic>(m, "ExchangeTraffic")
        .def_ro("calls", &ExchangeTraffic::calls)
        .def_ro("bytes_out", &ExchangeTraffic::bytes_out)
        .def_ro("bytes_in", &ExchangeTraffic::bytes_in)
        .def_ro("seconds_waited", &ExchangeTraffic::seconds_waited);
    nb::class_<SharedExchange> shared(m, "SharedExchange");
    shared
        // Keeps `memory`, in which the segment is mapped, as long as it lives, and so as long as any call of it lasts.
        .def("__init__", [](SharedExchange* self, nb::handle, const ExchangeLayout& layout, Address segment, int rank, double timeout) {
            new (self) SharedExchange(layout, array<void>(segment), rank, timeout);
        }, "memory"_a, "layout"_a, "segment"_a, nb::kw_only(), "rank"_a, "timeout"_a, nb::keep_alive<1, 2>());
    bind_operations(shared);
    using release = nb::call_guard<nb::gil_scoped_release>;
    shared
        .def("gather", [](SharedExchange& exchange, Address x, int count, Address rows) {
            return exchange.gather(array<void>(x), count, array<void>(rows));
        }, "x"_a, "count"_a, "rows"_a, release())
        .def("scatter", [](SharedExchange& exchange, Address parts, Address home) {
            exchange.scatter(array<float>(parts), array<float>(home));
        }, "parts"_a, "home"_a, release());
    nb::class_<SocketExchange> sockets(m, "SocketExchange");
    // Keeps `memory`, in which rings are mapped, as SharedExchange does.
    sockets.def("__init__", [](SocketExchange* self, nb::handle, int ranks, int tokens, int top_k, size_t row_bytes, int rank,
                               const std::vector<int>& sockets, const std::vector<Address>& rings, bool crowded, double timeout) {
        std::vector<Ring*> mapped;
        for (Address address : rings) mapped.push_back(array<Ring>(address));
        new (self) SocketExchange({ranks, tokens, top_k, row_bytes}, rank, sockets, mapped, crowded, timeout);
    }, "memory"_a, nb::kw_only(), "ranks"_a, "tokens"_a, "top_k"_a, "row_bytes"_a, "rank"_a, "sockets"_a, "rings"_a, "crowded"_a, "timeout"_a, nb::keep_alive<1, 2>());
    m.attr("RING_BYTES") = 2 * sizeof(Ring);  // one each way
    bind_operations(sockets);
}
