// Recurrent layers against plain loops in float64: sequences of any number of rows, states in any slots.
#pragma once
#include "naive.h"

namespace {

// Sequences of some lengths, with their states in slots that are no one else's, or kept nowhere.
StepStates draw_step(bool kept, int& slots) {
    StepStates step;
    step.query_start = {0};
    for (int n = uniform(0, 3); n > 0; n--) step.query_start.push_back(step.query_start.back() + one_of({0, 1, 2, 5, 17, 40}));
    slots = step.sequences() + 2;
    std::vector<int32_t> all(slots);
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), generator);
    step.kept = kept;
    if (kept) step.slots.assign(all.begin(), all.begin() + step.sequences());
    return step;
}

double gate_of(double x, GateFunction function) {
    const double sigmoid = 1 / (1 + std::exp(-x));
    if (function == IDENTITY_GATE) return x;
    return function == SILU_GATE ? x * sigmoid : function == SIGMOID_GATE ? sigmoid : x > 20 ? x : std::log1p(std::exp(x));
}

template <class T> void test_convolutions(Ops& ops) {
    for (int turn = 0; turn < 24; turn++) {
        const int taps = one_of({1, 2, 3, 4, 6}), channels = one_of({1, 7, 16, 50, 600}), start = uniform(0, 3), stride = start + channels + uniform(0, 2);
        int slots;
        const StepStates step = draw_step(turn % 3 != 0, slots);
        const bool silu = turn % 2, has_bias = turn % 5 < 2;
        const std::vector<T> x = draw<T>(size_t(step.rows()) * stride), weight = draw<T>(size_t(channels) * taps), bias = draw<T>(channels);
        const std::vector<T> before = draw<T>(size_t(slots) * (taps - 1) * channels);
        std::vector<T> state = before, out(size_t(step.rows()) * channels);
        ops.causal_conv({Number<T>::dtype, &step, x.data() + start, stride, channels, taps, weight.data(), Number<T>::dtype,
                         has_bias ? bias.data() : nullptr, Number<T>::dtype, step.kept ? state.data() : nullptr, silu, out.data()});
        std::vector<T> expected = before;
        for (int b = 0; b < step.sequences(); b++) {
            const int rows = step.query_start[b + 1] - step.query_start[b];
            for (int c = 0; c < channels; c++) {
                std::vector<T> inputs(taps - 1, T(0));
                auto kept = [&](std::vector<T>& in, int i) -> T& { return in[(size_t(step.slots[b]) * (taps - 1) + i) * channels + c]; };
                for (int i = 0; step.kept && i < taps - 1; i++) inputs[i] = before[(size_t(step.slots[b]) * (taps - 1) + i) * channels + c];
                for (int t = 0; t < rows; t++) inputs.push_back(x[size_t(step.query_start[b] + t) * stride + start + c]);
                for (int t = 0; t < rows; t++) {
                    Sum s = dot(&inputs[t], &weight[size_t(c) * taps], taps);
                    if (has_bias) s.add(value(bias[c]));
                    const double exact = silu ? gate_of(s.exact, SILU_GATE) : s.exact;
                    close("causal_conv", out[size_t(step.query_start[b] + t) * channels + c], exact,
                          (silu ? 2.3 : 1.1) * Number<T>::roundoff * std::abs(s.exact) + 0x1p-20 * s.terms);
                }
                for (int i = 0; step.kept && i < taps - 1; i++) kept(expected, i) = inputs[rows + i];
            }
        }
        check(state == expected, "causal_conv: what it keeps");
    }
}

