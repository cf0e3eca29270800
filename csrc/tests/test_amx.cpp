// The AMX kernels on emulated tiles (amx_tiles.h) against naive float64 loops, and against themselves bit for bit: a row's
// result may not depend on the rows beside it, on how columns are chunked, or on where the KV cache holds its keys.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "ops.h"

#define MOEBIUS_ISA tile_test
#define MOEBIUS_AMX_EMULATED
#include "amx_tiles.h"

using namespace moebius;
using tile_test::bf16;
using tile_test::to_float;

namespace {

std::mt19937 random_bits(1);
int failures = 0;

#define CHECK(condition, ...)                                                    \
    if (!(condition)) {                                                          \
        printf("%s:%d: %s failed: ", __FILE__, __LINE__, #condition);            \
        printf(__VA_ARGS__), printf("\n");                                       \
        if (++failures > 20) exit(1);                                            \
    }

bf16 to_bf16(float x) {
    bf16 out[16];
    tile_test::store(out, tile_test::all(x));
    return out[0];
}
bf16 draw(double scale = 1) { return to_bf16(float(std::normal_distribution<double>(0, scale)(random_bits))); }
std::vector<bf16> draw_many(size_t n, double scale = 1) {
    std::vector<bf16> values(n);
    for (bf16& v : values) v = draw(scale);
    return values;
}
bool same(const float* a, const float* b, size_t n) { return memcmp(a, b, n * sizeof(float)) == 0; }

// --- tiles ---

float dot_of(std::vector<float> left, std::vector<float> right, float before) {
    using namespace tile_test;
    const int pairs = int(left.size()) / 2;
    std::vector<bf16> a, b;
    for (float x : left) a.push_back(to_bf16(x));
    for (float x : right) b.push_back(to_bf16(x));
    TileShapes shapes;
    shapes.set(0, 8, 1, 4);
    shapes.set(1, 1, 1, 4 * pairs);
    shapes.set(2, 1, pairs, 4);
    configure_tiles(shapes);
    tile_load<0>(&before, 4), tile_load<1>(a.data(), 4 * pairs), tile_load<2>(b.data(), 4);
    tile_dot<0, 1, 2>();
    float after;
    tile_store<0>(&after, 4);
    release_tiles();
    return after;
}

void test_tiles() {
    const float big = 0x1p30f, tiny = 0x1p-100f, subnormal = 0x1p-130f;
    // Even and odd products apart: in one sum, in order, big would swallow the one that follows.
    CHECK(dot_of({big, 1, -big, 1}, {1, 1, 1, 1}, 0) == 2, "%g", dot_of({big, 1, -big, 1}, {1, 1, 1, 1}, 0));
    CHECK(dot_of({big, 1, 1, 1, -big, 1}, {1, 1, 1, 1, 1, 1}, 0) == 3, "the even sum loses its 1");
    // Products are summed from zero, and only then added to what was there.
    CHECK(dot_of({1, 0, 1, 0}, {1, 1, 1, 1}, 0x1p25f) == 0x1p25f, "2 is below half a unit");
    CHECK(dot_of({2, 0, 4, 0}, {1, 1, 1, 1}, 0x1p26f) == 0x1p26f + 8, "6 in one go rounds up to 8");
    CHECK(dot_of({2, 0, 2, 0}, {1, 1, 1, 1}, 0x1p26f) == 0x1p26f, "a half goes to the even one");
    // A product is not rounded before it is added: (1 + 2^-7)^2 - 1 - 2^-6 = 2^-14; subnormals count as zero.
    CHECK(dot_of({-1 - 0x1p-6f, 0, 1 + 0x1p-7f, 0}, {1, 0, 1 + 0x1p-7f, 0}, 0) == 0x1p-14f, "fused");
    CHECK(dot_of({subnormal, 0}, {big, 0}, 0) == 0, "subnormal input");
    CHECK(dot_of({0, 0}, {0, 0}, subnormal) == 0, "subnormal sum before");
    CHECK(dot_of({tiny, 0, 1, 0}, {0x1p-28f, 0, 0x1p-126f, 0}, 0) == 0x1p-126f, "subnormal product");
    CHECK(std::isnan(dot_of({0, 0}, {std::numeric_limits<float>::infinity(), 0}, 0)), "zero times infinity");
}

// Four neighbours at once of a row of bytes and a column of them, with signs, added to what was there.
void test_tiles_of_bytes() {
    using namespace tile_test;
    const int8_t left[8] = {-128, 127, 1, 2, 3, 4, 5, 6}, right[8] = {-128, -128, 1, -1, 10, 100, 0, 127};
    int32_t sum = 1000;
    TileShapes shapes;
    shapes.set(0, 8, 1, 4);
    shapes.set(1, 1, 1, 8);
    shapes.set(2, 1, 2, 4);
    configure_tiles(shapes);
    tile_load<0>(&sum, 4), tile_load<1>(left, 8), tile_load<2>(right, 4);
    tile_dot_of_bytes<0, 1, 2>();
    tile_store<0>(&sum, 4);
    release_tiles();
    // 16384 - 16256 + 1 - 2, and 30 + 400 + 0 + 762
    CHECK(sum == 1000 + 127 + 1192, "%d", sum);
}

// --- products ---

// Rows lie apart, each just as long as it has to be, so that reading over an end is found.
struct Rows {
    std::vector<std::vector<bf16>> rows;
    Rows(int count, int length) {
        for (int i = 0; i < count; i++) rows.push_back(draw_many(length));
    }
    std::vector<const void*> pointers(int first, int count) const {
        std::vector<const void*> p;
        for (int i = first; i < first + count; i++) p.push_back(rows[i].data());
        return p;
    }
};

// Columns [from, to) of rows [first, first + m), as product returns them.
std::vector<float> multiply(const Kernels& kernels, const Rows& x, int first, int m, const std::vector<bf16>& w, int ldw, int from, int to,
                            int k, bool fetch) {
    std::vector<char> packed(packed_bytes(m, k) + 64, char(0xff));  // no number
    void* at = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(packed.data()) + 63) / 64 * 64);
    kernels.pack[BF16](x.pointers(first, m).data(), m, k, at);
    const void* const rows[] = {at};
    std::vector<float> c(size_t(m) * (to - from), std::numeric_limits<float>::quiet_NaN());
    kernels.product[BF16][BF16_MATRIX](rows, m, w.data() + size_t(from) * ldw, ldw, to - from, k, fetch ? w.data() : nullptr, c.data(), to - from);
    return c;
}

