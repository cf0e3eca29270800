#include "latent_bindings.h"

#include <nanobind/stl/vector.h>

#include "bind_call.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moebius;

namespace {

// Throws std::invalid_argument for matrices of several sizes, or in a format that has no kernels.
HeadMatrices make_heads(int dtype, const std::vector<Matrix>& weights) {
    const Matrix& first = weights.at(0);
    for (const Matrix& w : weights) {
        if (w.rows != first.rows || w.columns != first.columns) throw std::invalid_argument("the heads' matrices are of several sizes");
        if (w.format < 0 || w.format >= ALL_FORMATS || !reads(Dtype(dtype), w.format)) throw std::invalid_argument("no kernel reads this format in this dtype");
        if (w.columns % FORMAT_SIZES[w.format].elements) throw std::invalid_argument("rows of " + std::to_string(w.columns) + " elements are no whole blocks");
    }
    return {Dtype(dtype), first.columns, first.rows, weights};
}

struct HeadProductsCall : HeadProducts {
    void operator()(Ops& ops, int rows) const { ops.head_products(*this, rows); }
};

struct StoreLatentCall : StoreLatent {
    int blocks;
    // Throws std::out_of_range for a slot that the cache has not.
    void operator()(Ops& ops, int rows) const {
        const int64_t count = int64_t(blocks) * shape->block_size;
        for (int t = 0; t < rows; t++)
            if (slots[t] < 0 || slots[t] >= count) throw std::out_of_range("slot " + std::to_string(slots[t]) + " is none of " + std::to_string(count));
        ops.rotate_and_store_latent(*this, rows);
    }
};

}  // namespace

void bind_latent(nb::module_& m) {
    using V = void;
    nb::class_<HeadMatrices>(m, "HeadMatrices").def("__init__", [](HeadMatrices* self, int dtype, const std::vector<Matrix>& weights) {
        new (self) HeadMatrices(make_heads(dtype, weights));
    }, nb::kw_only(), "dtype"_a, "weights"_a);
    bind_call<HeadProductsCall>(m, "HeadProducts", [](HeadProductsCall* self, const HeadMatrices& heads, Address x, int kept, Address out) {
        new (self) HeadProductsCall{{&heads, array<V>(x), kept, array<V>(out)}};
    }, "heads"_a, "x"_a, "kept"_a, "out"_a);
    bind_call<StoreLatentCall>(m, "StoreLatent", [](StoreLatentCall* self, int dtype, const CacheShape& shape, int blocks, Address q, int q_heads,
                                                    Address latent, Address norm, int norm_dtype, float eps, Address cos, Address sin, int half,
                                                    bool interleaved, Address slots, Address cache, Address positions, float beta, int64_t original) {
        if (!shape.shared || shape.kv_heads != 1) throw std::invalid_argument("this is no cache of latents");
        new (self) StoreLatentCall{{Dtype(dtype), &shape, array<V>(q), q_heads, array<V>(latent), norm_weight(dtype, norm, norm_dtype), eps,
                                    array<float>(cos), array<float>(sin), half, interleaved, array<int64_t>(slots), array<uint32_t>(cache),
                                    array<int64_t>(positions), beta, original}, blocks};
    }, "dtype"_a, "shape"_a, "blocks"_a, "q"_a, "q_heads"_a, "latent"_a, "norm"_a, "norm_dtype"_a, "eps"_a, "cos"_a, "sin"_a, "half"_a,
       "interleaved"_a, "slots"_a, "cache"_a, "positions"_a, "beta"_a, "original"_a);
}
