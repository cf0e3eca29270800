// How many rows of x meet codes of FP8 in which way.
#pragma once

namespace moebius {

// Rows for which codes are widened in registers, and the most at once.
constexpr int FEW_FP8_ROWS = 4, MOST_FP8_ROWS = 64;
// Columns of a block up to which kernels widen it themselves for more rows; for larger ones whole rows of codes are widened
// first, and meet x as plain numbers do, with as many sums to a result as there are blocks.
constexpr int MOST_FP8_BLOCK = 256;

}  // namespace moebius
