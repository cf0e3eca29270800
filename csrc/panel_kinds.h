// What kernels for many rows have to know of a block format, and where things lie in an unpacked block.
//
// A panel is LANES weight rows, unpacked: block after block, in the order in which they are summed. A tile is some rows of x
// beside each other in the same order. Both in quads, so that a product walks through two streams.
#pragma once
#include "block_formats.h"
#include "panel_lanes.h"
#include "panels.h"

namespace moebius {
namespace MOEBIUS_ISA {

// Whether sums of sub-blocks are multiplied by integers.
constexpr bool is_scaled(Format type) { return FORMAT_SIZES[type].elements == 256; }

// How a block's numbers are shifted: not at all, all by one number, or each sub-block by one in units of dmin.
enum Minima { NO_MINIMA, ONE_MINIMUM, SUB_MINIMA };
template <Format TYPE> constexpr Minima minima() {
    return Block<TYPE>::MINIMUM_AT < 0 ? NO_MINIMA : is_scaled(TYPE) ? SUB_MINIMA : ONE_MINIMUM;
}

// Where scales are multiplied into the codes, a whole block is one sum. Those of these two fit eight bits: (q - 4) * -32..31 is
// between -124 and 128, and is stored 124 larger, or negated. Tiles' sums are as long as a block anyway; other codes are in two
// planes there, of seven bits and of what is left.
constexpr bool fits_bytes(Format type) { return type == Q2_K || type == Q3_K; }
constexpr bool folds(Format type) { return SCHEME == TILES ? is_scaled(type) : SCHEME == QUADS && fits_bytes(type); }
constexpr int planes_of(Format type) { return folds(type) && !fits_bytes(type) ? 2 : 1; }
constexpr int PLANE_BITS = 7;
constexpr int FOLDED_Q3_OFFSET = 124;

template <Format TYPE> constexpr int unsigned_offset() { return folds(TYPE) && TYPE == Q3_K ? FOLDED_Q3_OFFSET : Block<TYPE>::OFFSET; }

// A product's kernel depends on a format by these alone.
//   SUB: elements of one integer sum; SCALED: that is multiplied by an integer then
//   MINIMA; MINIMUM_SUB: elements that share a minimum of SUB_MINIMA
//   STARTS: sums start elsewhere than at 0, as codes are unsigned where they stand for signed ones
//   CHAIN: quads that PAIRS may add up in 16 bits. 0: codes are signed, and no two products fit (LIFTED, below).
//   PLANES of codes, for TILES
template <int ELEMENTS_, int SUB_, bool SCALED_, Minima MINIMA_, int MINIMUM_SUB_, bool STARTS_, int CHAIN_, int PLANES_>
struct Kind {
    static constexpr int ELEMENTS = ELEMENTS_, SUB = SUB_, CHAIN = CHAIN_, MINIMUM_SUB = MINIMUM_SUB_, PLANES = PLANES_;
    static constexpr bool SCALED = SCALED_, STARTS = STARTS_;
    static constexpr Minima MINIMA = MINIMA_;

    static constexpr int QUADS_OF_BLOCK = ELEMENTS / 4, SUBS = ELEMENTS / SUB;
    static constexpr int SCALE_VECTORS = SCALED ? SUBS : 0;
    static constexpr int MINIMUM_PAIRS = MINIMA == SUB_MINIMA ? ELEMENTS / MINIMUM_SUB / 2 : 0;

    // Instructions for pairs multiply unsigned bytes by signed ones. The sizes of codes are unsigned; their signs go to x by
    // turning all of its bits, which makes -x - 1 of it. So a sum comes out smaller by the sizes of all negative codes, which a
    // block brings along, times their scales. |-128| * (-127 - 1), twice, is -2^15, the last number that fits.
    static constexpr bool LIFTED = SCHEME == PAIRS && CHAIN == 0;

