// Weight rows as a panel: fetched a lane a row while still packed, so that every instruction cuts out codes of all rows.
#pragma once
#include "panel_kinds.h"

namespace moebius {
namespace MOEBIUS_ISA {

constexpr uint32_t NIBBLES = 0x0f0f0f0f, TWO_BITS = 0x03030303, LOW_BITS = 0x01010101;

// 2^(e - 128), of which the first two are subnormal
INLINE Words half_power_bits(Words e) {
    const Words small = (Words)(e < 2);
    return (small & (0x00200000u << (e & 1))) | (~small & ((e - 1) << 23));
}

template <int N> struct HalfWords {
    typedef int16_t type __attribute__((vector_size(4 * N)));
};
// The low bytes of halves, those of `odd` behind those of `even`.
INLINE Words bytes_side_by_side(Words even, Words odd) { return (even & 0x00ff00ff) | ((odd & 0x00ff00ff) << 8); }
// The sum of the four unsigned bytes of each lane.
INLINE Ints byte_sums(Words bytes) {
    const Words halves = (bytes & 0x00ff00ff) + ((bytes >> 8) & 0x00ff00ff);
    return (Ints)((halves & 0xffff) + (halves >> 16));
}

// The scales and zero points of LANES rows that have them in a plane of their own.
struct PanelGroups {
    const GroupScales& all;
    size_t first[LANES];  // of each row

