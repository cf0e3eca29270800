// The eight tile registers of AMX: up to 16 rows of 64 bytes each. Everything that the kernels do with them goes through
// these few functions, of which there are two versions: the instructions, and, with MOEBIUS_AMX_EMULATED, plain C++ after
// the pseudocode in Intel's Software Developer's Manual (volume 2, "TDPBF16PS" and "TDPBSSD"), so that
// the kernels can be tested, under sanitizers too, on a processor without AMX. The emulation aborts where the instruction would
// fault.
//
// The instructions are written as assembly: GCC 12's intrinsics do not tell the compiler that they read memory.
#pragma once
#include <cstdlib>

#include "simd.h"

namespace moebius {
namespace MOEBIUS_ISA {

constexpr int TILE_LINES = 16, LINE_BYTES = 64;
constexpr int STEP = LINE_BYTES / sizeof(bf16);  // elements of the inner dimension that one dot product adds

// What LDTILECFG reads: rows and bytes a row of each register.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int first, int count, int lines, int bytes) {
        for (int t = first; t < first + count; t++) rows[t] = uint8_t(lines), row_bytes[t] = uint16_t(bytes);
    }
};

#if !defined(MOEBIUS_AMX_EMULATED)

INLINE void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int t> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(t)); }
template <int t> INLINE void tile_load(const void* from, size_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
}
template <int t> INLINE void tile_store(void* to, size_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
}
// c += a b, where a's and b's elements are pairs of bfloat16 and c's are float32
template <int c, int a, int b> INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
// c += a b, where a's and b's elements are four signed bytes and c's are int32
template <int c, int a, int b> INLINE void tile_dot_of_bytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else

struct Tiles {
    TileShapes shapes;
    bool configured = false;
    alignas(64) uint8_t lines[8][TILE_LINES][LINE_BYTES];
};
static thread_local Tiles tiles;

INLINE void require(bool legal) {
    if (!legal) abort();
}

INLINE void configure_tiles(const TileShapes& shapes) {
    for (int t = 0; t < 8; t++)
        require(shapes.rows[t] >= 1 && shapes.rows[t] <= TILE_LINES && shapes.row_bytes[t] >= 1 && shapes.row_bytes[t] <= LINE_BYTES);
    tiles.shapes = shapes, tiles.configured = true;
    memset(tiles.lines, 0, sizeof tiles.lines);
}
INLINE void release_tiles() { tiles.configured = false; }

template <int t> INLINE void tile_zero() {
    require(tiles.configured);
    memset(tiles.lines[t], 0, sizeof tiles.lines[t]);
}
template <int t> INLINE void tile_load(const void* from, size_t stride) {
    tile_zero<t>();
    for (int i = 0; i < tiles.shapes.rows[t]; i++)
        memcpy(tiles.lines[t][i], static_cast<const char*>(from) + i * stride, tiles.shapes.row_bytes[t]);
}
template <int t> INLINE void tile_store(void* to, size_t stride) {
    require(tiles.configured);
    for (int i = 0; i < tiles.shapes.rows[t]; i++)
        memcpy(static_cast<char*>(to) + i * stride, tiles.lines[t][i], tiles.shapes.row_bytes[t]);
}

INLINE float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
INLINE float element(const uint8_t* line, int i) { return flushed(to_float(read<bf16>(line + 2 * i))); }

INLINE void require_factors(const TileShapes& s, int c, int a, int b) {
    require(tiles.configured && s.rows[c] == s.rows[a] && s.row_bytes[c] == s.row_bytes[b] && s.row_bytes[a] == 4 * s.rows[b]);
    require(s.row_bytes[c] % 4 == 0 && c != a && c != b && a != b);
}

template <int c, int a, int b> INLINE void tile_dot_of_bytes() {
    const TileShapes& s = tiles.shapes;
    require_factors(s, c, a, b);
    for (int m = 0; m < s.rows[c]; m++) {
        int32_t sums[16];
        memcpy(sums, tiles.lines[c][m], sizeof sums);
        for (int k = 0; k < s.row_bytes[a]; k++)
            for (int n = 0; n < s.row_bytes[c] / 4; n++) {
                const int32_t product = int8_t(tiles.lines[a][m][k]) * int8_t(tiles.lines[b][k / 4][4 * n + k % 4]);
                sums[n] = int32_t(uint32_t(sums[n]) + uint32_t(product));
            }
        memcpy(tiles.lines[c][m], sums, sizeof sums);
    }
}

// Even and odd products are summed apart, from zero and in order; then their sum is added to c. Every operation rounds to
// the nearest even and flushes subnormal inputs and results.
template <int c, int a, int b> INLINE void tile_dot() {
    const TileShapes& s = tiles.shapes;
    require_factors(s, c, a, b);
    for (int m = 0; m < s.rows[c]; m++) {
        float even[16] = {}, odd[16] = {}, sums[16];
        for (int k = 0; k < s.row_bytes[a] / 4; k++)
            for (int n = 0; n < s.row_bytes[c] / 4; n++) {
                const uint8_t *left = tiles.lines[a][m], *right = tiles.lines[b][k];
                even[n] = flushed(__builtin_fmaf(element(left, 2 * k), element(right, 2 * n), even[n]));
                odd[n] = flushed(__builtin_fmaf(element(left, 2 * k + 1), element(right, 2 * n + 1), odd[n]));
            }
        memcpy(sums, tiles.lines[c][m], sizeof sums);
        for (int n = 0; n < s.row_bytes[c] / 4; n++) sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
        memcpy(tiles.lines[c][m], sums, sizeof sums);
    }
}

#endif

}  // namespace MOEBIUS_ISA
}  // namespace moebius