// To the nearest T, ties to even.
template <class T> double nearest(double x) {
    const float f = float(x);
    if (Number<T>::dtype == F32) return f;
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return value(uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}

// A head's rows in float64, and its state after them.
template <class T> struct NaiveDelta {
    const DeltaSizes& z;
    std::vector<double> s;

    // How much is kept of each row of the state: as much of all, or by channels.
    std::vector<double> kept(const T* gates, const T* channels, int h, double decay, const float* dt_bias, ChannelDecay d) const {
        std::vector<double> kept(z.key_dim, std::exp(decay * gate_of(value(gates[z.value_heads + h]) + dt_bias[h], SOFTPLUS_GATE)));
        for (int i = 0; channels && i < z.key_dim; i++) {
            const int at = h * z.key_dim + i;
            const double x = value(channels[at]) + dt_bias[at];
            const double g = d.lower ? d.lower * gate_of(-decay * x, SIGMOID_GATE) : decay * gate_of(x, SOFTPLUS_GATE);
            kept[i] = std::exp(d.rounded ? nearest<T>(g) : g);
        }
        return kept;
    }

    std::vector<double> step(const T* qkv, const T* gates, int h, const std::vector<double>& kept) {
        const int key = z.key_head(h) * z.key_dim;
        auto unit = [&](const T* x) {
            std::vector<double> u(z.key_dim);
            for (int i = 0; i < z.key_dim; i++) u[i] = value(x[i]) / std::sqrt(dot(x, x, z.key_dim).exact + 1e-6);
            return u;
        };
        const std::vector<double> q = unit(qkv + key), k = unit(qkv + z.key_heads * z.key_dim + key);
        const double beta = nearest<T>(gate_of(value(gates[h]), SIGMOID_GATE));
        std::vector<double> out(z.value_dim);
        for (int j = 0; j < z.value_dim; j++) {
            double met = 0;
            for (int i = 0; i < z.key_dim; i++) met += kept[i] * s[i * z.value_dim + j] * k[i];
            const double u = beta * (value(qkv[z.values_at() + h * z.value_dim + j]) - met);
            for (int i = 0; i < z.key_dim; i++) {
                double& x = s[i * z.value_dim + j];
                x = kept[i] * x + k[i] * u, out[j] += x * q[i] / std::sqrt(z.key_dim);
            }
        }
        return out;
    }
};

template <class T> void test_gated_delta(Ops& ops) {
    for (int turn = 0; turn < 24; turn++) {
        const bool by_channels = turn % 2;
        const ChannelDecay decays = {turn % 4 == 1 ? -5.0f : 0.0f, turn % 8 < 4};
        const int key_heads = one_of({1, 2, 3});
        const DeltaSizes z = {key_heads, key_heads * one_of({1, 2}), one_of({1, 7, 16, 33}), one_of({1, 15, 32, 70, 150}), turn % 3 == 0};
        const int start = uniform(0, 3), stride = start + 2 * z.value_heads + uniform(0, 1);
        int slots;
        const StepStates step = draw_step(turn % 3 != 0, slots);
        const std::vector<T> qkv = draw<T>(size_t(step.rows()) * z.qkv()), gates = draw<T>(size_t(step.rows()) * stride, 3);
        const std::vector<T> channels = draw<T>(size_t(step.rows()) * z.value_heads * z.key_dim, 3);
        const int channels_stride = z.value_heads * z.key_dim;
        std::vector<float> decay = draw<float>(z.value_heads), dt_bias = draw<float>(by_channels ? channels_stride : z.value_heads);
        for (float& d : decay) d = -std::exp(d);
        const std::vector<float> before = draw<float>(size_t(slots) * z.value_heads * z.key_dim * z.value_dim);
        std::vector<float> state = before;
        std::vector<T> out(size_t(step.rows()) * z.out());
        ops.gated_delta({Number<T>::dtype, &step, z, qkv.data(), gates.data() + start, stride, decay.data(), dt_bias.data(),
                         step.kept ? state.data() : nullptr, out.data(), by_channels ? channels.data() : nullptr, channels_stride, decays});
        std::vector<bool> touched(state.size());
        const size_t of_a_head = size_t(z.key_dim) * z.value_dim;
        for (int b = 0; b < step.sequences(); b++)
            for (int h = 0; h < z.value_heads; h++) {
                const size_t at = step.kept ? (size_t(step.slots[b]) * z.value_heads + h) * of_a_head : 0;
                NaiveDelta<T> naive = {z, std::vector<double>(of_a_head)};
                if (step.kept) std::copy_n(&before[at], of_a_head, naive.s.begin());
                for (int t = step.query_start[b]; t < step.query_start[b + 1]; t++) {
                    const T* own = by_channels ? &channels[size_t(t) * channels_stride] : nullptr;
                    const std::vector<double> kept = naive.kept(&gates[size_t(t) * stride + start], own, h, decay[h], dt_bias.data(), decays);
                    const std::vector<double> o = naive.step(&qkv[size_t(t) * z.qkv()], &gates[size_t(t) * stride + start], h, kept);
                    for (int j = 0; j < z.value_dim; j++)
                        close("gated_delta", out[size_t(t) * z.out() + h * z.value_dim + j], o[j], 1.1 * Number<T>::roundoff * std::abs(o[j]) + 1e-4);
                }
                for (size_t i = 0; step.kept && i < of_a_head; i++) touched[at + i] = true, close("its state", state[at + i], naive.s[i], 1e-4);
            }
        for (size_t i = 0; i < state.size(); i++) check(touched[i] || state[i] == before[i], "gated_delta: a state that is no sequence's");
    }
}

template <class T> void test_selective_scans(Ops& ops) {
    for (int turn = 0; turn < 16; turn++) {
        const int groups = one_of({1, 2, 3});
        const ScanSizes z = {groups * one_of({1, 2}), one_of({1, 15, 32, 70}), one_of({1, 7, 16, 33}), groups};
        const int start = uniform(0, 3), stride = start + z.heads + uniform(0, 1);
        int slots;
        const StepStates step = draw_step(turn % 3 != 0, slots);
        const std::vector<T> xbc = draw<T>(size_t(step.rows()) * z.xbc()), dts = draw<T>(size_t(step.rows()) * stride, 3);
        std::vector<float> decay = draw<float>(z.heads), dt_bias = draw<float>(z.heads), skip = draw<float>(z.heads);
        for (float& d : decay) d = -std::exp(d);
        const std::vector<float> before = draw<float>(size_t(slots) * z.heads * z.state_dim * z.head_dim);
        std::vector<float> state = before;
        std::vector<T> out(size_t(step.rows()) * z.out());
        ops.selective_scan({Number<T>::dtype, &step, z, xbc.data(), dts.data() + start, stride, decay.data(), dt_bias.data(), skip.data(),
                            step.kept ? state.data() : nullptr, out.data()});
        std::vector<bool> touched(state.size());
        const size_t of_a_head = size_t(z.state_dim) * z.head_dim;
        for (int b = 0; b < step.sequences(); b++)
            for (int h = 0; h < z.heads; h++) {
                const size_t at = step.kept ? (size_t(step.slots[b]) * z.heads + h) * of_a_head : 0;
                std::vector<double> s(of_a_head);
                if (step.kept) std::copy_n(&before[at], of_a_head, s.begin());
                for (int t = step.query_start[b]; t < step.query_start[b + 1]; t++) {
                    const T* row = &xbc[size_t(t) * z.xbc()];
                    const double summed = nearest<T>(value(dts[size_t(t) * stride + start + h]) + nearest<T>(dt_bias[h]));
                    const double dt = nearest<T>(gate_of(summed, SOFTPLUS_GATE)), kept = std::exp(dt * decay[h]);
                    for (int j = 0; j < z.head_dim; j++) {
                        const double x = value(row[h * z.head_dim + j]);
                        double y = skip[h] * x;
                        for (int i = 0; i < z.state_dim; i++) {
                            double& held = s[i * z.head_dim + j];
                            held = kept * held + value(row[z.b_at(h) + i]) * dt * x, y += held * value(row[z.c_at(h) + i]);
                        }
                        close("selective_scan", out[size_t(t) * z.out() + h * z.head_dim + j], y, 1.1 * Number<T>::roundoff * std::abs(y) + (Number<T>::dtype == F32 ? 2e-3 : 0.3));
                    }
                }
                for (size_t i = 0; step.kept && i < of_a_head; i++) touched[at + i] = true, close("its state", state[at + i], s[i], Number<T>::dtype == F32 ? 1e-3 : 0.2);
            }
        for (size_t i = 0; i < state.size(); i++) check(touched[i] || state[i] == before[i], "selective_scan: a state that is no sequence's");
    }
}

template <class T, class W> void test_grouped_norms(Ops& ops) {
    for (int turn = 0; turn < 12; turn++) {
        const int rows = one_of({0, 1, 5}), groups = one_of({1, 3}), n = one_of({1, 16, 33, 100}), start = uniform(0, 2), stride = start + groups * n;
        const std::vector<T> x = draw<T>(size_t(rows) * groups * n), gates = draw<T>(size_t(rows) * stride, 4);
        const std::vector<W> weight = draw<W>(groups * n);
        std::vector<T> out(x.size());
        ops.grouped_norm({Number<T>::dtype, x.data(), gates.data() + start, stride, {weight.data(), Number<W>::dtype}, 1e-5f, groups, n, out.data()}, rows);
        std::vector<float> gated(x.size());
        for (size_t i = 0; i < x.size(); i++) gated[i] = float(value(x[i]) * gate_of(value(gates[i / (groups * n) * stride + start + i % (groups * n)]), SILU_GATE));
        for (size_t i = 0; i < x.size(); i++) {
            const double exact = gated[i] * inverse_rms(&gated[i / n * n], n, 1e-5f) * value(weight[i % (groups * n)]);
            const double u = Number<T>::roundoff, rounded = Number<W>::dtype == Number<T>::dtype ? 2.2 * u : 1.1 * u;
            close("grouped_norm", out[i], exact, (rounded + (n / 32.0 + 60) * 0x1p-24) * std::abs(exact));
        }
    }
}

template <class T, class W> void test_gated_norms(Ops& ops) {
    for (int turn = 0; turn < 12; turn++) {
        const int rows = one_of({0, 1, 5}), heads = one_of({1, 3}), n = one_of({1, 16, 33, 100}), start = uniform(0, 2), stride = start + heads * n;
        const GateFunction function = GateFunction(turn % 4);
        const std::vector<T> x = draw<T>(size_t(rows) * heads * n), gates = draw<T>(size_t(rows) * stride, 4);
        const std::vector<W> weight = draw<W>(n);
        std::vector<T> out(x.size());
        ops.gated_norm({Number<T>::dtype, x.data(), gates.data() + start, stride, {weight.data(), Number<W>::dtype}, 1e-5f, heads, n, function, out.data()}, rows);
        for (size_t i = 0; i < x.size(); i++) {
            const size_t row = i / (heads * n), column = i % (heads * n);
            const double exact = value(x[i]) * inverse_rms(&x[i / n * n], n, 1e-5f) * value(weight[i % n]) * gate_of(value(gates[row * stride + start + column]), function);
            const double u = Number<T>::roundoff, rounded = Number<W>::dtype == Number<T>::dtype ? 3.2 * u : 1.1 * u;
            close("gated_norm", out[i], exact, (rounded + (n / 32.0 + 40) * 0x1p-24) * std::abs(exact));
        }
    }
}

template <class T> void test_gates(Ops& ops) {
    for (int turn = 0; turn < 12; turn++) {
        const int rows = one_of({0, 1, 5}), heads = one_of({1, 3}), n = one_of({1, 16, 33}), start = uniform(0, 2), apart = n + uniform(0, 40);
        const bool single = turn % 2;
        const int stride = start + (heads - 1) * apart + (single ? 1 : n);
        const GateFunction function = GateFunction(turn % 4);
        const std::vector<T> x = draw<T>(size_t(rows) * heads * n), gates = draw<T>(size_t(rows) * stride, 9);
        std::vector<T> out(x.size());
        ops.gate_heads({Number<T>::dtype, x.data(), heads, n, gates.data() + start, stride, apart, single, function, out.data()}, rows);
        for (size_t i = 0; i < x.size(); i++) {
            const size_t row = i / (heads * n), head = i / n % heads, at = row * stride + start + head * apart + (single ? 0 : i % n);
            const double exact = value(x[i]) * gate_of(value(gates[at]), function);
            close("gate_heads", out[i], exact, (2.1 * Number<T>::roundoff + 0x1p-20) * std::abs(exact));
        }
    }
}

}  // namespace
