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

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

template <class T> void test_block_products(Ops& ops, Ops& portable, Format format) {
    const int elements = FORMAT_SIZES[format].elements;
    for (int blocks : {1, 2, 3, 4, 6, 8, 17, 260}) {
        const int outputs = one_of({1, 5, 16, 33}), rows = blocks > 200 ? one_of({2, 9}) : one_of({1, 2, 3, 5, 9, 17, 26, 70});
        const std::vector<uint8_t> weights = draw_blocks(format, size_t(outputs) * blocks);
        const Linear l{Number<T>::dtype, blocks * elements, outputs, {{{format, outputs, blocks * elements, weights.data()}, nullptr, 0}}};
        std::vector<T> x = draw<T>(size_t(rows) * l.in);
        std::vector<float> out(size_t(rows) * outputs), expected(out.size());
        ops.linear(l, x.data(), rows, out.data(), true);
        portable.linear(l, x.data(), rows, expected.data(), true);
        check(same_bits(out, expected), "%s: other bits than the portable kernels' for %d x %d blocks -> %d", FORMAT_SIZES[format].name, rows,
              blocks, outputs);
        for (float value : out) check(std::isfinite(value), "%s: no number", FORMAT_SIZES[format].name);
    }
}

template <class T> void test_block_rows(Ops& ops, Ops& portable, Format format) {
    const int columns = FORMAT_SIZES[format].elements * uniform(1, 3);
    const std::vector<uint8_t> table = draw_blocks(format, size_t(7) * columns / FORMAT_SIZES[format].elements);
    const std::vector<int64_t> ids = {6, 0, 3};
    std::vector<T> out(ids.size() * columns), expected(out.size());
    ops.embed(Number<T>::dtype, {format, 7, columns, table.data()}, ids.data(), int(ids.size()), 1.5f, out.data());
    portable.embed(Number<T>::dtype, {format, 7, columns, table.data()}, ids.data(), int(ids.size()), 1.5f, expected.data());
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

template <class T> void test_blocks(Ops& ops, Ops& portable) {
    for (int format = DENSE_FORMATS; format < FORMATS; format++) {
        test_block_products<T>(ops, portable, Format(format));
        test_block_rows<T>(ops, portable, Format(format));
    }
    test_block_experts<T>(ops);
}

}  // namespace
