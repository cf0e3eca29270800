// Products with plain numbers, alone and as experts, and embeddings, against sums in float64: x and biases of type T, weights
// of type W.
#pragma once
#include <stdexcept>

#include "naive.h"

namespace {

template <class W> Matrix matrix(const std::vector<W>& values, int rows) {
    return {Number<W>::format, rows, int(values.size()) / rows, values.data()};
}

// Some weights are as small as float16's subnormal numbers.
template <class W> std::vector<W> draw_weights(size_t n, double scale = 1) {
    std::vector<W> weights = draw<W>(n, scale);
    for (size_t i = 0; i < n; i += 5) weights[i] = Number<W>::make(scale * 2e-5 * normal());
    return weights;
}

template <class W> std::vector<float> widened(const std::vector<W>& values) {
    std::vector<float> wide;
    for (W x : values) wide.push_back(float(value(x)));
    return wide;
}

template <class T, class W, class Out> std::vector<Out> check_linear(Ops& ops, const Linear& l, const std::vector<T>& x, int rows) {
    std::vector<Out> out(size_t(rows) * l.out);
    ops.linear(l, x.data(), rows, out.data(), sizeof(Out) == 4);
    for (int t = 0; t < rows; t++)
        for (const Linear::Layer& layer : l.layers)
            for (int j = 0; j < layer.weight.rows; j++) {
                Sum s = dot(x.data() + size_t(t) * l.in, static_cast<const W*>(layer.weight.data) + size_t(j) * l.in, l.in);
                if (layer.bias) s.add(value(static_cast<const T*>(layer.bias)[j]));
                close("linear", out[size_t(t) * l.out + layer.offset + j], s.exact, sum_bound<Out>(s.exact, s.terms, l.in));
            }
    return out;
}

template <class T, class W> void test_linear(Ops& ops) {
    for (int turn = 0; turn < 30; turn++) {
        Linear l{Number<T>::dtype, one_of({1, 2, 15, 31, 33, 64, 100, 515}), 0, {}}, wide = l;
        const int rows = one_of({0, 1, 2, 3, 4, 5, 8, 17, 64, 67});
        std::vector<std::vector<W>> weights;
        std::vector<std::vector<float>> copies;
        std::vector<std::vector<T>> biases;
        for (int i = uniform(1, 3); i > 0; i--) {
            const int out = one_of({1, 3, 16, 50, 131});
            weights.push_back(draw_weights<W>(size_t(out) * l.in));
            copies.push_back(widened(weights.back()));
            biases.push_back(draw<T>(out));
            const void* bias = uniform(0, 1) ? biases.back().data() : nullptr;
            l.layers.push_back({matrix(weights.back(), out), bias, l.out});
            wide.layers.push_back({matrix(copies.back(), out), bias, l.out});
            l.out += out;
        }
        wide.out = l.out;
        std::vector<T> x = draw<T>(size_t(rows) * l.in);
        const std::vector<T> rounded = check_linear<T, W, T>(ops, l, x, rows);
        check_linear<T, W, float>(ops, l, x, rows);
        if constexpr (Number<T>::dtype == F32)
            check(rounded == check_linear<T, float, T>(ops, wide, x, rows), "linear: other bits than with weights copied to float32");
    }
}

double activated(double x, ActivationKind kind) {
    switch (kind) {
        case CLAMPED_SWIGLU: break;
        case SILU: return x / (1 + std::exp(-x));
        case RELU: return std::max(x, 0.0);
        case RELU_SQUARED: return x > 0 ? x * x : 0.0;
        case GELU: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case GELU_TANH: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    }
    return 0;
}

double joined(double gate, double up, const Activation& a) {
    if (a.kind != CLAMPED_SWIGLU) return activated(gate, a.kind) * up;
    const double g = std::min(gate, double(a.limit)), u = std::clamp(up, -double(a.limit), double(a.limit));
    return (u + 1) * g / (1 + std::exp(-double(a.alpha) * g));
}

template <class T, class W> struct ExpertArrays {
    int count, width, hidden;
    std::vector<std::vector<W>> weights[3];  // gate, up, down
    std::vector<std::vector<T>> biases[3];   // theirs

    ExpertArrays(int count, int width, int hidden, bool bias) : count(count), width(width), hidden(hidden) {
        for (int kind = 0; kind < 3; kind++)
            for (int e = 0; e < count; e++) {
                weights[kind].push_back(draw_weights<W>(size_t(width) * hidden, kind < 2 ? 1 / std::sqrt(hidden) : 0.3));
                if (bias) biases[kind].push_back(draw<T>(kind < 2 ? width : hidden, 0.3));
            }
    }
    template <class Weight> Experts table(const std::vector<std::vector<Weight>>* matrices, const Activation& activation) const {
        Experts table{Number<T>::dtype, hidden, width, activation, {}, {}, {}, {}, {}, {}};
        std::vector<Matrix>* to[3] = {&table.gate, &table.up, &table.down};
        std::vector<const void*>* bias_to[3] = {&table.gate_bias, &table.up_bias, &table.down_bias};
        for (int kind = 0; kind < 3; kind++) {
            for (const std::vector<Weight>& w : matrices[kind]) to[kind]->push_back(matrix(w, kind < 2 ? width : hidden));
            for (const std::vector<T>& b : biases[kind]) bias_to[kind]->push_back(b.data());
        }
        return table;
    }
    double bias(int kind, int e, int i) const { return biases[kind].empty() ? 0 : value(biases[kind][e][i]); }
    // Expert e's output of one row, and the sizes of what was added up for it.
    std::vector<Sum> run(const T* x, int e, const Activation& activation) const {
        std::vector<Sum> out(hidden);
        for (int i = 0; i < hidden; i++) out[i].add(bias(2, e, i));
        for (int f = 0; f < width; f++) {
            Sum gate = dot(x, &weights[0][e][size_t(f) * hidden], hidden), up = dot(x, &weights[1][e][size_t(f) * hidden], hidden);
            gate.add(bias(0, e, f)), up.add(bias(1, e, f));
            for (int i = 0; i < hidden; i++) {
                const double down = value(weights[2][e][size_t(i) * width + f]);
                out[i].exact += joined(gate.exact, up.exact, activation) * down;
                out[i].terms += std::max(1.0, gate.terms) * (up.terms + (activation.kind == CLAMPED_SWIGLU)) * std::abs(down);
            }
        }
        return out;
    }
};

// Rows of pairs, summed, are what `experts` gives; where a rank holds half of the experts, theirs are the same rows and all
// others are left alone.
template <class T> void check_rows(Ops& ops, Experts table, const std::vector<T>& x, const std::vector<float>& weights,
                                   const std::vector<int64_t>& ids, int k, const std::vector<T>& out) {
    const int rows = int(ids.size()) / k, count = int(table.gate.size());
    std::vector<T> inner(ids.size() * table.width), pairs(ids.size() * table.hidden), sum(out.size());
    ops.expert_rows(table, x.data(), rows, ids.data(), k, inner.data(), pairs.data());
    ops.combine(Number<T>::dtype, pairs.data(), weights.data(), rows, k, table.hidden, sum.data());
    check(sum == out, "experts: other bits than its rows' sum");
    for (int half = 0; half < 2; half++) {
        Experts here = table;
        here.holes = true;
        std::vector<int64_t> kept = ids;
        for (int e = half; e < count; e += 2) here.gate[e].data = here.up[e].data = here.down[e].data = nullptr;
        for (int64_t& id : kept) if (id % 2 == half) id = count;
        std::vector<T> some(pairs.size(), T(77));
        ops.expert_rows(here, x.data(), rows, kept.data(), k, inner.data(), some.data());
        for (size_t i = 0; i < some.size(); i++)
            check(some[i] == (kept[i / table.hidden] == count ? T(77) : pairs[i]), "expert rows: of the experts that are held");
        bool refused = false;
        for (int64_t id : ids) refused |= id % 2 == half;
        try {
            ops.expert_rows(here, x.data(), rows, ids.data(), k, inner.data(), some.data());
        } catch (const std::out_of_range&) {
            refused = !refused;
        }
        check(!refused, "expert rows: a hole is refused, and nothing else");
    }
}

template <class T, class W> void test_experts(Ops& ops) {
    for (int turn = 0; turn < 24; turn++) {
        ExpertArrays<T, W> e(one_of({1, 3, 6}), one_of({1, 31, 70}), one_of({1, 17, 48}), turn % 3 == 0);
        const int rows = one_of({0, 1, 2, 5, 20, 66}), k = uniform(1, std::min(3, e.count));
        const Activation activation = {ActivationKind(turn % 6), 1.7f, 0.8f};
        const bool dense = e.count == 1 && turn % 2, all_to_one = turn % 5 == 0;
        std::vector<T> x = draw<T>(size_t(rows) * e.hidden), out(size_t(rows) * e.hidden);
        std::vector<float> weights(size_t(rows) * k, 1.0f);
        std::vector<int64_t> ids(size_t(rows) * k);
        for (int64_t& id : ids) id = all_to_one ? e.count - 1 : uniform(0, e.count - 1);
        if (!dense)
            for (float& w : weights) w = float(std::abs(normal()));
        std::vector<T> inner(size_t(rows) * k * e.width), outer(dense ? 0 : size_t(rows) * k * e.hidden);
        auto run = [&](const Experts& table, std::vector<T>& to) {
            ops.experts(table, x.data(), rows, dense ? nullptr : weights.data(), dense ? nullptr : ids.data(), k, inner.data(),
                        outer.data(), to.data());
        };
        run(e.table(e.weights, activation), out);
        if (!dense) check_rows(ops, e.table(e.weights, activation), x, weights, ids, k, out);
        if constexpr (Number<T>::dtype == F32) {
            std::vector<std::vector<float>> copies[3];
            for (int kind = 0; kind < 3; kind++)
                for (const std::vector<W>& w : e.weights[kind]) copies[kind].push_back(widened(w));
            std::vector<T> copied(out.size());
            run(e.table(copies, activation), copied);
            check(out == copied, "experts: other bits than with weights copied to float32");
        }
        // Rounded: the gated values, each expert's output, their sum.
        const double rounded = 3.1 * Number<T>::roundoff + (e.hidden + e.width + 40) * 0x1p-24;
        for (int t = 0; t < rows; t += 1 + rows / 8) {
            std::vector<Sum> sum(e.hidden);
            for (int j = 0; j < k; j++) {
                std::vector<Sum> one = e.run(&x[size_t(t) * e.hidden], int(ids[size_t(t) * k + j]), activation);
                const double w = weights[size_t(t) * k + j];
                for (int i = 0; i < e.hidden; i++) sum[i].exact += w * one[i].exact, sum[i].terms += w * one[i].terms;
            }
            for (int i = 0; i < e.hidden; i++) close("experts", out[size_t(t) * e.hidden + i], sum[i].exact, rounded * sum[i].terms);
        }
    }
}

template <class T, class W> void test_embed(Ops& ops) {
    for (float multiplier : {1.0f, 0.3f}) {
        const int rows = one_of({0, 1, 40}), n = one_of({1, 15, 16, 50}), count = 7;
        std::vector<W> table = draw_weights<W>(size_t(count) * n);
        std::vector<int64_t> ids(rows);
        for (int64_t& id : ids) id = uniform(0, count - 1);
        std::vector<T> out(size_t(rows) * n);
        ops.embed(Number<T>::dtype, matrix(table, count), ids.data(), rows, multiplier, out.data());
        for (size_t i = 0; i < out.size(); i++) {
            const double exact = double(multiplier) * value(table[ids[i / n] * n + i % n]);
            close("embed", out[i], exact, multiplier == 1 ? 0 : Number<T>::roundoff * std::abs(exact) + 0x1p-149);
        }
        for (int64_t id : {int64_t(-1), int64_t(count)}) {
            bool refused = false;
            try {
                ops.embed(Number<T>::dtype, matrix(table, count), &id, 1, multiplier, std::vector<T>(n).data());
            } catch (const std::out_of_range&) {
                refused = true;
            }
            check(refused, "embed: id %d of %d", int(id), count);
        }
    }
}

// Every float16 number, as an embedding and as a product's weight, also where the processor takes subnormal float32 numbers
// for zero.
void test_float16(Ops& ops) {
    std::vector<f16> all(65536);
    for (int i = 0; i < 65536; i++) all[i].bits = uint16_t(i);
    auto check_all = [&] {
        std::vector<float> row(65536), sums(65536);
        const int64_t id = 0;
        const float one = 1;
        ops.embed(F32, matrix(all, 1), &id, 1, 1.0f, row.data());
        ops.linear({F32, 1, 65536, {{matrix(all, 65536), nullptr, 0}}}, &one, 1, sums.data(), true);
        for (int i = 0; i < 65536; i++) {
            const float exact = float(value(all[i]));
            auto right = [&](float got) { return std::isnan(exact) ? std::isnan(got) : got == exact && std::signbit(got) == std::signbit(exact); };
            check(right(row[i]), "embed: float16 0x%04x is %g, not %g", i, row[i], exact);
            check(exact == 0 ? sums[i] == 0 : right(sums[i]), "linear: float16 0x%04x is %g, not %g", i, sums[i], exact);
        }
    };
    check_all();
#if defined(__x86_64__)
    const unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8040);  // flush to zero, denormals are zero
    check_all();
    __builtin_ia32_ldmxcsr(before);
#endif
}

// What `reads` says is what every level has.
void test_formats(const Kernels& kernels) {
    for (Dtype dtype : {BF16, F32})
        for (int format = 0; format < DENSE_FORMATS; format++) {
            const bool has = reads(dtype, Format(format));
            check((kernels.product[dtype][format] != nullptr) == has, "a product of dtype %d and format %d", dtype, format);
            // A row of blocks is widened to float32 on its way.
            check((kernels.scaled_row[dtype][format] != nullptr) == (has || format == F32_MATRIX), "a row of dtype %d and format %d", dtype, format);
        }
}

template <class T, class W> void test_weights(Ops& ops) { test_linear<T, W>(ops), test_experts<T, W>(ops), test_embed<T, W>(ops); }

}  // namespace
