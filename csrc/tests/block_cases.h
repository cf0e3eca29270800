// Products with weights in blocks: the bits of the portable kernels, which tests/ops/test_block_products.py holds to the
// arithmetic written down in Python. Here for the sanitizers: every array ends where its last element does.
#pragma once
#include "naive.h"

namespace {

// Any bytes, with scales of about one hundredth.
std::vector<uint8_t> draw_blocks(Format format, size_t count) {
    const FormatSize size = FORMAT_SIZES[format];
    std::vector<uint8_t> bytes(count * size.bytes);
    for (uint8_t& byte : bytes) byte = uint8_t(uniform(0, 255));
    if (has_planes(format)) return bytes;
    for (size_t b = 0; b < count; b++) {
        uint8_t* block = bytes.data() + b * size.bytes;
        if (format == MXFP4) {
            block[0] = uint8_t(uniform(110, 130));
            continue;
        }
        auto put = [&](int at) {
            const f16 scale = Number<f16>::make(0.01 * normal());
            std::memcpy(block + at, &scale.bits, 2);
        };
        switch (format) {
            case Q2_K: put(80), put(82); break;
            case Q3_K: put(108); break;
            case Q6_K: put(208); break;
            case Q4_1: case Q5_1: case Q4_K: case Q5_K: put(0), put(2); break;
            default: put(0);
        }
    }
    return bytes;
}

// A matrix of random blocks, and where their scales lie elsewhere, groups of one or all blocks of a row.
struct Blocks {
    std::vector<uint8_t> bytes, scales;
    std::vector<int8_t> zeros;
    Matrix matrix;