    PanelGroups(const GroupScales& all, int n, int blocks) : all(all) {
        for (int r = 0; r < LANES; r++) first[r] = size_t(min_of(r, n - 1)) * (blocks / all.blocks);
    }
    template <class T> INLINE_MEMBER Words words(const void* plane, int block) const {
        alignas(VECTOR) uint32_t found[LANES];
        const T* from = static_cast<const T*>(plane) + block / all.blocks;
        for (int r = 0; r < LANES; r++) found[r] = from[first[r]];
        return read<Words>(found);
    }
    INLINE_MEMBER Floats scales(int block) const { return numbers(all.data, block); }
    INLINE_MEMBER Floats biases(int block) const { return numbers(all.biases, block); }
    INLINE_MEMBER Floats numbers(const void* plane, int block) const {
        switch (all.type) {
            case BF16_SCALES: return (Floats)(words<uint16_t>(plane, block) << 16);
            case F16_SCALES: return widened_halves(words<uint16_t>(plane, block));
            case F32_SCALES: return (Floats)words<uint32_t>(plane, block);
            default: {
                const Words e = words<uint8_t>(plane, block), nan = (Words)(e == 255);
                return (Floats)((nan & 0x7fc00000) | (~nan & half_power_bits(e)));
            }
        }
    }
    INLINE_MEMBER Words zeros(int block) const {
        alignas(VECTOR) uint32_t found[LANES] = {};
        if (all.zeros)
            for (int r = 0; r < LANES; r++) found[r] = uint32_t(int32_t(all.zeros[block / all.blocks + first[r]]));
        return read<Words>(found);
    }
};

// A block of LANES rows, from byte `from` of each on, and where it goes.
template <Format TYPE> struct PanelBlock {
    using K = typename KindOf<TYPE>::type;
    static constexpr bool SIGNED = SCHEME == PLAIN || SCHEME == TILES || K::CHAIN == 0;

    const uint8_t* const* rows;
    size_t from;
    char* to;
    const PanelGroups* groups;
    int number;  // of the block in its row
    Ints scales[Block<TYPE>::ELEMENTS / Block<TYPE>::SUB];
    Ints lift = {};

    INLINE_MEMBER void fetch(size_t at, Words* four) const { turn(rows, from + at, four); }
    INLINE_MEMBER Words halves(size_t at) const { return halves_of(rows, from + at); }
    INLINE_MEMBER void vector(int at, Words v) const { put(to + size_t(at) * VECTOR, v); }

    // Scales are set before the codes that they belong to.
    INLINE_MEMBER void set_scale(int sub, Ints scale) {
        scales[sub] = scale;
        if constexpr (K::SCALED) vector(K::SCALES_AT + sub, (Words)(SCHEME == PAIRS ? doubled(scale) : scale));
    }
    INLINE_MEMBER Ints scale_of(int quad) const { return scales[quad * 4 / Block<TYPE>::SUB]; }
    // Four unsigned codes of each row.
    INLINE_MEMBER void set_quad(int quad, Words codes) {
        if constexpr (SIGNED) codes = bytes_less(codes, Block<TYPE>::OFFSET);
        if constexpr (K::LIFTED) {
            const Ints sizes = byte_sums(byte_sizes(codes) & negative_bytes(codes));
            lift += K::SCALED ? sizes * scale_of(quad) : sizes;
        }
        if constexpr (KindOf<TYPE>::FOLDS && SCHEME == QUADS) {
            // Four products in one: what a byte carries over is what its neighbour's sum lacks, as all four results are unsigned.
            const Words scale = (Words)scale_of(quad);
            codes *= scale;
            if constexpr (TYPE == Q3_K) codes += FOLDED_Q3_OFFSET * LOW_BITS - scale * (4 * LOW_BITS);
        }
        if constexpr (KindOf<TYPE>::FOLDS && SCHEME == TILES) set_planes(quad, codes);
        else vector(quad, codes);
    }
    // Products of signed codes and their scale, in 16 bits, as low and high bytes.
    INLINE_MEMBER void set_planes(int quad, Words codes) const {
        using Shorts = typename HalfWords<LANES>::type;
        const Shorts scale = (Shorts)doubled(TYPE == Q3_K ? -scale_of(quad) : scale_of(quad));
        const Shorts even = ((Shorts)(codes << 8) >> 8) * scale, odd = ((Shorts)codes >> 8) * scale;
        if constexpr (K::PLANES == 1) vector(quad, bytes_side_by_side((Words)even, (Words)odd));
        else {
            constexpr int16_t LOW = (1 << PLANE_BITS) - 1;
            vector(quad, bytes_side_by_side((Words)(even & LOW), (Words)(odd & LOW)));
            vector(K::QUADS_OF_BLOCK + quad, bytes_side_by_side((Words)(even >> PLANE_BITS), (Words)(odd >> PLANE_BITS)));
        }
    }
    INLINE_MEMBER void finish() const {
        if constexpr (K::LIFTED) vector(K::LIFT_AT, (Words)lift);
    }
    // Of two neighbouring sub-blocks.
    INLINE_MEMBER void set_minima(int pair, Ints first, Ints second) const {
        vector(K::MINIMA_AT + pair, (Words)(first | (second << 16)));
    }
    INLINE_MEMBER void set_d(Floats d) const { vector(K::D_AT, (Words)(SCHEME == TILES && TYPE == Q3_K ? -d : d)); }
    INLINE_MEMBER void set_minimum(Floats m) const { vector(K::D_AT + 1, (Words)m); }
    // float16 d and minimum, the low and the high halves
    INLINE_MEMBER void set_d_and_minimum(Words both) const {
        set_d(widened_halves(both & 0xffff));
        set_minimum(widened_halves(both >> 16));
    }
};

// The i-th byte of each lane, unsigned or signed.
INLINE Ints byte_of(Words words, int i) { return (Ints)((words >> (8 * i)) & 0xff); }
INLINE Ints signed_byte_of(Words words, int i) { return (Ints)(words << (24 - 8 * i)) >> 24; }

// Four bits of each of sixteen bytes from `at` on are quads `low` to low + 3, the others `high` to high + 3.
template <Format TYPE, class Finish> INLINE void nibble_quads(PanelBlock<TYPE>& block, size_t at, int low, int high, const Finish& finish) {
    Words four[4];
    block.fetch(at, four);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        block.set_quad(low + j, finish(four[j] & NIBBLES, low + j));
        block.set_quad(high + j, finish((four[j] >> 4) & NIBBLES, high + j));
    }
}
INLINE Words as_they_are(Words codes, int) { return codes; }

// --- blocks of 32 ---

INLINE void unpack(PanelBlock<Q4_0>& block) {
    nibble_quads(block, 2, 0, 4, as_they_are);
    block.set_d(widened_halves(block.halves(0)));
}

INLINE void unpack(PanelBlock<Q4_1>& block) {
    nibble_quads(block, 4, 0, 4, as_they_are);
    block.set_d(widened_halves(block.halves(0)));
    block.set_minimum(widened_halves(block.halves(2)));
}

// The fifth bits of the 32 codes of a row are one word.
template <Format TYPE> INLINE void unpack_five_bits(PanelBlock<TYPE>& block, Words fifth, size_t at) {
    nibble_quads(block, at, 0, 4, [&](Words codes, int quad) {
        return codes | (spread_bits(fifth >> (4 * quad)) << 4);
    });
}

INLINE void unpack(PanelBlock<Q5_0>& block) {
    unpack_five_bits(block, block.halves(2) | (block.halves(4) << 16), 6);
    block.set_d(widened_halves(block.halves(0)));
}

INLINE void unpack(PanelBlock<Q5_1>& block) {
    Words head[4];
    block.fetch(0, head);
    unpack_five_bits(block, head[1], 8);
    block.set_d_and_minimum(head[0]);
}

INLINE void unpack(PanelBlock<Q8_0>& block) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        Words four[4];
        block.fetch(2 + 16 * half, four);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) block.set_quad(4 * half + j, four[j] ^ (128 * LOW_BITS));
    }
    block.set_d(widened_halves(block.halves(0)));
}

