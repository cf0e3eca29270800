"""Tiles of weights out of the planes that they are stored in, widened in registers, and products.

How wide loads may be is for the blocks to say. Those of Q8_0 (34 bytes) and Q6_K (210) begin at any
even address, so what lies there is loaded two bytes at a time: four, or sixteen, would be on
addresses that no card loads from. Those of Q4_K (144 bytes), and planes of codes alone, lie as
their rows do: where these are ALIGNED, the compiler joins neighbours to sixteen bytes. Those of
MXFP4 (17 bytes) begin anywhere: a loader makes planes of them.

A plane comes as an address, since the weights of a layer's experts, or of several linear layers,
are tensors of their own: tables have their addresses. FORMAT names what lies there, as
moebius.ops.formats does; moebius.ops.triton.weights says which are read.
"""

import triton
import triton.language as tl

from moebius.ops.triton.kernels import packed
from moebius.ops.triton.language import PACKED, dot, narrow, span


@triton.jit
def plain(address, NAME: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to plain numbers of the dtype NAME. ALIGNED: to 16 bytes."""
    if NAME == "bfloat16":
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif NAME == "float16":
        pointer = address.to(tl.pointer_type(tl.float16))
    elif NAME == "float32":
        pointer = address.to(tl.pointer_type(tl.float32))
    else:
        pointer = address.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def tile(
    codes, scales, row, inside, k, columns, stride, scale_stride,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """The numbers of rows `row` (N,), int64, at columns k to k + K - 1, in DTYPE: (N, K).

    They are zeros where not `inside` (N,), and from `columns` on. codes, scales: the addresses of
    the planes, whose rows are so many elements apart. k is a multiple of K.
    """
    if FORMAT == "q8_0":
        wide = _q8_0(codes, row, inside, k, columns, stride, N, K)
    elif FORMAT == "q4_k":
        wide = _q4_k(codes, row, inside, k, columns, stride, ALIGNED, N, K)
    elif FORMAT == "q6_k":
        wide = _q6_k(codes, row, inside, k, columns, stride, N, K)
    elif FORMAT == "mxfp4_planes":
        wide = _mxfp4_planes(
            codes, scales, row, inside, k, columns, stride, scale_stride, ALIGNED, DTYPE, N, K
        )
    elif FORMAT == "fp8":
        wide = _fp8(
            codes, scales, row, inside, k, columns, stride, scale_stride,
            SCALE, SCALE_ROWS, SCALE_COLUMNS, ALIGNED, N, K,
        )  # fmt: skip
    else:
        at = k + tl.arange(0, K)
        pointers = plain(codes, FORMAT, ALIGNED) + row[:, None] * stride + at[None, :]
        wide = tl.load(pointers, mask=inside[:, None] & (at < columns)[None, :], other=0.0)
    if wide.dtype != DTYPE:
        wide = narrow(wide.to(tl.float32), DTYPE)
    return wide


@triton.jit
def product(
    x, inside_m, codes, scales, row_n, inside_n, begin, end, columns, stride, scale_stride,
    FORMAT: tl.constexpr, SCALE: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Rows that begin at the pointers x (M,) times rows of weights (N,), of `columns` numbers each:
    (M, N), summed from `begin` to before `end` in steps of K, of which these are multiples."""
    acc = tl.zeros((M, N), tl.float32)
    for k in span(begin, end, K):
        at = k + tl.arange(0, K)
        here = inside_m[:, None] & (at < columns)[None, :]
        a = tl.load(x[:, None] + at[None, :], mask=here, other=0.0)
        b = tile(
            codes, scales, row_n, inside_n, k, columns, stride, scale_stride,
            FORMAT, SCALE, SCALE_ROWS, SCALE_COLUMNS, ALIGNED, DTYPE, N, K,
        )  # fmt: skip
        acc = dot(a.to(DTYPE), tl.trans(b), acc)
    return acc


@triton.jit
def _half(pointer, mask):
    """The float16 that begins at each byte: GGUF's blocks are aligned to nothing."""
    low = tl.load(pointer, mask=mask, other=0).to(tl.uint16)
    high = tl.load(pointer + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _blocks(address, row, inside, group, groups, stride, ALIGNED: tl.constexpr):
    """Where the rows' bytes begin (N, 1), and which of the groups (G,) are there (N, G)."""
    start = plain(address, "uint8", ALIGNED) + row[:, None] * stride
    return start, inside[:, None] & (group < groups)[None, :]


@triton.jit
def _q8_0(address, row, inside, k, columns, stride, N: tl.constexpr, K: tl.constexpr):
    """Blocks of 34 bytes on even addresses: a float16 scale, and 32 codes."""
    G: tl.constexpr = K // 32
    group = k // 32 + tl.arange(0, G)
    start, here = _blocks(address, row, inside, group, columns // 32, stride, False)
    block = (start + group[None, :] * 34).to(tl.pointer_type(tl.int16))
    scale = tl.load(block, mask=here, other=0).to(tl.float16, bitcast=True).to(tl.float32)
    at = block[:, :, None] + (1 + tl.arange(0, 16))[None, None, :]
    pairs = tl.load(at, mask=here[:, :, None], other=0).to(tl.int32)
    codes = tl.interleave((pairs << 24) >> 24, pairs >> 8)
    return tl.reshape(codes.to(tl.float32) * scale[:, :, None], (N, K))


@triton.jit
def _q4_k(
    address, row, inside, k, columns, stride, ALIGNED: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Blocks of 144 bytes: float16 units of scales and of minima, eight of these of six bits each,
    and codes: 32 bytes hold one group in their low bits and the next in their high ones."""
    G: tl.constexpr = K // 32
    RUNS: tl.constexpr = K // 64
    group = k // 32 + tl.arange(0, G)
    start, here = _blocks(address, row, inside, group, columns // 32, stride, ALIGNED)
    block = start + (group // 8)[None, :] * 144
    part = (group % 8)[None, :]
    late = part >= 4
    first = tl.load(block + 4 + part % 4, mask=here, other=0).to(tl.int32)
    second = tl.load(block + 8 + part % 4, mask=here, other=0).to(tl.int32)
    rest = tl.load(block + 12 + part % 4, mask=here & late, other=0).to(tl.int32)
    scale = tl.where(late, (rest & 15) | ((first >> 6) << 4), first & 63)
    least = tl.where(late, (rest >> 4) | ((second >> 6) << 4), second & 63)
    scale = _half(block, here) * scale.to(tl.float32)
    least = _half(block + 2, here) * least.to(tl.float32)
    run = k // 64 + tl.arange(0, RUNS)
    start, here = _blocks(address, row, inside, run, columns // 64, stride, ALIGNED)
    at = start + (run // 4 * 144 + 16 + run % 4 * 32)[None, :]
    both = tl.load(at[:, :, None] + tl.arange(0, 32)[None, None, :], mask=here[:, :, None], other=0)
    low, high = _nibbles(both)
    codes = tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), (N, G, 32))
    # Fused by name, as a compiler may fuse it in one kernel and not in another.
    wide = tl.fma(codes, scale[:, :, None], -least[:, :, None])
    return tl.reshape(wide, (N, K))


@triton.jit
def _nibbles(both):
    """The low and the high four bits of each byte, as float32."""
    if PACKED:
        low, high = packed.nibbles(both)
    else:
        low = both.to(tl.int32) & 15
        high = both.to(tl.int32) >> 4
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _q6_k(address, row, inside, k, columns, stride, N: tl.constexpr, K: tl.constexpr):
    """Blocks of 210 bytes on even addresses, two halves of four groups each: the low four bits of
    codes, 64 bytes a half, of which one holds two groups' in turn; their high two, 32 bytes a half;
    a scale of eight bits for each 16 codes; and the float16 unit of these."""
    G: tl.constexpr = K // 32
    group = k // 32 + tl.arange(0, G)
    start, here = _blocks(address, row, inside, group, columns // 32, stride, False)
    block = (start + (group // 8)[None, :] * 210).to(tl.pointer_type(tl.int16))
    half = (group % 8 // 4)[None, :]
    part = (group % 4)[None, :]
    low = _two_bytes(block + half * 32 + part % 2 * 16, here) >> (part // 2 * 4)[:, :, None]
    high = _two_bytes(block + 64 + half * 16, here) >> (part * 2)[:, :, None]
    codes = ((low & 15) | ((high & 3) << 4)) - 32
    unit = tl.load(block + 104, mask=here, other=0).to(tl.float16, bitcast=True).to(tl.float32)
    both = tl.load(block + 96 + (group % 8)[None, :], mask=here, other=0).to(tl.int32)
    first = unit * ((both << 24) >> 24).to(tl.float32)
    second = unit * (both >> 8).to(tl.float32)
    lane = tl.arange(0, 32)[None, None, :]
    scale = tl.where(lane < 16, first[:, :, None], second[:, :, None])
    return tl.reshape(codes.to(tl.float32) * scale, (N, K))


@triton.jit
def _two_bytes(pointer, here):
    """The 32 bytes behind each pointer (N, G) to two of them, as int32: (N, G, 32)."""
    at = pointer[:, :, None] + tl.arange(0, 16)[None, None, :]
    pairs = tl.load(at, mask=here[:, :, None], other=0).to(tl.int32)
    return tl.interleave(pairs & 0xFF, (pairs >> 8) & 0xFF)


@triton.jit
def _e2m1_twice(code):
    """Twice what four-bit floating point stands for: a sign, two bits of exponent, one of fraction
    (OCP Microscaling Formats 1.0)."""
    exponent = (code >> 1) & 3
    fraction = code & 1
    size = tl.where(exponent == 0, fraction, (2 + fraction) << tl.maximum(exponent - 1, 0))
    return tl.where((code & 8) != 0, -size, size).to(tl.float32)


@triton.jit
def _power(exponent):
    """2^exponent, as float32, of a number from -128 to 127."""
    field = exponent + 127
    # Below 2^-126 lie 2^-127 and 2^-128, which have no leading one.
    small = 0x00400000 >> tl.minimum(tl.maximum(-field, 0), 1)
    return tl.where(field > 0, field << 23, small).to(tl.float32, bitcast=True)


@triton.jit
def _mxfp4_planes(
    address, scales, row, inside, k, columns, stride, scale_stride, ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A byte holds an even column's code in its low bits and the next column's in its high ones; a
    power of two for each 32 columns lies in another plane, and 255 is none."""
    G: tl.constexpr = K // 32
    group = k // 32 + tl.arange(0, G)
    start, here = _blocks(scales, row, inside, group, columns // 32, scale_stride, False)
    exponent = tl.load(start + group[None, :], mask=here, other=0).to(tl.int32)
    at = k // 2 + tl.arange(0, K // 2)
    start, here = _blocks(address, row, inside, at, columns // 2, stride, ALIGNED)
    both = tl.load(start + at[None, :], mask=here, other=0)
    if PACKED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = tl.where(exponent == 0, 0x40, tl.where(exponent == 255, 0x7FC0, exponent << 7))
        scale = tl.broadcast_to(bits.to(tl.int16)[:, :, None], (N, G, 16))
        low, high = packed.e2m1(both, tl.reshape(scale, (N, K // 2)))
        wide = tl.interleave(low, high)
    else:
        both = both.to(tl.int32)
        scale = tl.where(exponent == 255, float("nan"), _power(tl.minimum(exponent, 254) - 128))
        codes = tl.reshape(tl.interleave(both & 15, both >> 4), (N, G, 32))
        wide = tl.reshape(_e2m1_twice(codes) * scale[:, :, None], (N, K))
    return wide


@triton.jit
def _fp8(
    address, scales, row, inside, k, columns, stride, scale_stride,
    SCALE: tl.constexpr, SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Codes E4M3 (arXiv 2209.05433), and a scale for each block of SCALE_ROWS x SCALE_COLUMNS; 0 is
    all of the matrix."""
    at = k + tl.arange(0, K)
    here = inside[:, None] & (at < columns)[None, :]
    pointers = plain(address, "uint8", ALIGNED) + row[:, None] * stride + at[None, :]
    number = _e4m3(tl.load(pointers, mask=here, other=0))
    block = row * 0
    if SCALE_ROWS != 0:
        block = row // SCALE_ROWS
    of_row = plain(scales, SCALE, False) + block * scale_stride
    if SCALE_COLUMNS % K == 0:
        # One block of columns, whatever the row.
        group = k * 0
        if SCALE_COLUMNS != 0:
            group = k // SCALE_COLUMNS
        scale = _scale(tl.load(of_row + group, mask=inside, other=0), SCALE)[:, None]
    else:
        pointers = of_row[:, None] + (at // SCALE_COLUMNS)[None, :]
        scale = _scale(tl.load(pointers, mask=here, other=0), SCALE)
    # Where there is no code it is a zero, under no scale or one that other columns here have, too.
    return number * scale


@triton.jit
def _e4m3(codes):
    """What bytes stand for, as float32."""
    if PACKED:
        number = packed.e4m3(codes).to(tl.float32)
    else:
        bits = codes.to(tl.uint16)
        # The fields of a float16, whose exponents begin 8 lower.
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        number = half.to(tl.float32) * 256.0
    # All ones but for the sign, which would be the next number behind the largest, are none.
    return tl.where(tl.abs(number) == 480.0, float("nan"), number)


@triton.jit
def _scale(found, SCALE: tl.constexpr):
    """A scale as float32: a number, or the byte of a power of two, of which 255 is none."""
    if SCALE == "float8_e8m0fnu":
        exponent = found.to(tl.int32)
        scale = tl.where(exponent == 255, float("nan"), _power(tl.minimum(exponent, 254) - 127))
    else:
        scale = found.to(tl.float32)
    return scale