void test_product(const Kernels& kernels, int m, int n, int k, int extra) {
    const int ldw = k + extra;
    Rows x(m, k);
    std::vector<bf16> w = draw_many(size_t(n) * ldw);
    w.resize(size_t(n - 1) * ldw + k), w.shrink_to_fit();
    std::vector<float> whole = multiply(kernels, x, 0, m, w, ldw, 0, n, k, true);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double sum = 0, size = 0;
            for (int l = 0; l < k; l++) {
                double product = double(to_float(x.rows[i][l])) * to_float(w[size_t(j) * ldw + l]);
                sum += product, size += std::abs(product);
            }
            float got = whole[size_t(i) * n + j];
            CHECK(std::abs(got - sum) <= size * 2e-7 * (2 + std::sqrt(k)), "m %d n %d k %d at %d %d: %g, not %g", m, n, k, i, j, got, sum);
        }
    for (int i = 0; i < m; i++) {
        std::vector<float> alone = multiply(kernels, x, i, 1, w, ldw, 0, n, k, false);
        CHECK(same(alone.data(), whole.data() + size_t(i) * n, n), "row %d of m %d n %d k %d differs from the row alone", i, m, n, k);
    }
    for (int from = 0, to; from < n; from = to) {
        to = std::min(n, from + 1 + int(random_bits() % 20));
        int first = random_bits() % m, count = 1 + random_bits() % (m - first);
        std::vector<float> part = multiply(kernels, x, first, count, w, ldw, from, to, k, true);
        for (int i = 0; i < count; i++)
            CHECK(same(part.data() + size_t(i) * (to - from), whole.data() + size_t(first + i) * n + from, to - from),
                  "columns %d to %d of rows %d + %d differ (m %d n %d k %d)", from, to, first, count, m, n, k);
    }
}

void test_products(const Kernels& kernels) {
    for (int m : {1, 2, 3, 5, 15, 16, 17, 31, 33, 48, 63, 64})
        for (int n : {1, 7, 16, 17, 32, 47, 65})
            for (int k : {1, 31, 32, 33, 64, 95}) test_product(kernels, m, n, k, 0);
    for (int m : {1, 4, 33}) test_product(kernels, m, 48, 1024, 0), test_product(kernels, m, 33, 515, 3);
}

// --- attention ---

struct Case {
    int head_dim, block_size, group, context, window;
    float softcap;
    bool sinks;
};

// Keys and values of one sequence with one kv head in a cache, of random blocks, in which all else is no number.
struct Cache {
    CacheShape shape;
    std::vector<uint32_t> groups;
    std::vector<int32_t> table;

    Cache(const Case& c, const std::vector<bf16>& k, const std::vector<bf16>& v) : shape(c.block_size, 1, c.head_dim, c.head_dim, BF16_CACHE) {
        const int blocks = (c.context + c.block_size - 1) / c.block_size;
        for (int i = 0; i < blocks; i++) table.push_back(blocks - 1 - i);
        groups.assign(shape.block_bytes() / 4 * blocks, ~0u);
        for (int i = 0; i < c.context; i++)
            write_kv(BF16, shape, groups.data(), k.data() + i * c.head_dim, v.data() + i * c.head_dim,
                     int64_t(table[i / c.block_size]) * c.block_size + i % c.block_size, 0);
    }
};

