// Linear layers and experts in blocks on many rows, by panels (panels.h).
//
// Rows are taken in batches. First all threads quantise a batch's rows and lay them in tiles, for each format that they meet;
// then an item unpacks a few panels, and a stretch of the batch's rows passes over them. Which way a row is computed, by panels
// or as one of few, and beside which others, changes none of its bits: both compute what block_kernels.h says.
#include <algorithm>

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

void add_format(Format format, std::vector<Format>& formats) {
    if (std::find(formats.begin(), formats.end(), format) == formats.end()) formats.push_back(format);
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

template <class RowAt> void Ops::lay_in_tiles(Dtype dtype, const std::vector<Format>& formats, int k, const RowAt& row_at) {
    const PanelKernels& kernels = panels();
    const PanelRows& last = panel_rows_.back();
    const size_t rows = last.tiled + rows_of_tiles(last.count, kernels.tile);
    tiled_.clear();
    size_t bytes = 0;
    for (Format format : formats) {
        const size_t row_bytes = k / FORMAT_SIZES[format].elements * kernels.of(format).row_bytes;
        tiled_.push_back({format, bytes, row_bytes});
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
        for (BlockSize size : {BY_32, BY_256}) lay_tile(dtype, size, x, tile, k, scratch_[thread].packed[1 + size]);
    });
}

// For all formats of one size of blocks, which share what is quantised.
void Ops::lay_tile(Dtype dtype, BlockSize size, const void* const* x, const PanelRows& tile, int k, Scratch::Packed& room) {
    if (k % QuantisedShape::elements_of(size)) return;
    const QuantisedShape shape(size, k);
    QuantisedRow rows[STRETCH];
    bool quantised = false;
    for (const Tiled& to : tiled_) {
        if (block_size(to.format) != size) continue;
        if (!quantised) {
            const size_t bytes = STRETCH * shape.row_bytes() + 64;
            if (room.bytes.size() < bytes) Scratch::renew(room.bytes, bytes);
            room.call = 0;
            void* at = Scratch::aligned(room.bytes.data());
            kernels_->blocks->quantise[dtype][size](x, tile.count, k, at);
            for (int i = 0; i < tile.count; i++) rows[i] = QuantisedRow(at, i, shape);
            quantised = true;
        }
        panels().of(to.format).pack(rows, tile.count, shape.blocks, tiles_of(to, tile.tiled));
    }
}

char* Ops::tiles_of(const Tiled& tiled, int row) { return Scratch::aligned(tiles_.data()) + tiled.at + row * tiled.row_bytes; }

