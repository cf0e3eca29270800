// Attention over random sequences in a paged cache, and rotated heads, against plain loops.
#pragma once
#include "naive.h"

namespace {

// Sequences in a paged cache: random places, and NaN wherever nothing was written.
template <class T> struct Paged {
    CacheShape shape;
    StepAttention step;
    std::vector<uint32_t> cache;
    std::vector<std::vector<T>> keys, values;  // of each sequence: (tokens, kv heads, size of a key or of a value)

    Paged(int block_size, int kv_heads, int key_dim, int value_dim, const std::vector<int>& lengths, const std::vector<int>& fresh, bool shared = false)
        : shape(block_size, kv_heads, key_dim, value_dim, CacheType(Number<T>::dtype), shared) {
        int blocks = 2;
        for (int n : lengths) {
            const int needed = (n + block_size - 1) / block_size;
            step.table_width = std::max(step.table_width, needed), blocks += needed;
        }
        std::vector<int> order(blocks);
        std::iota(order.begin(), order.end(), 0);
        std::shuffle(order.begin(), order.end(), generator);
        cache.assign(blocks * shape.block_bytes() / 4, 0xffffffff);
        step.query_start = {0}, step.seq_lens.assign(lengths.begin(), lengths.end());
        step.block_table.assign(lengths.size() * step.table_width, 0);
        for (size_t b = 0; b < lengths.size(); b++) {
            step.query_start.push_back(step.query_start.back() + fresh[b]);
            for (int i = 0; i * block_size < lengths[b]; i++) step.block_table[b * step.table_width + i] = order.back(), order.pop_back();
            keys.push_back(draw<T>(size_t(lengths[b]) * kv_heads * key_dim));
            values.push_back(draw<T>(size_t(lengths[b]) * kv_heads * value_dim));
            for (int t = 0; shared && t < lengths[b]; t++) std::copy_n(&keys[b][size_t(t) * key_dim], value_dim, &values[b][size_t(t) * value_dim]);
        }
    }
    int64_t slot(int b, int position) const {
        const int64_t block = step.block_table[b * step.table_width + position / shape.block_size];
        return block * shape.block_size + position % shape.block_size;
    }
    void write(Ops& ops) {
        const int key_size = shape.kv_heads * shape.key_dim, value_size = shape.kv_heads * shape.value_dim;
        for (size_t b = 0; b < keys.size(); b++) {
            const int n = step.seq_lens[b];
            for (int t = 0; shape.shared && t < n; t++) write_key(Number<T>::dtype, shape, cache.data(), &keys[b][size_t(t) * key_size], slot(int(b), t), 0);
            if (shape.shared) continue;
            std::vector<T> rows, q(keys[b].size());
            std::vector<int64_t> slots;
            for (int t = 0; t < n; t++) {
                for (int twice = 0; twice < 2; twice++)
                    rows.insert(rows.end(), keys[b].begin() + t * key_size, keys[b].begin() + (t + 1) * key_size);
                rows.insert(rows.end(), values[b].begin() + t * value_size, values[b].begin() + (t + 1) * value_size);
                slots.push_back(slot(int(b), t));
            }
            rows.shrink_to_fit(), slots.shrink_to_fit();
            ops.rotate_and_store({Number<T>::dtype, &shape, rows.data(), shape.kv_heads, false, nullptr, nullptr, 0, false, {nullptr, F32},
                                  {nullptr, F32}, 0, slots.data(), cache.data(), q.data()}, n);
            check(q == keys[b], "rotate_and_store changed what it should not rotate");
        }
    }
};

struct Scoring {
    int window;
    float scale, softcap;
    std::vector<float> sinks;  // none, or one a head
    const float* sink_data() const { return sinks.empty() ? nullptr : sinks.data(); }
};

template <class T> void check_row(const Paged<T>& p, const Scoring& s, const T* q, const T* out, int b, int position, int head, int group) {
    const int n = p.shape.key_dim, m = p.shape.value_dim, stride = p.shape.kv_heads * n, first = s.window ? std::max(0, position - s.window + 1) : 0;
    std::vector<double> weights;
    double largest = s.sinks.empty() ? -INFINITY : s.sinks[head], total = 0;
    for (int key = first; key <= position; key++) {
        double score = s.scale * dot(q, &p.keys[b][size_t(key) * stride + head / group * n], n).exact;
        if (s.softcap != 0) score = s.softcap * std::tanh(score / s.softcap);
        weights.push_back(score), largest = std::max(largest, score);
    }
    for (double& w : weights) total += w = std::exp(w - largest);
    if (!s.sinks.empty()) total += std::exp(s.sinks[head] - largest);
    for (int i = 0; i < m; i++) {
        Sum sum;
        for (int key = first; key <= position; key++)
            sum.add(weights[key - first] / total * value(p.values[b][(size_t(key) * p.shape.kv_heads + head / group) * m + i]));
        // Rounded: each weight, and the result. Scores are below 64, and so exp's argument is off by 64 * 2^-23 at most.
        close("attention", out[i], sum.exact, (2.1 * Number<T>::roundoff + 64 * 0x1p-23) * sum.terms);
    }
}

// The kernel itself on one sequence's first query, with as much scratch as it asked for and no more.
template <class T>
void check_scratch(const Kernels& kernels, const Paged<T>& p, const Scoring& s, const std::vector<T>& q, const std::vector<T>& out, int group) {
    const size_t heads = size_t(group) * p.shape.kv_heads;
    const int rows = std::min(group, 64);
    std::vector<T> again(rows * size_t(p.shape.value_dim));
    std::vector<float> scratch(attention_scratch(rows, p.shape));
    const int first = p.step.seq_lens[0] - p.step.query_start[1];
    AttentionBlock a{q.data(), again.data(), heads * p.shape.key_dim, heads * p.shape.value_dim, 1, rows, first, s.window, s.scale, s.softcap, s.sink_data(),
                     p.cache.data(), p.step.block_table.data(), 0};
    kernels.attention[Number<T>::dtype](a, p.shape, scratch.data());
    check(std::equal(again.begin(), again.end(), out.begin()), "attention: the kernel and the operation differ");
}

template <class T> void test_attention(Ops& ops) {
    for (int turn = 0; turn < 30; turn++) {
        const bool shared = turn % 3 == 1;  // values are the first numbers of keys
        const int block_size = one_of({1, 3, 7, 8, 16, 24, 64}), kv_heads = shared ? 1 : uniform(1, 2), group = one_of({1, 2, 4, 7, 71});
        const int key_dim = one_of({6, 8, 16, 33, 64, 80, 256}), apart = turn % 2 ? key_dim : one_of({6, 16, 33, 80, 96});
        const int value_dim = shared ? uniform(1, key_dim) : apart;
        std::vector<int> lengths, fresh;
        for (int b = 0; b < 3; b++) {
            const bool is_long = turn % 10 == 0;
            const int some = one_of({1, block_size, block_size + 1, 63, 64, 65, uniform(1, 200)});
            lengths.push_back(is_long ? one_of({1023, 1024, 1030, 2050}) : some);
            fresh.push_back(is_long ? 1 + b : uniform(1, std::min(some, 20)));
        }
        Paged<T> p(block_size, kv_heads, key_dim, value_dim, lengths, fresh, shared);
        p.write(ops);
        Scoring s{shared ? 0 : one_of({0, 0, 1, 5, 64, 67}), 1 / std::sqrt(float(key_dim)), one_of({0.0f, 0.0f, 5.0f}), {}};
        if (turn % 3 == 0) s.sinks = draw<float>(kv_heads * group);
        p.step.window = s.window;
        const int heads = kv_heads * group, rows = p.step.query_start.back();
        std::vector<T> q = draw<T>(size_t(rows) * heads * key_dim, 2), out(size_t(rows) * heads * value_dim);
        ops.attention({Number<T>::dtype, &p.shape, &p.step, p.cache.data(), q.data(), heads, s.scale, s.softcap, s.sink_data(), out.data()});
        check_scratch(*select_kernels(level), p, s, q, out, group);
        for (int b = 0; b < 3; b++)
            for (int i = 0; i < fresh[b]; i += 1 + fresh[b] / 4)
                for (int h = 0; h < heads; h += 1 + heads / 8) {
                    const size_t at = size_t(p.step.query_start[b] + i) * heads + h;
                    check_row(p, s, &q[at * key_dim], &out[at * value_dim], b, lengths[b] - fresh[b] + i, h, group);
                }
    }
}

// W: of norms' weights. gated: there are gates behind each query head. turned_first: rotated before they are normed.
template <class T, class W> void test_rotated_heads(Ops& ops, int half, int head_dim, bool interleaved, bool gated, bool turned_first = false) {
    const int rows = 11, group = 2, head = gated ? 2 * head_dim : head_dim, row = group * head + 2 * head_dim;
    for (bool norm : {false, true}) {
        std::vector<T> qkv = draw<T>(rows * row), q(rows * group * head_dim);
        std::vector<W> weight = draw<W>(head_dim);
        std::vector<float> cos = draw<float>(rows * half), sin = draw<float>(rows * half);
        CacheShape shape(4, 1, head_dim, head_dim, CacheType(Number<T>::dtype));
        std::vector<uint32_t> cache(3 * shape.block_bytes() / 4);
        std::vector<int64_t> slots(rows);
        std::iota(slots.begin(), slots.end(), 0);
        const NormWeight w = {norm ? weight.data() : nullptr, Number<W>::dtype};
        ops.rotate_and_store({Number<T>::dtype, &shape, qkv.data(), group, gated, cos.data(), sin.data(), half, interleaved, w, w, 1e-5f,
                              slots.data(), cache.data(), q.data(), nullptr, turned_first}, rows);
        for (int t = 0; t < rows; t++)
            for (int h = 0; h < group; h++) {
                const T* x = &qkv[t * row + h * head];
                std::vector<double> v(head_dim);
                for (int i = 0; i < head_dim; i++)
                    v[i] = value(x[i]) * (norm && !turned_first ? inverse_rms(x, head_dim, 1e-5f) * value(weight[i]) : 1);
                std::vector<double> exact = v, terms(head_dim);
                for (int i = 0; i < head_dim; i++) {
                    const bool first = interleaved ? i % 2 == 0 : i < half;
                    const int pair = i + (first ? 1 : -1) * (interleaved ? 1 : half), r = t * half + (interleaved ? i / 2 : first ? i : pair);
                    terms[i] = std::abs(v[i]);
                    if (i < 2 * half) {
                        exact[i] = v[i] * cos[r] + (first ? -1 : 1) * v[pair] * sin[r];
                        terms[i] = std::abs(v[i] * cos[r]) + std::abs(v[pair] * sin[r]);
                    }
                }
                double squares = 0;
                for (double turned : exact) squares += turned * turned;
                const double scale = norm && turned_first ? 1 / std::sqrt(squares / head_dim + 1e-5f) : 1;
                for (int i = 0; i < head_dim; i++) {
                    const double weighed = scale * (norm && turned_first ? value(weight[i]) : 1);
                    const double bound = (turned_first ? 4.1 : 3.1) * Number<T>::roundoff + 0x1p-20;
                    close("rotated head", q[(t * group + h) * head_dim + i], exact[i] * weighed, bound * terms[i] * std::abs(weighed));
                }
            }
    }
}

}  // namespace