struct Attended {
    const Case& c;
    std::vector<bf16> q, k, v;  // (queries, group, head_dim), (context, head_dim) twice
    std::vector<float> sinks;
    int queries;

    Attended(const Case& c, int queries)
        : c(c), q(draw_many(size_t(queries) * c.group * c.head_dim, 2)), k(draw_many(size_t(c.context) * c.head_dim)),
          v(draw_many(size_t(c.context) * c.head_dim)), queries(queries) {
        for (int h = 0; h < c.group; h++) sinks.push_back(to_float(draw()));
    }

    // Queries [first, first + count), of which the last of all stands at the last key.
    std::vector<bf16> run(const Kernels& kernels, const Cache& cache, int first, int count) const {
        const size_t row = size_t(c.group) * c.head_dim;
        std::vector<bf16> part(q.begin() + first * row, q.begin() + (first + count) * row), out(count * row);
        const int position = c.context - queries + first;
        std::vector<int32_t> seen(cache.table.begin(), cache.table.begin() + (position + count - 1) / cache.shape.block_size + 1);
        const float scale = float(1 / std::sqrt(c.head_dim));
        AttentionBlock a = {part.data(), out.data(), row, row, count, c.group, position, c.window, scale, c.softcap,
                            c.sinks ? sinks.data() : nullptr, cache.groups.data(), seen.data(), 0};
        std::vector<float> scratch(attention_scratch(count * c.group, cache.shape), std::numeric_limits<float>::quiet_NaN());
        kernels.attention[BF16](a, cache.shape, scratch.data());
        return out;
    }

    std::vector<double> expected(int query, int head) const {
        const int last = c.context - queries + query, first = c.window ? std::max(0, last - c.window + 1) : 0;
        std::vector<double> scores, sum(c.head_dim);
        for (int i = first; i <= last; i++) {
            double score = 0;
            for (int n = 0; n < c.head_dim; n++)
                score += double(to_float(q[(size_t(query) * c.group + head) * c.head_dim + n])) * to_float(k[size_t(i) * c.head_dim + n]);
            score /= std::sqrt(c.head_dim);
            scores.push_back(c.softcap ? c.softcap * std::tanh(score / c.softcap) : score);
        }
        double total = c.sinks ? std::exp(double(sinks[head])) : 0;
        for (double s : scores) total += std::exp(s);
        for (int i = first; i <= last; i++)
            for (int n = 0; n < c.head_dim; n++) sum[n] += std::exp(scores[i - first]) / total * to_float(v[size_t(i) * c.head_dim + n]);
        return sum;
    }
};

void test_attention(const Kernels& kernels, const Case& c) {
    const int queries = std::min(c.context, 64 / c.group);
    Attended attended(c, queries);
    Cache cache(c, attended.k, attended.v);
    const size_t row = size_t(c.group) * c.head_dim;
    std::vector<bf16> whole = attended.run(kernels, cache, 0, queries);
    for (int i = 0; i < queries; i++)
        for (int h = 0; h < c.group; h++) {
            std::vector<double> expected = attended.expected(i, h);
            for (int n = 0; n < c.head_dim; n++) {
                double got = to_float(whole[i * row + h * c.head_dim + n]);
                CHECK(std::abs(got - expected[n]) < 0.004 + 0.008 * std::abs(expected[n]), "head_dim %d block %d group %d context %d: %g, not %g",
                      c.head_dim, c.block_size, c.group, c.context, got, expected[n]);
            }
        }
    auto compare = [&](const std::vector<bf16>& part, int first, const char* what) {
        CHECK(memcmp(part.data(), whole.data() + first * row, part.size() * 2) == 0, "%s: head_dim %d block %d group %d context %d, from %d",
              what, c.head_dim, c.block_size, c.group, c.context, first);
    };
    for (int i = 0; i < queries; i++) compare(attended.run(kernels, cache, i, 1), i, "alone");
    for (int first = 0, count; first < queries; first += count)
        count = std::min(queries - first, 1 + int(random_bits() % 20)), compare(attended.run(kernels, cache, first, count), first, "in part");
    for (int block_size : {5, 8, 16, 32, 48}) {
        Case other = c;
        other.block_size = block_size;
        compare(attended.run(kernels, Cache(other, attended.k, attended.v), 0, queries), 0, "another block size");
    }
}