// Items for so many columns, a panel of which takes so many bytes.
void Ops::plan_panels(const PanelRows& rows, int columns_in_all, size_t panel_bytes) {
    const int panel = panels().panel, most = int(std::clamp<size_t>(CHUNK / panel_bytes, 1, MOST_COLUMNS / panel)) * panel;
    for (int column = 0; column < columns_in_all; column += most)
        panel_products_.push_back({rows, column, std::min(most, columns_in_all - column)});
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

size_t Ops::panel_bytes(const Matrix& w) const { return w.blocks() * panels().of(w.format).panel_bytes; }

// The columns of an item, unpacked to `to`; returns what comes behind.
char* Ops::unpack_panels(const PanelProduct& p, const Matrix& w, char* to) const {
    const int panel = panels().panel;
    for (int i = 0; i < p.columns; i += panel, to += panel_bytes(w))
        panels().of(w.format).unpack(w.row(p.column + i), std::min(panel, p.columns - i), w.blocks(), to);
    return to;
}

// c[i][j] of m rows from `row` on in tiles, and unpacked columns of w.
void Ops::panel_product(const PanelProduct& p, const Matrix& w, const char* unpacked, int row, int m, const Stretch& next,
                        float* c) {
    const Tiled& tiled = *std::find_if(tiled_.begin(), tiled_.end(), [&](const Tiled& t) { return t.format == w.format; });
    panels().of(w.format).product(tiles_of(tiled, row), m, unpacked, p.columns, w.blocks(), next, c, p.columns);
}

// What the item after this one will unpack of its matrix, which matrix_of(weights) says.
template <class MatrixOf> Stretch Ops::next_panels(int item, const MatrixOf& matrix_of) const {
    if (item + 1 >= int(panel_products_.size())) return {};
    const PanelProduct& next = panel_products_[item + 1];
    const Matrix& w = matrix_of(next.rows.weights);
    return {w.row(next.column), next.columns * w.row_bytes()};
}

// Room for the panels of an item, of two matrices at most.
char* Ops::panel_room(size_t bytes, int thread) {
    std::vector<char>& room = scratch_[thread].panels;
    if (room.size() < bytes + 64) Scratch::renew(room, bytes + 64);
    return Scratch::aligned(room.data());
}

void Ops::linear_by_panels(const Linear& l, const void* x, int rows, void* out, bool wide) {
    const size_t row_bytes = l.in * size_of(l.dtype);
    std::vector<Format> formats;
    for (const Linear::Layer& layer : l.layers)
        if (by_panels(rows, {layer.weight.format})) add_format(layer.weight.format, formats);
    if (formats.empty()) return;
    const int most = batch_rows(formats.size());
    for (int first = 0; first < rows; first += most) {
        panel_rows_.assign(1, {0, first, std::min(most, rows - first), 0});
        lay_in_tiles(l.dtype, formats, l.in, [&](int i) { return at(x, i * row_bytes); });
        panel_products_.clear();
        PanelRows batch = panel_rows_[0];
        for (; batch.weights < int(l.layers.size()); batch.weights++) {
            const Matrix& w = l.layers[batch.weights].weight;
            if (is_blocks(w.format)) plan_panels(batch, w.rows, panel_bytes(w));
        }
        cut_panel_products();
        pool_.run(int(panel_products_.size()), [&](int item, int thread) {
            const PanelProduct& p = panel_products_[item];
            const Linear::Layer& layer = l.layers[p.rows.weights];
            char* unpacked = panel_room(panel_bytes(layer.weight) * ((p.columns - 1) / panels().panel + 1), thread);
            unpack_panels(p, layer.weight, unpacked);
            float* c = scratch_[thread].need(size_t(ROW_BLOCK) * MOST_COLUMNS * 2);
            Stretch next = next_panels(item, [&](int i) -> const Matrix& { return l.layers[i].weight; });
            for (int i = 0; i < p.rows.count; i += ROW_BLOCK, next = {}) {
                const int m = std::min(ROW_BLOCK, p.rows.count - i);
                panel_product(p, layer.weight, unpacked, p.rows.tiled + i, m, next, c);
                store_columns(l, layer, {0, p.rows.first + i, m, p.column, p.columns}, c, out, wide);
            }
        });
    }
}

bool Ops::by_panels(int rows, std::initializer_list<Format> formats) const {
    return !float_activations_ && rows >= MANY_ROWS && std::all_of(formats.begin(), formats.end(), is_blocks);
}
bool Ops::gate_by_panels(const Experts& e, int expert) const {
    return by_panels(starts_[expert + 1] - starts_[expert], {e.gate[expert].format, e.up[expert].format});
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

void Ops::gate_and_up_by_panels(const Experts& e, const void* x, int top_k, void* inner) {
    const size_t row_bytes = e.hidden * size_of(e.dtype);
    std::vector<Format> formats;
    for (int i = 0; i < int(e.gate.size()); i++)
        if (gate_by_panels(e, i)) add_format(e.gate[i].format, formats), add_format(e.up[i].format, formats);
    if (formats.empty()) return;
    each_panel_batch(formats.size(), [&](int i) { return gate_by_panels(e, i); }, [&] {
        lay_in_tiles(e.dtype, formats, e.hidden, [&](int i) { return at(x, pairs_[i] / top_k * row_bytes); });
        panel_products_.clear();
        for (const PanelRows& r : panel_rows_)
            plan_panels(r, e.width, panel_bytes(e.gate[r.weights]) + panel_bytes(e.up[r.weights]));
        cut_panel_products();
        pool_.run(int(panel_products_.size()), [&](int item, int thread) {
            const PanelProduct& p = panel_products_[item];
            const Matrix &gate_w = e.gate[p.rows.weights], &up_w = e.up[p.rows.weights];
            const size_t bytes = (panel_bytes(gate_w) + panel_bytes(up_w)) * ((p.columns - 1) / panels().panel + 1);
            char *gate_panels = panel_room(bytes, thread), *up_panels = unpack_panels(p, gate_w, gate_panels);
            unpack_panels(p, up_w, up_panels);
            float* gate = scratch_[thread].need(size_t(ROW_BLOCK) * MOST_COLUMNS * 2);
            float* up = gate + size_t(ROW_BLOCK) * MOST_COLUMNS;
            Stretch next_gate = next_panels(item, [&](int i) -> const Matrix& { return e.gate[i]; });
            Stretch next_up = next_panels(item, [&](int i) -> const Matrix& { return e.up[i]; });
            for (int i = 0; i < p.rows.count; i += ROW_BLOCK, next_gate = next_up = {}) {
                const int m = std::min(ROW_BLOCK, p.rows.count - i);
                panel_product(p, gate_w, gate_panels, p.rows.tiled + i, m, next_gate, gate);
                panel_product(p, up_w, up_panels, p.rows.tiled + i, m, next_up, up);
                store_gated(e, {p.rows.weights, p.rows.first + i, m, p.column, p.columns}, gate, up, inner);
            }
        });
    });
}

void Ops::down_by_panels(const Experts& e, const void* inner, void* out) {
    const size_t row_bytes = e.width * size_of(e.dtype);
    std::vector<Format> formats;
    for (int i = 0; i < int(e.down.size()); i++)
        if (down_by_panels(e, i)) add_format(e.down[i].format, formats);
    if (formats.empty()) return;
    each_panel_batch(formats.size(), [&](int i) { return down_by_panels(e, i); }, [&] {
        lay_in_tiles(e.dtype, formats, e.width, [&](int i) { return at(inner, i * row_bytes); });
        panel_products_.clear();
        for (const PanelRows& r : panel_rows_) plan_panels(r, e.hidden, panel_bytes(e.down[r.weights]));
        cut_panel_products();
        pool_.run(int(panel_products_.size()), [&](int item, int thread) {
            const PanelProduct& p = panel_products_[item];
            const Matrix& w = e.down[p.rows.weights];
            char* unpacked = panel_room(panel_bytes(w) * ((p.columns - 1) / panels().panel + 1), thread);
            unpack_panels(p, w, unpacked);
            float* c = scratch_[thread].need(size_t(ROW_BLOCK) * MOST_COLUMNS * 2);
            Stretch next = next_panels(item, [&](int i) -> const Matrix& { return e.down[i]; });
            for (int i = 0; i < p.rows.count; i += ROW_BLOCK, next = {}) {
                const int m = std::min(ROW_BLOCK, p.rows.count - i);
                panel_product(p, w, unpacked, p.rows.tiled + i, m, next, c);
                store_down(e, {p.rows.weights, p.rows.first + i, m, p.column, p.columns}, c, out);
            }
        });
    });
}

}  // namespace moebius