    Blocks(Format format, int rows, int blocks) : bytes(draw_blocks(format, size_t(rows) * blocks)) {
        matrix = {format, rows, blocks * FORMAT_SIZES[format].elements, bytes.data()};
        if (!has_planes(format)) return;
        const ScaleType type = format == MXFP4_PLANES ? E8M0_SCALES : ScaleType(uniform(0, 2));
        const int each = one_of({1, blocks}), count = rows * (blocks / each);
        for (int i = 0; i < count; i++) {
            const float scale = 0.01f * float(normal());
            if (type == E8M0_SCALES) scales.push_back(uint8_t(uniform(110, 130)));
            else if (type == F32_SCALES) append(scale);
            else if (type == F16_SCALES) append(Number<f16>::make(scale));
            else append(Number<uint16_t>::make(scale));
            zeros.push_back(int8_t(uniform(-8, 8)));
        }
        zeros.shrink_to_fit(), scales.shrink_to_fit();
        matrix.groups = {type, each, scales.data(), format == INT4 && one_of({0, 1}) ? zeros.data() : nullptr,
                         is_affine(format) ? scales.data() : nullptr};
    }
    template <class Scale> void append(Scale scale) {
        const uint8_t* from = reinterpret_cast<const uint8_t*>(&scale);
        scales.insert(scales.end(), from, from + sizeof scale);
    }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

template <class T> void test_block_products(Ops& ops, Ops& portable, Format format) {
    const int elements = FORMAT_SIZES[format].elements;
    for (int blocks : {1, 2, 3, 4, 6, 8, 17, 260}) {
        const int outputs = one_of({1, 5, 16, 33}), rows = blocks > 200 ? one_of({2, 9}) : one_of({1, 2, 3, 5, 9, 17, 26, 70});
        const Blocks weights(format, outputs, blocks);
        const Linear l{Number<T>::dtype, blocks * elements, outputs, {{weights.matrix, nullptr, 0}}};
        std::vector<T> x = draw<T>(size_t(rows) * l.in);
        std::vector<float> out(size_t(rows) * outputs), expected(out.size());
        ops.linear(l, x.data(), rows, out.data(), true);
        portable.linear(l, x.data(), rows, expected.data(), true);
        check(same_bits(out, expected), "%s: other bits than the portable kernels' for %d x %d blocks -> %d", FORMAT_SIZES[format].name, rows,
              blocks, outputs);
        for (float value : out) check(std::isfinite(value), "%s: no number", FORMAT_SIZES[format].name);
    }
}

// Columns in an order of their own: the bits of the same matrix without one where rows of x are put into that order first. Beside
// it lie one with the same order, one with another and one with none.
template <class T> void test_ordered_columns(Ops& ops, Format format) {
    const int blocks = uniform(1, 5), k = blocks * FORMAT_SIZES[format].elements, outputs = one_of({1, 5, 16, 33}), rows = one_of({1, 3, 7, 9, 26});
    std::vector<Blocks> weights;
    for (int i = 0; i < 4; i++) weights.emplace_back(format, outputs, blocks);
    std::vector<int32_t> orders[2];
    for (std::vector<int32_t>& order : orders) {
        for (int i = 0; i < k; i++) order.insert(order.begin() + uniform(0, i), i);
        order.shrink_to_fit();
    }
    Linear l{Number<T>::dtype, k, 4 * outputs, {}};
    const int numbers[] = {1, 2, 0, 1};
    for (int i = 0; i < 4; i++) {
        Matrix w = weights[i].matrix;
        w.order_number = numbers[i];
        if (numbers[i]) w.order = std::make_shared<const std::vector<int32_t>>(orders[numbers[i] - 1]);
        l.layers.push_back({w, nullptr, i * outputs});
    }
    const std::vector<T> x = draw<T>(size_t(rows) * k);
    std::vector<float> out(size_t(rows) * l.out), alone(size_t(rows) * outputs);
    ops.linear(l, x.data(), rows, out.data(), true);
    for (int i = 0; i < 4; i++) {
        std::vector<T> taken = x;
        for (size_t at = 0; numbers[i] && at < taken.size(); at++) taken[at] = x[at / k * k + orders[numbers[i] - 1][at % k]];
        ops.linear({Number<T>::dtype, k, outputs, {{weights[i].matrix, nullptr, 0}}}, taken.data(), rows, alone.data(), true);
        for (int row = 0; row < rows; row++)
            check(std::memcmp(&alone[size_t(row) * outputs], &out[size_t(row) * l.out + i * outputs], outputs * sizeof(float)) == 0,
                  "%s: row %d of %d x %d is another in an order of its own", FORMAT_SIZES[format].name, row, rows, k);
    }
    std::vector<T> embedded(k), plain(k);
    const int64_t id = outputs - 1;
    ops.embed(Number<T>::dtype, l.layers[0].weight, &id, 1, 1.5f, embedded.data());
    ops.embed(Number<T>::dtype, weights[0].matrix, &id, 1, 1.5f, plain.data());
    for (int i = 0; i < k; i++)
        check(std::memcmp(&embedded[orders[0][i]], &plain[i], sizeof(T)) == 0, "%s: column %d is embedded elsewhere", FORMAT_SIZES[format].name, i);
}

template <class T> void test_block_rows(Ops& ops, Ops& portable, Format format) {
    const Blocks table(format, 7, uniform(1, 3));
    const int columns = table.matrix.columns;
    const std::vector<int64_t> ids = {6, 0, 3};
    std::vector<T> out(ids.size() * columns), expected(out.size());
    ops.embed(Number<T>::dtype, table.matrix, ids.data(), int(ids.size()), 1.5f, out.data());
    portable.embed(Number<T>::dtype, table.matrix, ids.data(), int(ids.size()), 1.5f, expected.data());
    check(out == expected, "%s: another embedding than the portable kernels'", FORMAT_SIZES[format].name);
}

// Experts of three formats: each row as when it is alone.
template <class T> void test_block_experts(Ops& ops) {
    constexpr int COUNT = 3, SIZE = 256, ROWS = 7, TOP = 2;
    Experts table{Number<T>::dtype, SIZE, SIZE, SILU, {}, {}, {}, {}, {}, {}};
    std::vector<std::vector<uint8_t>> held;
    const Format formats[] = {Q4_K, Q8_0, Q6_K};
    std::vector<Matrix>* kinds[] = {&table.gate, &table.up, &table.down};
    for (int kind = 0; kind < 3; kind++)
        for (int e = 0; e < COUNT; e++) {
            held.push_back(draw_blocks(formats[kind], SIZE * SIZE / FORMAT_SIZES[formats[kind]].elements));
            kinds[kind]->push_back({formats[kind], SIZE, SIZE, held.back().data()});
        }
    std::vector<T> x = draw<T>(ROWS * SIZE), inner(ROWS * TOP * SIZE), outer(inner.size()), out(ROWS * SIZE), alone(SIZE);
    std::vector<float> weights(ROWS * TOP, 0.5f);
    std::vector<int64_t> ids;
    for (int i = 0; i < ROWS * TOP; i++) ids.push_back(uniform(0, COUNT - 1));
    ops.experts(table, x.data(), ROWS, weights.data(), ids.data(), TOP, inner.data(), outer.data(), out.data());
    for (int t = 0; t < ROWS; t++) {
        ops.experts(table, x.data() + t * SIZE, 1, weights.data(), ids.data() + t * TOP, TOP, inner.data(), outer.data(), alone.data());
        check(std::memcmp(alone.data(), out.data() + t * SIZE, SIZE * sizeof(T)) == 0, "experts in blocks: row %d depends on others", t);
    }
}

// FP8 in blocks of all sizes, whose codes and scales end where they do: rows of a batch as when each is alone.
template <class T> void test_fp8(Ops& ops) {
    for (int k : {1, 31, 32, 64, 100, 257})
        for (int block : {k, 32, 64, 40}) {
            const int outputs = one_of({1, 5, 16, 33}), rows = one_of({2, 3, 5, 70}), blocks = (k + block - 1) / block;
            std::vector<uint8_t> codes(size_t(outputs) * k);
            for (uint8_t& code : codes) code = uint8_t(uniform(0, 126) | uniform(0, 1) << 7);
            std::vector<float> scales;
            for (int i = 0; i < outputs * blocks; i++) scales.push_back(0.01f * float(normal()));
            scales.shrink_to_fit();
            Matrix w{FP8, outputs, k, codes.data()};
            w.scales = std::make_shared<const std::vector<float>>(scales), w.block_columns = block;
            const Linear l{Number<T>::dtype, k, outputs, {{w, nullptr, 0}}};
            std::vector<T> x = draw<T>(size_t(rows) * k);
            std::vector<float> out(size_t(rows) * outputs), alone(outputs);
            ops.linear(l, x.data(), rows, out.data(), true);
            for (int i = 0; i < rows; i += 1 + rows / 4) {
                const std::vector<T> row(x.begin() + size_t(i) * k, x.begin() + size_t(i + 1) * k);
                ops.linear(l, row.data(), 1, alone.data(), true);
                check(std::memcmp(alone.data(), out.data() + size_t(i) * outputs, outputs * sizeof(float)) == 0,
                      "fp8: row %d of %d x %d -> %d depends on others", i, rows, k, outputs);
            }
        }
}

template <class T> void test_blocks(Ops& ops, Ops& portable) {
    test_fp8<T>(ops);
    for (int format = DENSE_FORMATS; format < FORMATS; format++) {
        test_block_products<T>(ops, portable, Format(format));
        test_block_rows<T>(ops, portable, Format(format));
        if (has_planes(Format(format))) test_ordered_columns<T>(ops, Format(format));
    }
    test_block_experts<T>(ops);
}

}  // namespace
