// Keys and values in codes of 8 bits: how they are made, and attention over them, against plain loops over the same codes.
#pragma once
#include "naive_attention.h"

namespace {

// The float16 that is nearest to x, which one can hold; of two the even one.
uint16_t nearest_half(double x) {
    uint16_t best = 0;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        const double error = std::abs(value(f16{uint16_t(h)}) - x), least = std::abs(value(f16{best}) - x);
        if (error < least || (error == least && h % 2 == 0)) best = uint16_t(h);
    }
    return best;
}

template <class T> void test_quantising() {
    const Kernels& kernels = *select_kernels(level);
    for (int n : {1, 15, 16, 33, 128}) {
        const std::vector<float> less = draw<float>(n);
        for (double size : {1e-9, 1e-5, 1.0, 300.0, 1e6}) {
            std::vector<T> x = draw<T>(n, size);
            const bool offset = size == 1;
            std::vector<int8_t> codes(n, 99);
            const uint16_t scale = kernels.quantise[Number<T>::dtype](x.data(), offset ? less.data() : nullptr, n, codes.data());
            std::vector<float> held(n);
            float largest = 0;
            for (int i = 0; i < n; i++) held[i] = float(value(x[i])) - (offset ? less[i] : 0), largest = std::max(largest, std::abs(held[i]));
            check(scale == nearest_half(largest / 127.0f), "quantise: scale %x of %g", scale, largest / 127.0f);
            const float inverse = scale ? 1 / float(value(f16{scale})) : 0;
            for (int i = 0; i < n; i++) {
                const float expected = std::min(127.0f, std::max(-127.0f, std::nearbyintf(held[i] * inverse)));
                check(codes[i] == expected, "quantise: code %d of %g, not %g", codes[i], held[i], expected);
            }
        }
        for (double wrong : {double(INFINITY), double(NAN), 8.4e6, -8.4e6}) {
            std::vector<T> x = draw<T>(n);
            x[n / 2] = Number<T>::make(wrong);
            std::vector<int8_t> codes(n, 99);
            const uint16_t scale = kernels.quantise[Number<T>::dtype](x.data(), nullptr, n, codes.data());
            check(scale == 0x7e00 && std::count(codes.begin(), codes.end(), 0) == n, "quantise: a row with %g", wrong);
        }
    }
}

// One sequence with one kv head in a cache of codes, in which all else is no number.
template <class T> struct Coded {
    CacheShape shape;
    StepAttention step;
    std::vector<uint32_t> cache;
    std::vector<float> keys, values;  // what the codes stand for: (tokens, size of a key or of a value)

    Coded(Ops& ops, int block_size, int key_dim, int value_dim, int length, int fresh, const float* key_offset)
        : shape(block_size, 1, key_dim, value_dim, INT8_CACHE) {
        const int blocks = (length + block_size - 1) / block_size;
        cache.assign((blocks + 1) * shape.block_bytes() / 4, 0xffffffff);
        step.query_start = {0, fresh}, step.seq_lens = {length}, step.table_width = blocks, step.block_size = block_size;
        for (int i = 0; i < blocks; i++) step.block_table.push_back(blocks - i);
        std::vector<T> rows, q(size_t(length) * key_dim);
        std::vector<int64_t> slots;
        for (int t = 0; t < length; t++) {
            const std::vector<T> k = draw<T>(key_dim), v = draw<T>(value_dim);
            rows.insert(rows.end(), k.begin(), k.end()), rows.insert(rows.end(), k.begin(), k.end()), rows.insert(rows.end(), v.begin(), v.end());
            slots.push_back(int64_t(step.block_table[t / block_size]) * block_size + t % block_size);
            append(k, key_offset, keys), append(v, nullptr, values);
        }
        rows.shrink_to_fit(), slots.shrink_to_fit();
        ops.rotate_and_store({Number<T>::dtype, &shape, rows.data(), 1, false, nullptr, nullptr, 0, false, {nullptr, F32}, {nullptr, F32}, 0,
                              slots.data(), cache.data(), q.data(), key_offset},
                             length);
    }

    static void append(const std::vector<T>& row, const float* less, std::vector<float>& to) {
        std::vector<int8_t> codes(row.size());
        std::vector<float> wide(row.size());
        for (size_t i = 0; i < row.size(); i++) wide[i] = float(value(row[i])) - (less ? less[i] : 0);
        const uint16_t scale = select_kernels(level)->quantise[F32](wide.data(), nullptr, int(row.size()), codes.data());
        for (size_t i = 0; i < row.size(); i++) to.push_back(codes[i] * float(value(f16{scale})) + (less ? less[i] : 0));
    }
};