INLINE void unpack(PanelBlock<IQ4_NL>& block) {
    nibble_quads(block, 2, 0, 4, [](Words codes, int) { return looked_up(codes, IQ4_CODES); });
    block.set_d(widened_halves(block.halves(0)));
}

INLINE void unpack(PanelBlock<MXFP4>& block) {
    nibble_quads(block, 1, 0, 4, [](Words codes, int) { return looked_up(codes, E2M1_CODES); });
    block.set_d((Floats)half_power_bits(block.halves(0) & 0xff));
}

// --- codes with their scales elsewhere ---

INLINE void unpack(PanelBlock<MXFP4_PLANES>& block) {
    nibble_quads(block, 0, 0, 4, [](Words codes, int) { return looked_up(codes, E2M1_CODES); });
    block.set_d(block.groups->scales(block.number));
}

INLINE void unpack(PanelBlock<INT4>& block) {
    const Words added = (8 - block.groups->zeros(block.number)) * LOW_BITS;  // from 0 to 16: nothing is carried
    nibble_quads(block, 0, 0, 4, [&](Words codes, int) { return codes + added; });
    block.set_d(block.groups->scales(block.number));
}

template <Format TYPE> INLINE void unpack_bytes(PanelBlock<TYPE>& block, Words turned) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        Words four[4];
        block.fetch(16 * half, four);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) block.set_quad(4 * half + j, four[j] ^ turned);
    }
    block.set_d(block.groups->scales(block.number));
}
INLINE void unpack(PanelBlock<INT8>& block) { unpack_bytes(block, Words{} + 128 * LOW_BITS); }
INLINE void unpack(PanelBlock<INT8_WORDS>& block) { unpack_bytes(block, Words{}); }

INLINE void unpack(PanelBlock<AFFINE4>& block) {
    nibble_quads(block, 0, 0, 4, as_they_are);
    block.set_d(block.groups->scales(block.number));
    block.set_minimum(block.groups->biases(block.number));
}
INLINE void unpack(PanelBlock<AFFINE8>& block) {
    unpack_bytes(block, Words{});
    block.set_minimum(block.groups->biases(block.number) + block.groups->scales(block.number) * all_floats(128));
}

// --- blocks of 256 ---

// Eight scales and minima of six bits each, of Q4_K and Q5_K: the four words before the codes, d and dmin among them.
template <Format TYPE> INLINE void unpack_head(PanelBlock<TYPE>& block) {
    Words head[4];
    block.fetch(0, head);
    block.set_d_and_minimum(head[0]);
    const Words scales[2] = {head[1] & 0x3f3f3f3f, (head[3] & NIBBLES) | ((head[1] >> 2) & 0x30303030)};
    const Words minima[2] = {head[2] & 0x3f3f3f3f, ((head[3] >> 4) & NIBBLES) | ((head[2] >> 2) & 0x30303030)};
#pragma GCC unroll 8
    for (int s = 0; s < 8; s++) block.set_scale(s, byte_of(scales[s / 4], s % 4));
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; pair++) {
        const Words four = minima[pair / 2];
        block.set_minima(pair, byte_of(four, pair % 2 * 2), byte_of(four, pair % 2 * 2 + 1));
    }
}

INLINE void unpack(PanelBlock<Q4_K>& block) {
    unpack_head(block);
    for (int chunk = 0; chunk < 4; chunk++)
        for (int part = 0; part < 2; part++) {
            const int low = 16 * chunk + 4 * part;
            nibble_quads(block, 16 + 32 * chunk + 16 * part, low, low + 8, as_they_are);
        }
}

INLINE void unpack(PanelBlock<Q5_K>& block) {
    unpack_head(block);
    for (int part = 0; part < 2; part++) {
        Words fifth[4];
        block.fetch(16 + 16 * part, fifth);
        for (int chunk = 0; chunk < 4; chunk++) {
            const int low = 16 * chunk + 4 * part;
            nibble_quads(block, 48 + 32 * chunk + 16 * part, low, low + 8, [&](Words codes, int quad) {
                return codes | (((fifth[quad % 4] >> (quad / 8)) & LOW_BITS) << 4);
            });
        }
    }
}

INLINE void unpack(PanelBlock<Q6_K>& block) {
    Words scales[4], last[4];
    block.fetch(192, scales);
    block.fetch(194, last);  // not a byte beyond the block
    block.set_d(widened_halves(last[3] >> 16));
#pragma GCC unroll 16
    for (int s = 0; s < 16; s++) block.set_scale(s, signed_byte_of(scales[s / 4], s % 4));
    for (int half = 0; half < 2; half++)
        for (int part = 0; part < 2; part++) {
            Words first[4], second[4], high[4];
            block.fetch(64 * half + 16 * part, first);
            block.fetch(64 * half + 16 * part + 32, second);
            block.fetch(128 + 32 * half + 16 * part, high);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const int quad = 32 * half + 4 * part + j;
                block.set_quad(quad, (first[j] & NIBBLES) | ((high[j] << 4) & 0x30303030));
                block.set_quad(quad + 8, (second[j] & NIBBLES) | ((high[j] << 2) & 0x30303030));
                block.set_quad(quad + 16, ((first[j] >> 4) & NIBBLES) | (high[j] & 0x30303030));
                block.set_quad(quad + 24, ((second[j] >> 4) & NIBBLES) | ((high[j] >> 2) & 0x30303030));
            }
        }
}

