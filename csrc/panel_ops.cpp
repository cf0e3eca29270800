// Linear layers and experts in blocks on many rows, by panels (panels.h).
//
// Rows are taken in batches. First all threads quantise a batch's rows and lay them in tiles, for each format that they meet;
// then an item unpacks a few panels, and a stretch of the batch's rows passes over them. Which way a row is computed, by panels
// or as one of few, and beside which others, changes none of its bits: both compute what block_kernels.h says.
#include <algorithm>
#include <array>

#include "bytes.h"
#include "ops.h"
#include "panels.h"

namespace moebius {
namespace {

// Rows from which on panels are worth their unpacking: measured. From 6 to 8, by format and instruction set.
constexpr int MANY_ROWS = 8;
constexpr size_t CHUNK = 192 << 10;  // bytes of unpacked panels, which stay in the second cache
constexpr int LEAST_BATCH = 512;     // rows for which unpacking a panel costs a hundredth of its products
constexpr int STRETCH = 16;          // rows, the largest tile of any instruction set: where batches are cut

template <class Kind> void add_kind(const Matrix& w, std::vector<Kind>& kinds) {
    const Kind kind{w.format, w.order_number};
    if (std::find(kinds.begin(), kinds.end(), kind) == kinds.end()) kinds.push_back(kind);
}

}  // namespace

int Ops::batch_rows(size_t formats) const {
    const int most = std::max(LEAST_BATCH, ROW_BLOCK * threads());
    return std::max(STRETCH, most / int(formats) / STRETCH * STRETCH);
}

size_t Ops::most_tile_bytes(int widest) const {
    size_t most = 0;
    for (int f = DENSE_FORMATS; f < FORMATS; f++)
        most = std::max(most, widest / FORMAT_SIZES[f].elements * panels().of(Format(f)).row_bytes);
    // Of more formats at once there are fewer rows, but never fewer than a stretch.
    return most * std::max(batch_rows(1), BLOCK_FORMATS * STRETCH) + 64;
}

size_t Ops::most_panel_bytes(int widest) const {
    size_t one = 0;
    for (int f = DENSE_FORMATS; f < FORMATS; f++)
        one = std::max(one, widest / FORMAT_SIZES[f].elements * panels().of(Format(f)).panel_bytes);
    return 2 * std::max(one, std::min(CHUNK / 2, one * (MOST_COLUMNS / panels().panel))) + 64;
}

// matrices_of(weights) says with which matrices the rows of these weights will be multiplied.
template <class RowAt, class MatricesOf>
void Ops::lay_in_tiles(Dtype dtype, const std::vector<Kind>& kinds, int k, const RowAt& row_at, const MatricesOf& matrices_of) {
    const PanelKernels& kernels = panels();
    const PanelRows& last = panel_rows_.back();
    const size_t rows = last.tiled + rows_of_tiles(last.count, kernels.tile);
    tiled_.clear();
    size_t bytes = 0;
    for (const Kind& kind : kinds) {
        const size_t row_bytes = k / FORMAT_SIZES[kind.format].elements * kernels.of(kind.format).row_bytes;
        tiled_.push_back({kind, bytes, row_bytes});
        bytes += rows * row_bytes;
    }
    if (tiles_.size() < bytes + 64) Scratch::renew(tiles_, bytes + 64);
    panel_tiles_.clear();
    for (const PanelRows& r : panel_rows_)
        for (int i = 0; i < r.count; i += kernels.tile)
            panel_tiles_.push_back({r.weights, r.first + i, std::min(kernels.tile, r.count - i), r.tiled + i});
    pool_.run(int(panel_tiles_.size()), [&](int item, int thread) {
        const PanelRows& tile = panel_tiles_[item];
        const void* x[STRETCH];
        for (int i = 0; i < tile.count; i++) x[i] = row_at(tile.first + i);
        const auto& matrices = matrices_of(tile.weights);
        for (BlockSize size : {BY_32, BY_256, PAIRS_BY_32}) lay_tile(dtype, size, x, tile, k, matrices, scratch_[thread]);
    });
}

// For all formats of one size of blocks, which share what is quantised where columns lie alike.
template <class Matrices>
void Ops::lay_tile(Dtype dtype, BlockSize size, const void* const* x, const PanelRows& tile, int k, const Matrices& matrices, Scratch& scratch) {
    if (k % QuantisedShape::elements_of(size)) return;
    const QuantisedShape shape(size, k);
    Scratch::Packed& room = scratch.packed[1 + size];
    QuantisedRow rows[STRETCH];
    int quantised = -1;
    for (const Tiled& to : tiled_) {
        if (block_size(to.kind.format) != size) continue;
        const auto w = std::find_if(matrices.begin(), matrices.end(), [&](const Matrix* each) { return each->order_number == to.kind.order_number; });
        if (w == matrices.end()) continue;  // of other experts
        if (quantised != to.kind.order_number) {
            const size_t bytes = STRETCH * shape.row_bytes() + 64;
            if (room.bytes.size() < bytes) Scratch::renew(room.bytes, bytes);
            room.call = 0;
            void* at = Scratch::aligned(room.bytes.data());
            quantise(dtype, size, x, tile.count, k, (*w)->order.get(), scratch, at);
            for (int i = 0; i < tile.count; i++) rows[i] = QuantisedRow(at, i, shape);
            quantised = to.kind.order_number;
        }
        panels().of(to.kind.format).pack(rows, tile.count, shape.blocks, tiles_of(to, tile.tiled));
    }
}

char* Ops::tiles_of(const Tiled& tiled, int row) { return Scratch::aligned(tiles_.data()) + tiled.at + row * tiled.row_bytes; }

size_t Ops::panel_bytes(const Matrix& w) const { return w.blocks() * panels().of(w.format).panel_bytes; }

// Items of some columns of each of the matrices.
template <class Matrices> void Ops::plan_panels(const PanelRows& rows, const Matrices& matrices) {
    size_t bytes = 0;
    for (const Matrix* w : matrices) bytes += panel_bytes(*w);
    const int panel = panels().panel, most = int(std::clamp<size_t>(CHUNK / bytes, 1, MOST_COLUMNS / panel)) * panel;
    const int columns = matrices[0]->rows;
    for (int column = 0; column < columns; column += most)
        panel_products_.push_back({rows, column, std::min(most, columns - column)});
}

// Where items are few, each is cut into stretches of rows, though these unpack the same panels.
void Ops::cut_panel_products() {
    const int wanted = 4 * threads(), items = int(panel_products_.size());
    if (items == 0 || items >= wanted || threads() == 1) return;
    const int parts = (wanted + items - 1) / items;
    std::vector<PanelProduct> whole;
    whole.swap(panel_products_);
    for (const PanelProduct& p : whole) {
        const int each = std::max(2 * STRETCH, (p.rows.count / parts + STRETCH - 1) / STRETCH * STRETCH);
        for (int i = 0; i < p.rows.count; i += each) {
            PanelProduct part = p;
            part.rows.first += i, part.rows.tiled += i, part.rows.count = std::min(each, p.rows.count - i);
            panel_products_.push_back(part);
        }
    }
}

// The columns of an item, unpacked to `to`; returns what comes behind.
char* Ops::unpack_panels(const PanelProduct& p, const Matrix& w, char* to) const {
    const int panel = panels().panel;
    for (int i = 0; i < p.columns; i += panel, to += panel_bytes(w))
        panels().of(w.format).unpack(w.row(p.column + i), std::min(panel, p.columns - i), w.blocks(), w.groups_from(p.column + i), to);
    return to;
}

// c[i][j] of m rows from `row` on in tiles, and unpacked columns of w.
void Ops::panel_product(const PanelProduct& p, const Matrix& w, const char* unpacked, int row, int m, const Stretch& next,
                        float* c) {
    const Tiled& tiled = *std::find_if(tiled_.begin(), tiled_.end(), [&](const Tiled& t) { return t.kind == Kind{w.format, w.order_number}; });
    panels().of(w.format).product(tiles_of(tiled, row), m, unpacked, p.columns, w.blocks(), next, c, p.columns);
}

// What the item after this one will unpack of its n-th matrix.
template <class MatricesOf> Stretch Ops::next_panels(int item, int n, const MatricesOf& matrices_of) const {
    if (item + 1 >= int(panel_products_.size())) return {};
    const PanelProduct& next = panel_products_[item + 1];
    const Matrix& w = *matrices_of(next.rows.weights)[n];
    return {w.row(next.column), next.columns * w.row_bytes()};
}

// The planned products. matrices_of(weights) says of which matrices, one or two that the same rows meet; store(p, c) is given
// the products with the first one at c[0], with the second at c[1].
template <class MatricesOf, class Store> void Ops::run_panel_products(const MatricesOf& matrices_of, const Store& store) {
    pool_.run(int(panel_products_.size()), [&](int item, int thread) {
        const PanelProduct& p = panel_products_[item];
        const auto matrices = matrices_of(p.rows.weights);
        const int count = int(matrices.size());
        size_t bytes = 0;
        for (const Matrix* w : matrices) bytes += panel_bytes(*w) * ((p.columns - 1) / panels().panel + 1);
        char *to = panel_room(bytes, thread), *unpacked[2];
        float* c[2] = {scratch_[thread].need(size_t(ROW_BLOCK) * MOST_COLUMNS * 2)};
        c[1] = c[0] + size_t(ROW_BLOCK) * MOST_COLUMNS;
        for (int n = 0; n < count; n++) unpacked[n] = to, to = unpack_panels(p, *matrices[n], to);
        for (int i = 0; i < p.rows.count; i += ROW_BLOCK) {
            const int m = std::min(ROW_BLOCK, p.rows.count - i);
            for (int n = 0; n < count; n++) {
                const Stretch next = i ? Stretch() : next_panels(item, n, matrices_of);
                panel_product(p, *matrices[n], unpacked[n], p.rows.tiled + i, m, next, c[n]);
            }
            store({p.rows.weights, p.rows.first + i, m, p.column, p.columns}, c);
        }
    });
}

// Room for the panels of an item.
char* Ops::panel_room(size_t bytes, int thread) {
    std::vector<char>& room = scratch_[thread].panels;
    if (room.size() < bytes + 64) Scratch::renew(room, bytes + 64);
    return Scratch::aligned(room.data());
}

void Ops::linear_by_panels(const Linear& l, const void* x, int rows, void* out, bool wide) {
    const size_t row_bytes = l.in * size_of(l.dtype);
    std::vector<Kind> kinds;
    std::vector<const Matrix*> all;
    for (const Linear::Layer& layer : l.layers)
        if (by_panels(rows, {layer.weight.format})) add_kind(layer.weight, kinds), all.push_back(&layer.weight);
    if (kinds.empty()) return;
    const auto matrices_of = [&](int layer) { return std::array{&l.layers[layer].weight}; };
    const int most = batch_rows(kinds.size());
    for (int first = 0; first < rows; first += most) {
        panel_rows_.assign(1, {0, first, std::min(most, rows - first), 0});
        lay_in_tiles(l.dtype, kinds, l.in, [&](int i) { return at(x, i * row_bytes); }, [&](int) -> const auto& { return all; });
        panel_products_.clear();
        PanelRows batch = panel_rows_[0];
        for (; batch.weights < int(l.layers.size()); batch.weights++)
            if (is_blocks(l.layers[batch.weights].weight.format)) plan_panels(batch, matrices_of(batch.weights));
        cut_panel_products();
        run_panel_products(matrices_of, [&](const Product& p, float* const* c) {
            store_columns(l, l.layers[p.weights], p, c[0], out, wide);
        });
    }
}

bool Ops::by_panels(int rows, std::initializer_list<Format> formats) const {
    return !float_activations_ && rows >= MANY_ROWS && std::all_of(formats.begin(), formats.end(), is_blocks);
}
bool Ops::gate_by_panels(const Experts& e, int expert) const {
    return by_panels(starts_[expert + 1] - starts_[expert], {e.gate[expert].format, (e.up.empty() ? e.gate : e.up)[expert].format});
}
bool Ops::down_by_panels(const Experts& e, int expert) const {
    return by_panels(starts_[expert + 1] - starts_[expert], {e.down[expert].format});
}

// Calls run() for one batch after another of the rows of experts that `takes`, which are panel_rows_ then.
template <class Takes, class Run> void Ops::each_panel_batch(size_t formats, const Takes& takes, const Run& run) {
    const int room = batch_rows(formats), tile = panels().tile;
    int tiled = 0;
    panel_rows_.clear();
    for (int e = 0; e + 1 < int(starts_.size()); e++) {
        if (!takes(e)) continue;
        for (int first = starts_[e], count; first < starts_[e + 1]; first += count) {
            const int rest = starts_[e + 1] - first;
            count = rows_of_tiles(rest, tile) <= room - tiled ? rest : (room - tiled) / STRETCH * STRETCH;
            if (count > 0) panel_rows_.push_back({e, first, count, tiled}), tiled += rows_of_tiles(count, tile);
            if (count == rest) continue;
            run();
            panel_rows_.clear(), tiled = 0;
        }
    }
    if (!panel_rows_.empty()) run();
}

// Products of the experts that `takes`, with the matrices that matrices_of(expert) says; row_at(i) is the i-th sorted pair's row.
template <class Takes, class MatricesOf, class RowAt, class Store>
void Ops::experts_by_panels(Dtype dtype, const Takes& takes, const MatricesOf& matrices_of, const RowAt& row_at, const Store& store) {
    std::vector<Kind> kinds;
    for (int e = 0; e + 1 < int(starts_.size()); e++)
        if (takes(e))
            for (const Matrix* w : matrices_of(e)) add_kind(*w, kinds);
    if (kinds.empty()) return;
    each_panel_batch(kinds.size(), takes, [&] {
        lay_in_tiles(dtype, kinds, matrices_of(panel_rows_[0].weights)[0]->columns, row_at, matrices_of);
        panel_products_.clear();
        for (const PanelRows& r : panel_rows_) plan_panels(r, matrices_of(r.weights));
        cut_panel_products();
        run_panel_products(matrices_of, store);
    });
}

void Ops::gate_and_up_by_panels(const Experts& e, const void* x, int top_k, void* inner) {
    const size_t row_bytes = e.hidden * size_of(e.dtype);
    const auto takes = [&](int expert) { return gate_by_panels(e, expert); };
    const auto row_at = [&](int i) { return at(x, pairs_[i] / top_k * row_bytes); };
    // Panels have an even number of rows: a pair of a gate's and an up's lies in one.
    const auto store = [&](Product p, float* const* c) {
        p.column /= e.gate_rows(), p.columns /= e.gate_rows();
        store_gated(e, p, c[0], c[1], inner);
    };
    if (e.up.empty()) experts_by_panels(e.dtype, takes, [&](int expert) { return std::array{&e.gate[expert]}; }, row_at, store);
    else experts_by_panels(e.dtype, takes, [&](int expert) { return std::array{&e.gate[expert], &e.up[expert]}; }, row_at, store);
}

void Ops::down_by_panels(const Experts& e, const void* inner, void* out) {
    const size_t row_bytes = e.width * size_of(e.dtype);
    experts_by_panels(
        e.dtype, [&](int expert) { return down_by_panels(e, expert); },
        [&](int expert) { return std::array{&e.down[expert]}; },
        [&](int i) { return at(inner, i * row_bytes); },
        [&](const Product& p, float* const* c) { store_down(e, p, c[0], out); });
}

void Ops::heads_by_panels(const HeadProducts& p, int rows) {
    const HeadMatrices& h = *p.heads;
    experts_by_panels(
        h.dtype, [&](int head) { return by_panels(rows, {h.weights[head].format}); },
        [&](int head) { return std::array{&h.weights[head]}; },
        [&](int i) { return head_row(p, rows, i); },
        [&](const Product& product, float* const* c) { store_heads(p, rows, product, c[0]); });
}

}  // namespace moebius