template <class T> void test_attention_over_codes(Ops& ops) {
    for (int turn = 0; turn < 24; turn++) {
        const int block_size = one_of({1, 3, 7, 8, 16, 24, 64}), group = one_of({1, 2, 4, 7, 71});
        const int key_dim = one_of({6, 8, 16, 33, 64, 80}), value_dim = turn % 2 ? key_dim : one_of({6, 16, 33, 80, 96});
        const int length = turn % 8 ? one_of({1, 16, 63, 64, 65, uniform(1, 200)}) : one_of({1023, 1030, 2050}), fresh = uniform(1, std::min(length, 20));
        const std::vector<float> offset = draw<float>(key_dim, 2);
        Scoring s{one_of({0, 0, 1, 5, 64, 67}), 1 / std::sqrt(float(key_dim)), one_of({0.0f, 0.0f, 5.0f}), {}};
        if (turn % 3 == 0) s.sinks = draw<float>(group);
        const float* key_offset = turn % 4 < 2 ? offset.data() : nullptr;
        Coded<T> c(ops, block_size, key_dim, value_dim, length, fresh, key_offset);
        c.step.window = s.window;
        std::vector<T> q = draw<T>(size_t(fresh) * group * key_dim), out(size_t(fresh) * group * value_dim);
        ops.attention({Number<T>::dtype, &c.shape, &c.step, c.cache.data(), q.data(), group, s.scale, s.softcap, s.sink_data(), out.data(), key_offset});
        for (int i = 0; i < fresh; i += 1 + fresh / 4)
            for (int h = 0; h < group; h += 1 + group / 8) {
                const T* row = &q[(size_t(i) * group + h) * key_dim];
                const int last = length - fresh + i, first = s.window ? std::max(0, last - s.window + 1) : 0;
                std::vector<double> weights;
                double largest = s.sinks.empty() ? -INFINITY : s.sinks[h], total = 0;
                for (int key = first; key <= last; key++) {
                    double score = 0;
                    for (int n = 0; n < key_dim; n++) score += value(row[n]) * c.keys[size_t(key) * key_dim + n];
                    score *= s.scale;
                    if (s.softcap != 0) score = s.softcap * std::tanh(score / s.softcap);
                    weights.push_back(score), largest = std::max(largest, score);
                }
                for (double& w : weights) total += w = std::exp(w - largest);
                if (!s.sinks.empty()) total += std::exp(s.sinks[h] - largest);
                for (int n = 0; n < value_dim; n++) {
                    Sum sum;
                    for (int key = first; key <= last; key++) sum.add(weights[key - first] / total * c.values[size_t(key) * value_dim + n]);
                    // Queries and weights of 16 bits are off by 2^-15 at most, of a few whose sizes differ; see also tests/ops.
                    close("attention over codes", out[(size_t(i) * group + h) * value_dim + n], sum.exact, (1.1 * Number<T>::roundoff + 0x1p-9) * sum.terms + 1e-3);
                }
            }
    }
}

template <class T> void test_codes(Ops& ops) { test_quantising<T>(), test_attention_over_codes<T>(ops); }

}  // namespace