void test_attentions(const Kernels& kernels) {
    for (int head_dim : {16, 33, 64, 80, 128})
        for (int group : {1, 4, 5, 16})
            for (int context : {1, 15, 16, 65, 200})
                test_attention(kernels, {head_dim, group == 4 ? 16 : 24, group, context, context == 200 ? 70 : 0, group == 5 ? 30.0f : 0.0f, group == 16});
    test_attention(kernels, {64, 16, 2, 2100, 0, 0, false});
    for (int head_dim : {256, 512}) test_attention(kernels, {head_dim, 16, 8, 130, head_dim == 256 ? 70 : 0, 0, false});
    test_attention(kernels, {96, 64, 1, 1100, 0, 0, true});
}

// --- whole operations, which share the packed rows between their items ---

std::vector<float> linear(Ops& ops, const Linear& l, const bf16* x, int rows) {
    std::vector<float> out(size_t(rows) * l.out);
    ops.linear(l, x, rows, out.data(), true);
    return out;
}

void test_linear(Ops& ops, Ops& other, int rows, int in) {
    std::vector<bf16> x = draw_many(size_t(rows) * in), first = draw_many(size_t(300) * in), second = draw_many(size_t(5) * in);
    std::vector<bf16> bias = draw_many(300);
    Linear l = {BF16, in, 305, {{{BF16_MATRIX, 300, in, first.data()}, bias.data(), 0}, {{BF16_MATRIX, 5, in, second.data()}, nullptr, 300}}};
    std::vector<float> whole = linear(ops, l, x.data(), rows), expected = linear(other, l, x.data(), rows);
    for (size_t i = 0; i < whole.size(); i++)
        CHECK(std::abs(whole[i] - expected[i]) < 1e-4 * std::sqrt(in), "linear %d x %d: %g, not %g", rows, in, whole[i], expected[i]);
    for (int i = 0; i < rows; i++)
        CHECK(same(linear(ops, l, x.data() + size_t(i) * in, 1).data(), whole.data() + size_t(i) * l.out, l.out), "linear, row %d of %d", i, rows);
}

void test_experts(Ops& ops, Ops& other, int rows) {
    const int hidden = 70, width = 45, count = 6, top_k = 3;
    std::vector<std::vector<bf16>> weights;
    Experts e = {BF16, hidden, width, SILU, {}, {}, {}, {}, {}, {}};
    for (auto* table : {&e.gate, &e.up, &e.down}) {
        const int to = table == &e.down ? hidden : width, from = table == &e.down ? width : hidden;
        for (int i = 0; i < count; i++) weights.push_back(draw_many(hidden * width, 0.3)), table->push_back({BF16_MATRIX, to, from, weights.back().data()});
    }
    std::vector<bf16> x = draw_many(size_t(rows) * hidden);
    std::vector<float> shares(rows * top_k, 0.5f);
    std::vector<int64_t> ids;
    for (int i = 0; i < rows; i++)
        for (int k = 0, from = int(random_bits() % count); k < top_k; k++) ids.push_back((from + k * k) % (i % 2 ? count : 2));
    auto run = [&](Ops& by, int first, int m) {
        std::vector<bf16> out(size_t(m) * hidden);
        std::vector<bf16> inner(size_t(m) * top_k * width), outer(size_t(m) * top_k * hidden);
        by.experts(e, x.data() + size_t(first) * hidden, m, shares.data(), ids.data() + size_t(first) * top_k, top_k, inner.data(),
                   outer.data(), out.data());
        return out;
    };
    std::vector<bf16> whole = run(ops, 0, rows), expected = run(other, 0, rows);
    for (size_t i = 0; i < whole.size(); i++)
        CHECK(std::abs(to_float(whole[i]) - to_float(expected[i])) < 0.1 + 0.02 * std::abs(to_float(expected[i])), "experts, %d rows: %g, not %g", rows,
              to_float(whole[i]), to_float(expected[i]));
    for (int i = 0; i < rows; i++)
        CHECK(memcmp(run(ops, i, 1).data(), whole.data() + size_t(i) * hidden, hidden * 2) == 0, "experts, row %d of %d", i, rows);
}

void test_operations() {
    Ops ops("amx_emulated", 2), other("portable", 1);
    for (int rows : {1, 2, 63, 64, 65, 150}) test_linear(ops, other, rows, 100), test_experts(ops, other, rows);
    test_linear(ops, other, 9, 1024);
}

}  // namespace

int main() {
    test_tiles(), test_tiles_of_bytes();
    if (!__builtin_cpu_supports("avx512bf16")) return printf("no AVX-512 BF16 here: the kernels around the tiles cannot run\n"), failures != 0;
    const Kernels& kernels = *amx_emulated::kernels();
    test_products(kernels);
    test_attentions(kernels);
    test_operations();
    printf(failures ? "%d failures\n" : "all passed\n", failures);
    return failures != 0;
}
