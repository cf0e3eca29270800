#include "bytes.h"
#include "ops.h"
#include "will_need.h"
#if defined(MOEBIUS_HAS_AMX)
#include "amx_present.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace moebius {
namespace {

constexpr size_t CHUNK = 128 << 10;  // bytes of weights that one item reads, at most

int divided_up(int a, int b) { return (a + b - 1) / b; }
int rounded_up(int a, int b) { return divided_up(a, b) * b; }

template <class T> void take_columns(const T* from, const std::vector<int32_t>& order, T* to) {
    for (size_t i = 0; i < order.size(); i++) to[i] = from[order[i]];
}

struct Level {
    const char* name;
    const Kernels* (*kernels)();
    bool (*present)();
};

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
[[maybe_unused]] bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
[[maybe_unused]] bool has_avx512bf16() {
    return has_avx512vnni() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
#endif
#if defined(MOEBIUS_HAS_AMX)
bool has_amx() { return has_avx512bf16() && amx_present(); }
#endif
bool always() { return true; }

const Level LEVELS[] = {  // worst first, of those that were compiled
    {"portable", portable::kernels, always},
#if defined(MOEBIUS_HAS_AMX_EMULATED)
    {"amx_emulated", amx_emulated::kernels, has_avx512bf16},
#endif
#if defined(MOEBIUS_HAS_AVX2)
    {"avx2", avx2::kernels, has_avx2},
#endif
#if defined(MOEBIUS_HAS_AVX512)
    {"avx512", avx512::kernels, has_avx512},
#endif
#if defined(MOEBIUS_HAS_AVX512VNNI)
    {"avx512vnni", avx512vnni::kernels, has_avx512vnni},
#endif
#if defined(MOEBIUS_HAS_AVX512BF16)
    {"avx512bf16", avx512bf16::kernels, has_avx512bf16},
#endif
#if defined(MOEBIUS_HAS_AMX)
    {"amx", amx::kernels, has_amx},
#endif
#if defined(MOEBIUS_HAS_NEON)
    {"neon", neon::kernels, always},
#endif
};

}  // namespace

std::vector<std::string> available_kernels() {
    std::vector<std::string> names;
    for (const Level& level : LEVELS)
        if (level.present()) names.push_back(level.name);
    return names;
}

const Kernels* select_kernels(const std::string& limit) {
    const Kernels* best = nullptr;
    for (const Level& level : LEVELS) {
        if (level.present()) best = level.kernels();
        if (limit == level.name) {
            if (!level.present()) throw std::invalid_argument("this processor has no " + limit);
            return best;
        }
    }
    if (!limit.empty()) throw std::invalid_argument("unknown instruction set " + limit);
    return best;
}

size_t Ops::scratch_bytes() const {
    size_t sum = shared_.bytes() + tiles_.capacity();
    for (const Scratch& s : scratch_) sum += s.bytes();
    return sum;
}

size_t Ops::most_scratch_bytes(int widest, const CacheShape& shape, int context) const {
    const size_t product = size_t(ROW_BLOCK) * MOST_COLUMNS * 2, attention = attention_need(shape);
    size_t of_a_thread = (std::max(product, attention) + Scratch::SPARE) * sizeof(float) + packed_bytes(ROW_BLOCK, widest) + 64;
    of_a_thread += most_widened_bytes(widest) + widest * sizeof(float) + 64;
    if (!float_activations_) for (BlockSize size : {BY_32, BY_256, PAIRS_BY_32}) of_a_thread += ROW_BLOCK * QuantisedShape(size, widest).row_bytes() + 64;
    const size_t splits = std::min((few_items() - 1) * most_splits(context), wave() - 1 + most_splits(context));
    of_a_thread += most_panel_bytes(widest);
    return threads() * of_a_thread + most_tile_bytes(widest) + (splits * split_need(shape) + Scratch::SPARE) * sizeof(float);
}

// Columns of an item, of so many in all: as many threads as there are have as many items each.
int Ops::item_columns(size_t row_bytes, int columns) const {
    const int most = int(std::clamp<size_t>(CHUNK / row_bytes / 16 * 16, 16, MOST_COLUMNS));
    const int items = rounded_up(divided_up(columns, most), threads());
    return std::min(most, rounded_up(divided_up(columns, items), 16));
}

void Ops::linear(const Linear& l, const void* x, int rows, void* out, bool wide) {
    std::lock_guard<std::mutex> only(one_caller_);
    const size_t size = size_of(l.dtype);
    const int blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    auto chunks_of = [&](const Matrix& w) {
        if (by_panels(rows, {w.format})) return 0;
        return divided_up(w.rows, item_columns(w.row_bytes(), w.rows));
    };
    int chunks = 0;
    for (const Linear::Layer& layer : l.layers) chunks += chunks_of(layer.weight);
    calls_++;
    pool_.run(chunks * blocks, [&](int item, int thread) {
        // Neighbouring items read neighbouring weights where there is one block of rows, the same rows where there are more.
        int chunk = item % chunks, first = item / chunks * ROW_BLOCK, m = std::min(ROW_BLOCK, rows - first);
        const Linear::Layer* layer = l.layers.data();
        for (int here; chunk >= (here = chunks_of(layer->weight)); layer++) chunk -= here;
        const Matrix& w = layer->weight;
        const int columns = item_columns(w.row_bytes(), w.rows), column = chunk * columns, n = std::min(columns, w.rows - column);
        float* c = scratch_[thread].need(size_t(ROW_BLOCK) * MOST_COLUMNS * 2);
        const void* x_rows[ROW_BLOCK];
        for (int i = 0; i < m; i++) x_rows[i] = at(x, (first + i) * (l.in * size));
        const int ahead = column + columns;
        const void* next = ahead < w.rows ? w.row(ahead)
                           : layer + 1 < l.layers.data() + l.layers.size() ? layer[1].weight.data : nullptr;
        product(l.dtype, x_rows, first, m, w, column, next, c, n, scratch_[thread]);
        store_columns(l, *layer, {0, first, m, column, n}, c, out, wide);
    });
    linear_by_panels(l, x, rows, out, wide);
}

void Ops::store_columns(const Linear& l, const Linear::Layer& layer, const Product& p, const float* c, void* out, bool wide) {
    const size_t size = size_of(l.dtype);
    const void* bias = layer.bias ? at(layer.bias, p.column * size) : nullptr;
    for (int i = 0; i < p.count; i++) {
        const size_t to = size_t(p.first + i) * l.out + layer.offset + p.column;
        if (wide) {
            float* row = static_cast<float*>(out) + to;
            std::copy_n(c + size_t(i) * p.columns, p.columns, row);
            if (bias) kernels_->add_bias[l.dtype](row, p.columns, bias);
        } else {
            kernels_->store[l.dtype](c + size_t(i) * p.columns, p.columns, bias, at(out, to * size));
        }
    }
}

void Ops::product(Dtype dtype, const void* const* x, int first, int m, const Matrix& w, int column, const void* next, float* c,
                  int columns, Scratch& s) {
    const int k = w.columns;
    if (by_codes(w)) return fp8_product(dtype, x, first, m, w, column, next, c, columns, s);
    if (w.format == FP8 || (is_blocks(w.format) && float_activations_)) return widened_product(dtype, x, first, m, w, column, c, columns, s);
    if (w.format == F32_MATRIX && dtype != F32) return wide_product(dtype, x, first, m, w, column, next, c, columns, s);
    if (is_blocks(w.format)) {
        const BlockSize size = block_size(w.format);
        const BlockKernels& kernels = *kernels_->blocks;
        const void* rows = packed(s.packed[1 + size], first, m * QuantisedShape(size, k).row_bytes(),
                                  [&](void* to) { quantise(dtype, size, x, m, k, w.order.get(), s, to); }, 0, w.order.get());
        return kernels.product[w.format - DENSE_FORMATS](rows, m, w.row(column), columns, w.blocks(), w.groups_from(column), next, c, columns);
    }
    if (ordered_) return kernels_->ordered[dtype][w.format](x, m, w.row(column), columns, k, c, columns);
    const auto kernel = kernels_->product[dtype][w.format];
    if (!kernels_->pack[dtype]) return kernel(x, m, w.row(column), k, columns, k, next, c, columns);
    const void* const rows[] = {packed(s.packed[0], first, packed_bytes(m, k), [&](void* to) { kernels_->pack[dtype](x, m, k, to); })};
    kernel(rows, m, w.row(column), k, columns, k, next, c, columns);
}

void Ops::quantise(Dtype dtype, BlockSize size, const void* const* x, int m, int k, const std::vector<int32_t>* order, Scratch& s,
                   void* to) const {
    const auto kernel = kernels_->blocks->quantise[dtype][size];
    if (!order) return kernel(x, m, k, to);
    if (s.ordered.size() < k * size_of(dtype) + 64) Scratch::renew(s.ordered, k * size_of(dtype) + 64);
    void* row = Scratch::aligned(s.ordered.data());
    const void* const rows[] = {row};
    for (int i = 0; i < m; i++) {
        if (dtype == F32) take_columns(static_cast<const uint32_t*>(x[i]), *order, static_cast<uint32_t*>(row));
        else take_columns(static_cast<const uint16_t*>(x[i]), *order, static_cast<uint16_t*>(row));
        kernel(rows, 1, k, at(to, i * QuantisedShape(size, k).row_bytes()));
    }
}

// One item for each expert, block of its rows and chunk of columns; experts without rows cost nothing.
template <class Takes, class RowBytes>
void Ops::plan_products(int columns_in_all, const Takes& takes, const RowBytes& row_bytes) {
    const int experts = int(starts_.size()) - 1;
    products_.clear();
    for (int e = 0; e < experts; e++) {
        if (starts_[e] == starts_[e + 1] || !takes(e)) continue;
        const int columns = item_columns(row_bytes(e), columns_in_all);
        for (int first = starts_[e]; first < starts_[e + 1]; first += ROW_BLOCK)
            for (int column = 0; column < columns_in_all; column += columns)
                products_.push_back({e, first, std::min(ROW_BLOCK, starts_[e + 1] - first), column,
                                     std::min(columns, columns_in_all - column)});
    }
}

void Ops::sort_pairs(const Experts& e, const int64_t* ids, int pairs, bool skip) {
    const int count = int(e.gate.size()), most = skip ? count : count - 1;
    starts_.assign(count + 2, 0);
    pairs_.resize(pairs);
    for (int p = 0; p < pairs; p++) {
        const int64_t id = ids ? ids[p] : 0;
        if (id < 0 || id > most) throw std::out_of_range("expert id " + std::to_string(id) + " is none of " + std::to_string(count));
        starts_[id + 1]++;
    }
    if (e.holes)
        for (int i = 0; i < count; i++)
            if (starts_[i + 1] && !e.gate[i].data) throw std::out_of_range("expert " + std::to_string(i) + " is not held here");
    for (int i = 0; i < count; i++) starts_[i + 1] += starts_[i];
    for (int p = 0; p < pairs; p++) pairs_[starts_[ids ? ids[p] : 0]++] = p;
    for (int i = count; i > 0; i--) starts_[i] = starts_[i - 1];
    starts_[0] = 0;
    starts_.pop_back();
}

void Ops::fetch(const Experts& e) const {
    if (!e.on_disk) return;
    for (size_t i = 0; i < e.gate.size(); i++)
        if (starts_[i + 1] > starts_[i])
            for (const std::vector<Matrix>* matrices : {&e.gate, &e.up, &e.down}) {
                if (matrices->empty()) continue;
                const Matrix& w = (*matrices)[i];
                will_need(w.data, w.bytes());
                if (w.groups.data) will_need(w.groups.data, w.rows * w.groups_of_a_row() * SCALE_BYTES[w.groups.type]);
            }
}

void Ops::pair_rows(const Experts& e, const void* x, int top_k, void* inner, void* out) {
    const size_t size = size_of(e.dtype), hidden_bytes = e.hidden * size, width_bytes = e.width * size;
    plan_products(e.width, [&](int expert) { return !gate_by_panels(e, expert); }, [&](int expert) {
        return e.gate_rows() * e.gate[expert].row_bytes() + (e.up.empty() ? 0 : e.up[expert].row_bytes());
    });
    calls_++;
    pool_.run(int(products_.size()), [&](int item, int thread) {
        const Product& p = products_[item];
        float* gate = scratch_[thread].need(size_t(ROW_BLOCK) * MOST_COLUMNS * 2);
        float* up = gate + size_t(ROW_BLOCK) * MOST_COLUMNS;
        const void* x_rows[ROW_BLOCK];
        for (int i = 0; i < p.count; i++) x_rows[i] = at(x, pairs_[p.first + i] / top_k * hidden_bytes);
        const Product* then = item + 1 < int(products_.size()) ? &p + 1 : nullptr;
        const Matrix &gate_w = e.gate[p.weights], *up_w = e.up.empty() ? nullptr : &e.up[p.weights];
        const void* next = then ? e.gate[then->weights].row(e.gate_rows() * then->column) : e.down[p.weights].data;
        // A row alone is the same one for all experts that it chose: packed once.
        const int rows = p.count == 1 ? -1 - pairs_[p.first] / top_k : p.first;
        product(e.dtype, x_rows, rows, p.count, gate_w, e.gate_rows() * p.column, up_w ? up_w->row(p.column) : next, gate,
                e.gate_rows() * p.columns, scratch_[thread]);
        if (up_w) product(e.dtype, x_rows, rows, p.count, *up_w, p.column, next, up, p.columns, scratch_[thread]);
        store_gated(e, p, gate, up, inner);
    });
    gate_and_up_by_panels(e, x, top_k, inner);

    plan_products(e.hidden, [&](int expert) { return !down_by_panels(e, expert); }, [&](int expert) { return e.down[expert].row_bytes(); });
    calls_++;
    pool_.run(int(products_.size()), [&](int item, int thread) {
        const Product& p = products_[item];
        float* c = scratch_[thread].need(size_t(ROW_BLOCK) * MOST_COLUMNS * 2);
        const void* h_rows[ROW_BLOCK];
        for (int i = 0; i < p.count; i++) h_rows[i] = at(inner, (p.first + i) * width_bytes);
        const Product* then = item + 1 < int(products_.size()) ? &p + 1 : nullptr;
        const void* next = then ? e.down[then->weights].row(then->column) : nullptr;
        product(e.dtype, h_rows, p.first, p.count, e.down[p.weights], p.column, next, c, p.columns, scratch_[thread]);
        store_down(e, p, c, out);
    });
    down_by_panels(e, inner, out);
}

void Ops::store_gated(const Experts& e, const Product& p, float* gate, float* up, void* inner) {
    if (e.two_matrices()) std::fill_n(up, size_t(p.count) * p.columns, 1.0f);  // a product with one changes no bit
    const size_t size = size_of(e.dtype), width_bytes = e.width * size;
    for (int i = 0; i < p.count; i++) {
        float *g = gate + size_t(i) * p.columns, *u = up + size_t(i) * p.columns, apart[2][MOST_COLUMNS];
        if (e.interleaved) {
            const float* turns = gate + 2 * size_t(i) * p.columns;
            for (int j = 0; j < p.columns; j++) apart[0][j] = turns[2 * j], apart[1][j] = turns[2 * j + 1];
            g = apart[0], u = apart[1];
        }
        if (!e.gate_bias.empty()) kernels_->add_bias[e.dtype](g, p.columns, at(e.gate_bias[p.weights], p.column * size));
        if (!e.up_bias.empty()) kernels_->add_bias[e.dtype](u, p.columns, at(e.up_bias[p.weights], p.column * size));
        kernels_->gated[e.dtype](g, u, p.columns, e.activation, at(inner, (p.first + i) * width_bytes + p.column * size));
    }
}

void Ops::store_down(const Experts& e, const Product& p, const float* c, void* out) {
    const size_t size = size_of(e.dtype), hidden_bytes = e.hidden * size;
    const void* bias = e.down_bias.empty() ? nullptr : at(e.down_bias[p.weights], p.column * size);
    for (int i = 0; i < p.count; i++)
        kernels_->store[e.dtype](c + size_t(i) * p.columns, p.columns, bias,
                                 at(out, pairs_[p.first + i] * hidden_bytes + p.column * size));
}

void Ops::experts(const Experts& e, const void* x, int rows, const float* weights, const int64_t* ids, int top_k, void* inner,
                  void* outer, void* out) {
    std::lock_guard<std::mutex> only(one_caller_);
    sort_pairs(e, ids, rows * top_k, false);
    fetch(e);
    pair_rows(e, x, top_k, inner, ids ? outer : out);
    if (ids) combine(e.dtype, outer, weights, rows, top_k, e.hidden, out);
}

void Ops::expert_rows(const Experts& e, const void* x, int rows, const int64_t* ids, int top_k, void* inner, void* out) {
    std::lock_guard<std::mutex> only(one_caller_);
    sort_pairs(e, ids, rows * top_k, true);
    fetch(e);
    pair_rows(e, x, top_k, inner, out);
}

const void* Ops::head_row(const HeadProducts& p, int rows, int i) const {
    const size_t heads = p.heads->weights.size(), row = size_t(i % rows) * heads + i / rows;
    return at(p.x, row * (p.heads->in + p.kept) * size_of(p.heads->dtype));
}

void Ops::store_heads(const HeadProducts& p, int rows, const Product& product, const float* c) const {
    const HeadMatrices& h = *p.heads;
    const size_t size = size_of(h.dtype), row_bytes = (h.out + p.kept) * size;
    for (int i = 0; i < product.count; i++) {
        const int at_row = product.first + i;
        char* row = at(p.out, (size_t(at_row % rows) * h.weights.size() + at_row / rows) * row_bytes);
        kernels_->store[h.dtype](c + size_t(i) * product.columns, product.columns, nullptr, row + product.column * size);
        if (p.kept && product.column == 0) std::memcpy(row + h.out * size, at(head_row(p, rows, at_row), h.in * size), p.kept * size);
    }
}

void Ops::head_products(const HeadProducts& p, int rows) {
    std::lock_guard<std::mutex> only(one_caller_);
    const HeadMatrices& h = *p.heads;
    const int heads = int(h.weights.size());
    starts_.resize(heads + 1);
    for (int head = 0; head <= heads; head++) starts_[head] = head * rows;
    const auto row_bytes = [&](int head) { return h.weights[head].row_bytes(); };
    plan_products(h.out, [&](int head) { return !by_panels(rows, {h.weights[head].format}); }, row_bytes);
    calls_++;
    pool_.run(int(products_.size()), [&](int item, int thread) {
        const Product& one = products_[item];
        float* c = scratch_[thread].need(size_t(ROW_BLOCK) * MOST_COLUMNS * 2);
        const void* x_rows[ROW_BLOCK];
        for (int i = 0; i < one.count; i++) x_rows[i] = head_row(p, rows, one.first + i);
        const Product* then = item + 1 < int(products_.size()) ? &one + 1 : nullptr;
        const void* next = then ? h.weights[then->weights].row(then->column) : nullptr;
        product(h.dtype, x_rows, one.first, one.count, h.weights[one.weights], one.column, next, c, one.columns, scratch_[thread]);
        store_heads(p, rows, one, c);
    });
    heads_by_panels(p, rows);
}

void Ops::combine(Dtype dtype, const void* x, const float* weights, int rows, int top_k, int size, void* out) {
    const size_t row_bytes = size * size_of(dtype);
    const int tokens = 16;
    pool_.run((rows + tokens - 1) / tokens, [&](int item, int thread) {
        std::vector<const void*>& chosen = scratch_[thread].rows;
        chosen.resize(top_k);
        for (int t = item * tokens; t < std::min(rows, (item + 1) * tokens); t++) {
            for (int k = 0; k < top_k; k++) chosen[k] = at(x, (size_t(t) * top_k + k) * row_bytes);
            kernels_->combine[dtype](chosen.data(), weights + size_t(t) * top_k, top_k, size, nullptr, at(out, t * row_bytes));
        }
    });
}

void Ops::add_gated(Dtype dtype, const void* a, const void* b, const float* gate, int rows, int n, void* out) {
    const size_t row_bytes = n * size_of(dtype);
    pool_.run((rows + 15) / 16, [&](int item, int) {
        for (int t = item * 16; t < std::min(rows, item * 16 + 16); t++) {
            float weight = gate ? 1.0f / (1.0f + std::exp(-gate[t])) : 1.0f;
            const void* row = at(b, t * row_bytes);
            kernels_->combine[dtype](&row, &weight, 1, n, at(a, t * row_bytes), at(out, t * row_bytes));
        }
    });
}

void Ops::embed(Dtype dtype, const Matrix& table, const int64_t* ids, int rows, float multiplier, void* out) {
    const size_t row_bytes = table.columns * size_of(dtype);
    const bool as_it_lies = multiplier == 1.0f && int(table.format) == int(dtype);
    // One item, which the pool computes as all others: with subnormal numbers flushed, whoever calls.
    pool_.run(rows > 0 ? 1 : 0, [&](int, int thread) {
        const auto scaled = kernels_->scaled_row[dtype];
        float* wide = table.format >= DENSE_FORMATS ? scratch_[thread].need(2 * size_t(table.columns)) : nullptr;
        for (int t = 0; t < rows; t++) {
            if (ids[t] < 0 || ids[t] >= table.rows) throw std::out_of_range("token id " + std::to_string(ids[t]) + " is none of " + std::to_string(table.rows));
            const void* row = table.row(ids[t]);
            if (as_it_lies) std::copy_n(static_cast<const char*>(row), row_bytes, at(out, t * row_bytes));
            else if (!wide) scaled[table.format](row, multiplier, table.columns, at(out, t * row_bytes));
            else {
                widen_row(table, ids[t], wide, wide + table.columns);
                scaled[F32_MATRIX](wide, multiplier, table.columns, at(out, t * row_bytes));
            }
        }
    });
}

void Ops::rms_norm(const RmsNorm& n, int rows) {
    const size_t row_bytes = n.stride * size_of(n.dtype);
    const int chunk = std::max(1, int((16 << 10) / row_bytes));
    const auto norm = kernels_->rms_norm[n.dtype][n.weight.dtype];
    pool_.run((rows + chunk - 1) / chunk, [&](int item, int) {
        for (int t = item * chunk; t < std::min(rows, (item + 1) * chunk); t++) {
            size_t row = t * row_bytes;
            norm(at(n.x, row), n.update ? at(n.update, row) : nullptr, n.multiplier, n.scale, n.weight.values, n.size, n.eps,
                 n.less_mean, n.update ? at(n.sum, row) : nullptr, at(n.out, row));
        }
    });
}

namespace {

float number(float x) { return x; }
float number(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

template <class T> void clip_row(const T* x, int n, T low, T high, T* out) {
    for (int i = 0; i < n; i++) out[i] = number(x[i]) > number(high) ? high : number(x[i]) < number(low) ? low : x[i];
}

uint16_t bfloat16(float x) {  // rounded to nearest, ties to even; not for NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void Ops::clip(const Clip& c, int rows) {
    pool_.run((rows + 15) / 16, [&](int item, int) {
        for (int t = item * 16; t < std::min(rows, item * 16 + 16); t++) {
            const size_t row = size_t(t) * c.size;
            if (c.dtype == F32)
                clip_row(static_cast<const float*>(c.x) + row, c.size, -c.limit, c.limit, static_cast<float*>(c.out) + row);
            else
                clip_row(static_cast<const uint16_t*>(c.x) + row, c.size, bfloat16(-c.limit), bfloat16(c.limit),
                         static_cast<uint16_t*>(c.out) + row);
        }
    });
}

void Ops::softcap(const float* x, int rows, int size, float cap, float* out) {
    pool_.run(rows, [&](int t, int) {
        for (size_t i = size_t(t) * size; i < size_t(t + 1) * size; i++) out[i] = cap * std::tanh(x[i] / cap);
    });
}

void Ops::divide(const float* x, int rows, int size, float divisor, float* out) {
    pool_.run(rows, [&](int t, int) {
        for (size_t i = size_t(t) * size; i < size_t(t + 1) * size; i++) out[i] = x[i] / divisor;
    });
}

void Ops::rotation(const int64_t* positions, int rows, const float* inverse, int half, float factor, float* cos, float* sin) {
    pool_.run((rows + 31) / 32, [&](int item, int) {
        for (int t = item * 32; t < std::min(rows, item * 32 + 32); t++)
            for (int i = 0; i < half; i++) {
                double angle = float(positions[t]) * inverse[i];
                cos[size_t(t) * half + i] = float(std::cos(angle)) * factor;
                sin[size_t(t) * half + i] = float(std::sin(angle)) * factor;
            }
    });
}

}  // namespace moebius