    // A block of a panel, in vectors.
    static constexpr int LIFT_AT = PLANES * QUADS_OF_BLOCK, SCALES_AT = LIFT_AT + LIFTED;
    static constexpr int MINIMA_AT = SCALES_AT + SCALE_VECTORS, D_AT = MINIMA_AT + MINIMUM_PAIRS;
    static constexpr int PANEL_VECTORS = D_AT + (MINIMA == NO_MINIMA ? 1 : 2);

    // A block of a tile, in words of each row: quads, the sums' starts, then either sums of x's sub-blocks, in pairs of 16 bits,
    // or its whole sum as a float, and the scale.
    static constexpr int STARTS_AT = QUADS_OF_BLOCK, SUMS_AT = STARTS_AT + (STARTS ? SUBS : 0);
    static constexpr int DX_AT = SUMS_AT + (MINIMA == ONE_MINIMUM ? 1 : MINIMUM_PAIRS);
    static constexpr int TILE_WORDS = DX_AT + 1;
};

// Quads whose products sum up to less than 2^15 in each half of a lane, in the end: on the way there the halves may wrap.
template <class B> constexpr int chain_of() {
    constexpr int centred = B::OFFSET ? B::OFFSET : B::MOST, quads = 32767 / (2 * 127 * centred), all = B::SUB / 4;
    return B::MOST > 64 ? 0 : quads >= all ? all : quads >= 4 ? 4 : 1;
}

template <Format TYPE> struct KindOf {
    using B = Block<TYPE>;
    static constexpr bool FOLDS = folds(TYPE);
    static constexpr int CHAIN = SCHEME == PAIRS ? chain_of<B>() : B::SUB / 4;
    static constexpr bool STARTS = (SCHEME == QUADS || SCHEME == PAIRS) && CHAIN && unsigned_offset<TYPE>();
    using type = Kind<B::ELEMENTS, FOLDS ? B::ELEMENTS : B::SUB, is_scaled(TYPE) && !FOLDS, minima<TYPE>(),
                      minima<TYPE>() == SUB_MINIMA ? B::SUB : 0, STARTS, SCHEME == PAIRS ? CHAIN : 1, planes_of(TYPE)>;
};

// Fetches a stretch of memory into the second cache, some of it at each of so many steps: unpacking would wait for it else, with
// more streams than a processor follows by itself.
class Fetch {
public:
    Fetch(const Stretch& next, int steps)
        : at_(static_cast<const char*>(next.from)), end_(at_ + next.bytes), lines_(int((next.bytes / 64 + steps) / steps)) {}
    INLINE_MEMBER void step() {
        for (int i = 0; i < lines_ && at_ < end_; i++, at_ += 64) __builtin_prefetch(at_, 0, 2);
    }

private:
    const char *at_, *end_;
    int lines_;
};

// --- the order of blocks ---
//
// Sixteen lanes, virtual ones, take blocks b mod 16 and are added by a tree at the end, which asks for lane 0 and 8, then 4 and
// 12, and so on: in this order few sums are kept, as in counting with bits. Lanes without blocks add zeros, so that only as
// many as the next power of two are visited.
constexpr int VIRTUAL_LANES = 16;

INLINE int lanes_of(int blocks) {
    int lanes = 1;
    while (lanes < blocks && lanes < VIRTUAL_LANES) lanes *= 2;
    return lanes;
}
// The i-th lane of so many.
INLINE int visited(int i, int lanes) {
    int lane = 0;
    for (int bit = 1; bit < lanes; bit *= 2, i /= 2) lane = 2 * lane + (i & 1);
    return lane;
}
INLINE int blocks_of_lane(int lane, int blocks) { return lane < blocks ? (blocks - lane - 1) / VIRTUAL_LANES + 1 : 0; }

// Calls body(block) in that order.
template <class Body> INLINE void each_block(int blocks, const Body& body) {
    const int lanes = lanes_of(blocks);
    for (int i = 0; i < lanes; i++)
        for (int b = visited(i, lanes); b < blocks; b += VIRTUAL_LANES) body(b);
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