INLINE void unpack(PanelBlock<Q2_K>& block) {
    Words head[4], last[4];
    block.fetch(0, head);
    block.fetch(68, last);
    block.set_d_and_minimum(last[3]);
#pragma GCC unroll 16
    for (int s = 0; s < 16; s++) block.set_scale(s, byte_of(head[s / 4], s % 4) & 15);
#pragma GCC unroll 8
    for (int pair = 0; pair < 8; pair++) {
        const Words four = (head[pair / 2] >> 4) & NIBBLES;
        block.set_minima(pair, byte_of(four, pair % 2 * 2), byte_of(four, pair % 2 * 2 + 1));
    }
    for (int part = 0; part < 4; part++) {
        Words four[4];
        block.fetch(16 + 16 * part, four);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) block.set_quad(part / 2 * 32 + 8 * s + part % 2 * 4 + j, (four[j] >> (2 * s)) & TWO_BITS);
    }
}

// Sixteen scales of six bits: the low four bits of the first eight are in the low bits of eight bytes, of the others in the
// high ones; the high two in the last four bytes, from the lowest bits up.
INLINE void unpack_q3_scales(PanelBlock<Q3_K>& block) {
    Words last[4], words[3];
    block.fetch(94, last);  // two bytes before the scales, and d at the end
    block.set_d(widened_halves(last[3] >> 16));
#pragma GCC unroll 3
    for (int i = 0; i < 3; i++) words[i] = (last[i] >> 16) | (last[i + 1] << 16);
#pragma GCC unroll 4
    for (int four = 0; four < 4; four++) {
        const Words low = (words[four % 2] >> (four / 2 * 4)) & NIBBLES, high = (words[2] >> (2 * four)) & TWO_BITS;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) block.set_scale(4 * four + j, byte_of(low | (high << 4), j) - 32);
    }
}

INLINE void unpack(PanelBlock<Q3_K>& block) {
    unpack_q3_scales(block);
    for (int part = 0; part < 2; part++) {
        Words third[4];
        block.fetch(16 * part, third);
        for (int half = 0; half < 2; half++) {
            Words four[4];
            block.fetch(32 + 32 * half + 16 * part, four);
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const Words bit = (third[j] >> (4 * half + s)) & LOW_BITS;
                    block.set_quad(32 * half + 8 * s + 4 * part + j, ((four[j] >> (2 * s)) & TWO_BITS) | (bit << 2));
                }
        }
    }
}

INLINE void unpack(PanelBlock<IQ4_XS>& block) {
    Words head[4];
    block.fetch(0, head);
    block.set_d(widened_halves(head[0] & 0xffff));
#pragma GCC unroll 8
    for (int s = 0; s < 8; s++)
        block.set_scale(s, (Ints)(((head[1] >> (4 * s)) & 15) | (((head[0] >> (16 + 2 * s)) & 3) << 4)) - 32);
    for (int s = 0; s < 8; s++)
        nibble_quads(block, 8 + 16 * s, 8 * s, 8 * s + 4, [](Words codes, int) { return looked_up(codes, IQ4_CODES); });
}

// --- whole panels ---

template <Format TYPE> constexpr size_t panel_block_bytes() { return size_t(KindOf<TYPE>::type::PANEL_VECTORS) * VECTOR; }

// Lanes beyond the n rows repeat the last one.
template <Format TYPE> void unpack_panel(const void* w, int n, int blocks, const GroupScales& scales, void* to) {
    const size_t row_bytes = size_t(blocks) * Block<TYPE>::BYTES;
    const uint8_t* rows[LANES];
    for (int r = 0; r < LANES; r++) rows[r] = static_cast<const uint8_t*>(w) + min_of(r, n - 1) * row_bytes;
    const PanelGroups groups(scales, n, blocks);
    char* at = static_cast<char*>(to);
    each_block(blocks, [&](int b) {
        PanelBlock<TYPE> block;
        block.rows = rows, block.from = size_t(b) * Block<TYPE>::BYTES, block.to = at, block.groups = &groups, block.number = b;
        unpack(block);
        block.finish();
        at += panel_block_bytes<TYPE>();
    });
}

}  // namespace MOEBIUS_ISA
}  // namespace moebius
