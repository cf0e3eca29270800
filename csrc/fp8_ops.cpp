// Products with codes of FP8, whose blocks of columns have scales. Inside a block codes are multiplied as the numbers that they
// are, which wider formats hold exactly, and summed as products of plain numbers are (in the dtype that kernels.h says); a
// result is the sum of its blocks, in order, each times its scale and rounded to float32. One or a few rows read codes where they
// lie, and widen them in registers; for many a block, or some rows of codes, are widened once. All have the same bits.
#include <algorithm>

#include "bytes.h"
#include "fp8_rows.h"
#include "ops.h"

namespace moebius {

static_assert(ROW_BLOCK <= MOST_FP8_ROWS);

namespace {

constexpr int STEP = 32;  // columns that kernels take at a time at most

}  // namespace

// Blocks in which kernels have whole steps; for others weights are widened as they are (widened_ops.cpp).
bool Ops::by_codes(const Matrix& w) { return w.format == FP8 && (w.block_columns >= w.columns || w.block_columns % STEP == 0); }

void Ops::fp8_product(Dtype dtype, const void* const* x, int first, int m, const Matrix& w, int column, const void* next, float* c,
                      int columns, Scratch& s) {
    const Fp8Kernels& kernels = kernels_->fp8[dtype];
    const int k = w.columns, per_block = std::min(w.block_columns, k), blocks = (k + per_block - 1) / per_block;
    const auto width_of = [&](int block) { return std::min(per_block, k - block * per_block); };
    const void* wide[ROW_BLOCK];
    if (kernels.x != dtype) as_floats(dtype, x, first, m, k, s, wide), x = wide;
    const void* rows[ROW_BLOCK];
    const auto rows_of = [&](int block) {
        for (int i = 0; i < m; i++) rows[i] = at(x[i], block * per_block * size_of(kernels.x));
        return rows;
    };
    const auto pack = kernels_->pack[kernels.x];
    const void* in_blocks = nullptr;
    if (pack)
        in_blocks = packed(s.in_blocks, first, packed_bytes(m, k), [&](void* to) {
            for (int b = 0; b < blocks; b++) pack(rows_of(b), m, width_of(b), at(to, packed_bytes(m, b * per_block)));
        }, per_block);

    const bool by_kernel = kernels.product && (m <= FEW_FP8_ROWS || per_block <= MOST_FP8_BLOCK);
    uint16_t* panel = by_kernel ? nullptr : static_cast<uint16_t*>(widened_room(k, s));
    float sums[ROW_BLOCK * WIDENED_ROWS];
    for (int j = 0; j < columns; j += WIDENED_ROWS, c += WIDENED_ROWS) {
        const int n = std::min(WIDENED_ROWS, columns - j);
        const float* of_rows[WIDENED_ROWS];
        for (int i = 0; i < n; i++) of_rows[i] = w.row_scales(column + j + i);
        const Fp8Scales scales = {of_rows, per_block, kernels.smaller};
        const uint8_t* codes = static_cast<const uint8_t*>(w.row(column + j));
        if (by_kernel) {
            kernels.product(pack ? &in_blocks : x, m, codes, n, k, scales, j + n < columns ? codes + size_t(n) * k : next, c, columns);
            continue;
        }
        for (int i = 0; i < n; i++) kernels.widen(codes + size_t(i) * k, k, panel + size_t(i) * k);
        for (int b = 0; b < blocks; b++) {
            const int from = b * per_block;
            const void* of_block = at(in_blocks, packed_bytes(m, from));
            kernels_->product[kernels.x][kernels.widened](pack ? &of_block : rows_of(b), m, panel + from, k, n, width_of(b), nullptr, sums, n);
            for (int i = 0; i < m; i++)
                for (int l = 0; l < n; l++) {
                    const float scaled = sums[i * n + l] * scales.of(l, b);
                    float& to = c[size_t(i) * columns + l];
                    to = b ? to + scaled : scaled;
                }
        }
    }
}

}  // namespace moebius
