// The operations against plain loops in float64, at every instruction set that this processor has.
//
//   cmake -S . -B build/tests -DMOEBIUS_TESTS=ON && cmake --build build/tests && build/tests/test_kernels
//
// builds with AddressSanitizer and UndefinedBehaviorSanitizer. Every array is exactly as large as it has to be, so that
// reading one element too many is found.
#include <cstring>
#include <limits>
#include <stdexcept>

#include "block_cases.h"
#include "naive.h"
#include "naive_attention.h"
#include "naive_codes.h"

namespace {

// --- products: x and biases of type T, weights of type W ---

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

double activated(double x, Activation activation) {
    switch (activation) {
        case SILU: return x / (1 + std::exp(-x));
        case RELU: return std::max(x, 0.0);
        case GELU: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case GELU_TANH: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    }
    return 0;
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
    template <class Weight> Experts table(const std::vector<std::vector<Weight>>* matrices, Activation activation) const {
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
    std::vector<Sum> run(const T* x, int e, Activation activation) const {
        std::vector<Sum> out(hidden);
        for (int i = 0; i < hidden; i++) out[i].add(bias(2, e, i));
        for (int f = 0; f < width; f++) {
            Sum gate = dot(x, &weights[0][e][size_t(f) * hidden], hidden), up = dot(x, &weights[1][e][size_t(f) * hidden], hidden);
            gate.add(bias(0, e, f)), up.add(bias(1, e, f));
            for (int i = 0; i < hidden; i++) {
                const double down = value(weights[2][e][size_t(i) * width + f]);
                out[i].exact += activated(gate.exact, activation) * up.exact * down;
                out[i].terms += std::max(1.0, gate.terms) * up.terms * std::abs(down);
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
        const Activation activation = Activation(turn % 4);
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

// --- row by row ---

template <class T> void test_norms(Ops& ops) {
    const double u = Number<T>::roundoff;
    for (int turn = 0; turn < 20; turn++) {
        const int rows = one_of({0, 1, 3, 40}), n = one_of({1, 7, 16, 33, 500});
        const float multiplier = turn % 2 ? 1.0f : 0.3f;
        std::vector<T> x = draw<T>(size_t(rows) * n), update = draw<T>(x.size()), weight = draw<T>(n), sum(x.size()), out(x.size());
        std::vector<T> alone(x.size());
        ops.rms_norm({Number<T>::dtype, x.data(), update.data(), multiplier, weight.data(), n, n, 1e-5f, sum.data(), out.data()}, rows);
        ops.rms_norm({Number<T>::dtype, sum.data(), nullptr, 1, weight.data(), n, n, 1e-5f, nullptr, alone.data()}, rows);
        check(out == alone, "rms_norm: the sum's norm is not the norm of the sum");
        for (size_t i = 0; i < x.size(); i++) {
            Sum s;
            s.add(value(x[i])), s.add(double(multiplier) * value(update[i]));
            close("residual", sum[i], s.exact, (u + 0x1p-23) * s.terms);
            const double exact = value(sum[i]) * inverse_rms(&sum[i / n * n], n, 1e-5f) * value(weight[i % n]);
            close("rms_norm", out[i], exact, (2.1 * u + (n / 32.0 + 8) * 0x1p-24) * std::abs(exact));
        }
    }
}

template <class T> void test_add_gated(Ops& ops) {
    for (int turn = 0; turn < 10; turn++) {
        const int rows = one_of({0, 1, 18}), n = one_of({1, 15, 16, 50});
        std::vector<T> a = draw<T>(size_t(rows) * n), b = draw<T>(a.size()), out(a.size());
        std::vector<float> gate = draw<float>(rows, 3);
        ops.add_gated(Number<T>::dtype, a.data(), b.data(), turn % 2 ? gate.data() : nullptr, rows, n, out.data());
        for (size_t i = 0; i < a.size(); i++) {
            Sum s;
            s.add(value(a[i])), s.add(value(b[i]) * (turn % 2 ? 1 / (1 + std::exp(-double(gate[i / n]))) : 1));
            close("add_gated", out[i], s.exact, Number<T>::roundoff * std::abs(s.exact) + 0x1p-20 * s.terms);
        }
    }
}

void test_rotation(Ops& ops) {
    for (int rows : {0, 1, 33}) {
        const int half = 5;
        std::vector<int64_t> positions(rows);
        for (int64_t& p : positions) p = uniform(0, 1'000'000);
        std::vector<float> inverse = draw<float>(half), cos(size_t(rows) * half), sin(cos.size());
        ops.rotation(positions.data(), rows, inverse.data(), half, 1.5f, cos.data(), sin.data());
        for (size_t i = 0; i < cos.size(); i++) {
            const double angle = float(positions[i / half]) * inverse[i % half];
            close("cos", cos[i], 1.5 * std::cos(angle), 0x1p-22), close("sin", sin[i], 1.5 * std::sin(angle), 0x1p-22);
        }
    }
}

// Rows on every thread: subnormal numbers count as zeros there, and as before on the caller's once the call is over.
void test_subnormals(Ops& ops) {
    const float tiny = 1e-40f;
    const int rows = 64, n = 48;
    std::vector<float> a(size_t(rows) * n, tiny), b(a.size(), tiny), out(a.size(), 1.0f);
    ops.add_gated(F32, a.data(), b.data(), nullptr, rows, n, out.data());
    for (float x : out) check(x == 0, "%g is not flushed", double(x));
    ops.add_gated(F32, a.data(), b.data(), nullptr, 1, n, out.data());
    check(out[0] == 0, "%g of one row is not flushed", double(out[0]));
    volatile float half = tiny;
    half = half / 2;
    check(half > 0, "the caller's subnormal numbers are gone");
}

// --- routing and sampling ---

std::vector<int> best(const std::vector<double>& scores, int k) {
    std::vector<int> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
    order.resize(k);
    return order;
}

void softmax(std::vector<double>& x) {
    const double largest = *std::max_element(x.begin(), x.end());
    double total = 0;
    for (double& v : x) total += v = std::exp(v - largest);
    for (double& v : x) v /= total;
}

// One token's experts and weights, best first.
std::pair<std::vector<int>, std::vector<double>> routed(const RouterSettings& r, const float* logits, const float* bias) {
    std::vector<double> capped(logits, logits + r.num_experts);
    for (double& x : capped) x = r.softcap != 0 ? r.softcap * std::tanh(x / r.softcap) : x;
    std::vector<double> scores = capped, group_scores, weights;
    if (r.score == 0) softmax(scores);
    if (r.score == 1) for (double& x : scores) x = 1 / (1 + std::exp(-x));
    std::vector<double> choice = scores;
    for (int e = 0; bias && e < r.num_experts; e++) choice[e] += bias[e];
    const int size = r.num_experts / r.num_groups;
    for (int g = 0; g < r.num_groups; g++) {
        std::vector<double> own(choice.begin() + g * size, choice.begin() + (g + 1) * size);
        std::sort(own.rbegin(), own.rend());
        group_scores.push_back(own[0] + (r.group_top2 && size > 1 ? own[1] : 0));
    }
    std::vector<int> kept = best(group_scores, r.groups_kept);
    for (int e = 0; e < r.num_experts; e++)
        if (r.num_groups > 1 && std::find(kept.begin(), kept.end(), e / size) == kept.end()) choice[e] = r.group_fill;
    std::vector<int> ids = best(choice, r.top_k);
    for (int id : ids) weights.push_back(r.weight >= 2 ? capped[id] : scores[id]);
    if (r.weight == 2) softmax(weights);
    if (r.weight == 3) for (double& w : weights) w = 1 / (1 + std::exp(-w));
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (double& w : weights) w = (r.weight == 1 ? w / (total + r.renorm_eps) : w) * r.scale;
    return {ids, weights};
}

void test_route(Ops& ops) {
    for (int turn = 0; turn < 60; turn++) {
        RouterSettings r{one_of({8, 16, 40}), 1, turn % 3, turn % 4, one_of({1, 1, 2, 4}), 1, uniform(0, 1),
                         one_of({-INFINITY, 0.0f}), 1e-9f, one_of({1.0f, 2.5f}), one_of({0.0f, 3.0f})};
        if (r.score == 2 && r.weight == 1) r.weight = 2;  // a sum of logits is near zero at times: nobody divides by it
        r.groups_kept = uniform(1, r.num_groups);
        r.top_k = uniform(1, r.num_experts / r.num_groups * r.groups_kept);
        const int rows = one_of({0, 1, 35});
        std::vector<float> logits = draw<float>(size_t(rows) * r.num_experts, 2), bias = draw<float>(r.num_experts);
        std::vector<float> weights(size_t(rows) * r.top_k);
        std::vector<int64_t> ids(weights.size());
        const bool biased = turn % 5 == 0 && !(r.group_fill == 0 && r.num_groups > 1);
        std::vector<int64_t> pairs(r.num_experts), counted(r.num_experts);
        double sums[2] = {0, 0};
        const RouterTally tally{turn % 7 ? pairs.data() : nullptr, sums};
        ops.route(r, logits.data(), rows, biased ? bias.data() : nullptr, weights.data(), ids.data(), tally);
        for (int64_t id : ids) counted[id] += tally.pairs != nullptr;
        check(pairs == counted, "route: the tally has other pairs than were chosen");
        check(sums[1] == (tally.pairs ? rows : 0), "route: the tally has %d tokens", int(sums[1]));
        const double most = sums[1] * std::log(double(r.num_experts));
        check(0 <= sums[0] && sums[0] <= most * (1 + 1e-6), "route: an entropy sum of %g nats", sums[0]);
        for (int t = 0; t < rows; t++) {
            auto [chosen, exact] = routed(r, &logits[size_t(t) * r.num_experts], biased ? bias.data() : nullptr);
            for (int k = 0; k < r.top_k; k++) {
                const size_t at = size_t(t) * r.top_k + k;
                check(ids[at] == chosen[k], "route: expert %d instead of %d", int(ids[at]), chosen[k]);
                close("route", weights[at], exact[k], 1e-5 * std::abs(exact[k]) + 1e-7);
            }
        }
    }
}

void test_sampling(Ops& ops) {
    for (int turn = 0; turn < 40; turn++) {
        const int rows = uniform(0, 4), vocab = one_of({1, 2, 15, 16, 17, 100, 4097}), k = std::min(vocab, one_of({0, 1, 2, 20, 4097}));
        std::vector<float> logits = draw<float>(size_t(rows) * vocab, 4), heat(rows, 1.0f);
        for (float& x : logits) x = turn % 2 ? std::round(x) : x;  // ties
        for (float& x : heat) x = float(uniform(2, 20)) / 10;
        std::vector<double> sums(rows), uniforms(rows);
        for (double& u : uniforms) u = uniform(0, 999) / 1000.0;
        std::vector<int64_t> ids(size_t(rows) * k);
        std::vector<float> values(ids.size());
        std::vector<int32_t> all(rows), counts(rows, k), tokens(rows);
        std::iota(all.begin(), all.end(), 0);
        for (int32_t& token : tokens) token = uniform(0, vocab - 1);
        const Logits x{logits.data(), rows, vocab};
        ops.log_softmax_top_k(x, all, counts, heat, sums.data(), values.data(), ids.data());
        const std::vector<int64_t> drawn = ops.draw(x, all, heat, uniforms), ranks = ops.ranks(x, all, tokens);
        for (int t = 0; t < rows; t++) {
            std::vector<double> row(&logits[size_t(t) * vocab], &logits[size_t(t) * vocab] + vocab);
            std::vector<int> order = best(row, k);
            check(std::equal(order.begin(), order.end(), ids.begin() + size_t(t) * k), "not the best %d of %d", k, vocab);
            for (int i = 0; i < k; i++) check(values[size_t(t) * k + i] == float(row[order[i]]), "value of candidate %d", i);
            order = best(row, vocab);
            check(order[ranks[t] - 1] == tokens[t], "rank %d of %d", int(ranks[t]), vocab);
            const double largest = *std::max_element(row.begin(), row.end());
            double total = 0, below = 0;
            for (double& x : row) total += x = std::exp((x - largest) / heat[t]);
            close("logsumexp", float(sums[t]), largest / heat[t] + std::log(total), 1e-4);
            for (int i = 0; i < drawn[t]; i++) below += row[i] / total;
            const double above = below + row[drawn[t]] / total;
            check(below <= uniforms[t] + 1e-5 && uniforms[t] <= above + 1e-5, "draw: %d of %d", int(drawn[t]), vocab);
        }
        if (rows == 0) continue;
        logits[uniform(0, vocab - 1)] = one_of({NAN, INFINITY, -INFINITY});
        ops.log_softmax_top_k(x, all, counts, heat, sums.data(), values.data(), ids.data());
        for (int t = 0; t < rows; t++) check(std::isnan(sums[t]) == (t == 0), "log_softmax_top_k: row %d is %g", t, sums[t]);
    }
}

// Penalties of random tokens on some rows, twice named ones among them; in the end nothing is left of them.
void test_shaping(Ops& ops) {
    for (int turn = 0; turn < 30; turn++) {
        const int rows = uniform(1, 5), vocab = one_of({1, 2, 17, 300});
        std::vector<float> logits = draw<float>(size_t(rows) * vocab, 4);
        const std::vector<float> before = logits;
        const int row = uniform(0, rows - 1);
        auto some = [&](int most) {
            std::vector<int32_t> ids(uniform(0, most));
            for (int32_t& id : ids) id = uniform(0, vocab - 1);
            return ids;
        };
        Shaping s{{uniform(0, vocab - 1)}, {normal()}, some(200), some(50), 1.3, 0.7, 0.1, some(2)};
        std::vector<float> expected = logits;
        for (int id = 0; id < vocab; id++) {
            float& logit = expected[size_t(row) * vocab + id];
            double value = logit;
            if (id == s.biased[0]) value += s.bias[0];
            const int times = int(std::count(s.drawn.begin(), s.drawn.end(), id));
            if (times || std::count(s.seen.begin(), s.seen.end(), id)) value = value > 0 ? value / 1.3 : value * 1.3;
            if (times) value -= 0.7 + 0.1 * times;
            logit = std::count(s.banned.begin(), s.banned.end(), id) ? -std::numeric_limits<float>::max() : float(value);
        }
        Shaped shaped = ops.shape({logits.data(), rows, vocab}, {row}, {&s});
        check(logits == expected, "shaping of one of %d rows of %d", rows, vocab);
        shaped.restore();
        check(logits == before, "shaping left something behind");
    }
}

// --- threads ---

// Many short jobs: each item once, on a thread that does one thing at a time.
void use(Pool& pool, int jobs, std::mt19937 own) {
    for (int job = 0; job < jobs; job++) {
        std::vector<int> done(own() % 40, 0);
        pool.run(int(done.size()), [&](int item, int thread) {
            check(thread >= 0 && thread < pool.threads(), "pool: thread %d of %d", thread, pool.threads());
            done[item]++;
        });
        check(std::all_of(done.begin(), done.end(), [](int n) { return n == 1; }), "pool: an item was not done once");
        if (job % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 600));
    }
}

void test_pool() {
    for (int threads : {1, 2, 3, 5}) {
        Pool pool(threads);
        check(pool.threads() == threads, "pool: %d threads", pool.threads());
        use(pool, 2000, std::mt19937(threads));
        // Two callers share the pool's threads by turns, so that a thread's number is a key to what it alone may touch.
        std::vector<std::atomic<int>> busy(threads);
        auto caller = [&](int seed) {
            std::mt19937 own(seed);
            for (int job = 0; job < 500; job++)
                pool.run(int(own() % 4), [&](int, int thread) {
                    check(busy[thread].fetch_add(1) == 0, "pool: thread %d does two things at once", thread);
                    busy[thread].fetch_sub(1);
                });
        };
        std::thread other(caller, 1);
        caller(2), other.join();
    }
    for (int turn = 0; turn < 300; turn++) {  // ended while its threads spin, fall asleep or sleep
        Pool pool(3);
        use(pool, turn % 3, std::mt19937(turn));
        std::this_thread::sleep_for(std::chrono::microseconds(turn % 5 * 70));
    }
}

void test_levels() {
    for (const char* name : {"sse9", "AVX2", " "}) {
        bool refused = false;
        try {
            select_kernels(name);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        check(refused, "an instruction set named %s", name);
    }
    check(select_kernels("") == select_kernels(available_kernels().back()), "the best is not the default");
}

template <class T, class W> void test_weights(Ops& ops) { test_linear<T, W>(ops), test_experts<T, W>(ops), test_embed<T, W>(ops); }

template <class T> void test_dtype(Ops& ops) {
    test_weights<T, T>(ops), test_norms<T>(ops), test_add_gated<T>(ops);
    test_rotated_heads<T>(ops, 9, 21, false);
    for (int half : {3, 8, 9, 16, 29}) test_rotated_heads<T>(ops, half, 2 * half + half % 3, true);
    test_attention<T>(ops), test_codes<T>(ops);
}

}  // namespace

int main() {
    test_levels(), test_pool();
    for (const std::string& name : available_kernels()) {
        level = name.c_str();
        generator.seed(0);  // the same numbers for each, whatever the levels before it drew
        check(std::string(select_kernels(name)->name) == name, "the kernels are called %s", select_kernels(name)->name);
        Ops ops(name, 2), portable("portable", 1);
        test_subnormals(ops), test_rotation(ops), test_route(ops), test_sampling(ops), test_shaping(ops);
        test_dtype<float>(ops), test_dtype<uint16_t>(ops);
        test_weights<float, f16>(ops), test_weights<float, uint16_t>(ops), test_float16(ops), test_formats(*select_kernels(name));
        test_blocks<float>(ops, portable), test_blocks<uint16_t>(ops, portable);
        std::printf("%s: passed\n", level);
    }
}
