// Products whose activations stay as they are, with weights that are widened to float32, a few rows at a time, and meet float32
// activations as weights of plain float32 do: blocks, where that is asked for, and FP8 in odd blocks. Slower than products of
// whole numbers; each result depends on its two rows alone all the same (P1), but its bits on the instruction set.
#include "bytes.h"
#include "ops.h"

#include <algorithm>

namespace moebius {

void Ops::widen_row(const Matrix& w, int64_t row, float* to, float* room) const {
    if (w.format != FP8) {
        kernels_->blocks->widened[w.format - DENSE_FORMATS](w.row(row), w.blocks(), w.groups_from(row), w.order ? room : to);
        for (int i = 0; w.order && i < w.columns; i++) to[(*w.order)[i]] = room[i];
        return;
    }
    constexpr int PIECE = 512;
    const Fp8Kernels& fp8 = kernels_->fp8[F32];
    uint16_t halves[PIECE];
    const uint8_t* codes = static_cast<const uint8_t*>(w.row(row));
    const float* scales = w.row_scales(row);
    // Each number is rounded once: what it is multiplied by is 256 times the scale, exactly.
    for (int first = 0; first < w.columns; first += w.block_columns, scales++) {
        const int stop = std::min(first + w.block_columns, w.columns);
        for (int i = first; i < stop; i += PIECE) {
            const int n = std::min(PIECE, stop - i);
            fp8.widen(codes + i, n, halves);
            kernels_->scaled_row[F32][fp8.widened](halves, *scales * fp8.smaller, n, to + i);
        }
    }
}

void Ops::as_floats(Dtype dtype, const void* const* x, int first, int m, int k, Scratch& s, const void** rows) {
    const auto widen = kernels_->scaled_row[F32][dtype == BF16 ? BF16_MATRIX : F32_MATRIX];
    const float* wide = static_cast<const float*>(packed(s.unquantised[0], first, m * size_t(k) * sizeof(float), [&](void* to) {
        for (int i = 0; i < m; i++) widen(x[i], 1.0f, k, static_cast<float*>(to) + size_t(i) * k);
    }));
    for (int i = 0; i < m; i++) rows[i] = wide + size_t(i) * k;
}

void Ops::wide_product(Dtype dtype, const void* const* x, int first, int m, const Matrix& w, int column, const void* next, float* c,
                       int columns, Scratch& s) {
    const int k = w.columns;
    const void* rows[ROW_BLOCK];
    as_floats(dtype, x, first, m, k, s, rows);
    if (ordered_) return kernels_->ordered[F32][F32_MATRIX](rows, m, w.row(column), columns, k, c, columns);
    if (kernels_->pack[F32]) rows[0] = packed(s.unquantised[1], first, packed_bytes(m, k), [&](void* to) { kernels_->pack[F32](rows, m, k, to); });
    kernels_->product[F32][F32_MATRIX](rows, m, w.row(column), k, columns, k, next, c, columns);
}

void* Ops::widened_room(int k, Scratch& s) {
    if (s.widened.size() < widened_bytes(k) + 64) Scratch::renew(s.widened, widened_bytes(k) + 64);
    return Scratch::aligned(s.widened.data());
}

void Ops::widened_product(Dtype dtype, const void* const* x, int first, int m, const Matrix& w, int column, float* c, int columns,
                          Scratch& s) {
    const int k = w.columns;
    const void* rows[ROW_BLOCK];
    as_floats(dtype, x, first, m, k, s, rows);
    if (kernels_->pack[F32]) rows[0] = packed(s.unquantised[1], first, packed_bytes(m, k), [&](void* to) { kernels_->pack[F32](rows, m, k, to); });
    float* panel = static_cast<float*>(widened_room(k, s));
    for (int j = 0; j < columns; j += WIDENED_ROWS) {
        const int some = std::min(WIDENED_ROWS, columns - j);
        for (int i = 0; i < some; i++) widen_row(w, column + j + i, panel + size_t(i) * k, panel + size_t(WIDENED_ROWS) * k);
        kernels_->product[F32][F32_MATRIX](rows, m, panel, k, some, k, nullptr, c + j, columns);
    }
}

}  // namespace moebius
