"""Codes of four and eight bits, two at a time: a card's own instructions for pairs of 16-bit
numbers.

A card's memory brings a code of four bits in the time of some three instructions, and one of eight
bits in that of six; one number at a time takes ten and more. What is here has no meaning in the
interpreter, which computes the same with plain operations (kernels/weights.py); tests read the
instructions one by one.

$0 and so on are an assembler's operands: results first.
"""

import triton
import triton.language as tl

# Which of four bytes go to the low bytes of a pair.
_FIRST_TWO = "0x4140"
_LAST_TWO = "0x4342"


def _number(into: str, sign: int, rest: int, mask: str) -> str:
    """The pair `two`, codes of a sign and some bits, as bfloat16: moved up by so many bits to where
    that has its sign, and where the last bits of its exponent meet the first of its fraction. There
    they are 1 / unit of what they stand for, those without a leading one included, and products
    with the unit are exact."""
    return f"""
    shl.b32 sign, two, {sign};
    shl.b32 rest, two, {rest};
    and.b32 sign, sign, 0x80008000;
    and.b32 rest, rest, {mask};
    or.b32 rest, rest, sign;
    fma.rn.bf16x2 {into}, rest, unit, none;"""


def _numbers(unit: str, *steps: str) -> tl.constexpr:
    """none: minus zero, which added changes no sign of a zero."""
    return tl.constexpr(
        f"""{{
    .reg .b32 two, sign, rest, unit, none;
    mov.b32 unit, {unit};
    mov.b32 none, 0x80008000;"""
        + "".join(steps)
        + "\n}"
    )


def _e2m1_pair(two: str, low: str, high: str, scale: str) -> str:
    return (
        f"\n    prmt.b32 two, $4, 0, {two};"
        + _number("rest", 12, 6, "0x01C001C0")
        + f"\n    fma.rn.bf16x2 {low}, rest, {scale}, none;"
        + _number("rest", 8, 2, "0x01C001C0")
        + f"\n    fma.rn.bf16x2 {high}, rest, {scale}, none;"
    )


def _e4m3_pair(two: str, into: str) -> str:
    return f"\n    prmt.b32 two, $2, 0, {two};" + _number(into, 8, 4, "0x07F007F0")


def _nibble_pair(two: str, low: str, high: str) -> str:
    return f"""
    prmt.b32 two, $4, 0, {two};
    and.b32 code, two, 0x000F000F;
    or.b32 code, code, 0x64006400;
    fma.rn.f16x2 {low}, code, one, offset;
    and.b32 code, two, 0x00F000F0;
    or.b32 code, code, 0x64006400;
    fma.rn.f16x2 {high}, code, sixteenth, its_offset;"""


# Each byte's low and high four bits, numbers of OCP Microscaling's E2M1, times a scale, as
# bfloat16: $0, $1 the low ones of four bytes $4, $2, $3 the high ones; $5, $6 the bytes' scales.
# The unit is 2^126.
E2M1 = _numbers(
    "0x7E807E80",
    _e2m1_pair(_FIRST_TWO, "$0", "$2", "$5"),
    _e2m1_pair(_LAST_TWO, "$1", "$3", "$6"),
)
# What four bytes $2 are in FP8's E4M3 (arXiv 2209.05433), as bfloat16, but 480 for what is no
# number: $0 and $1. The unit is 2^120.
E4M3 = _numbers("0x7B807B80", _e4m3_pair(_FIRST_TWO, "$0"), _e4m3_pair(_LAST_TWO, "$1"))
# Each byte's low and high four bits, numbers from 0 to 15, as float16: $0, $1 the low ones of four
# bytes $4, $2, $3 the high ones. In the last bits of a float16 of 1,024 they are as much more than
# it, or sixteen times as much.
NIBBLES = tl.constexpr(
    """{
    .reg .b32 two, code, one, offset, sixteenth, its_offset;
    mov.b32 one, 0x3C003C00;
    mov.b32 offset, 0xE400E400;
    mov.b32 sixteenth, 0x2C002C00;
    mov.b32 its_offset, 0xD400D400;"""
    + _nibble_pair(_FIRST_TWO, "$0", "$2")
    + _nibble_pair(_LAST_TWO, "$1", "$3")
    + "\n}"
)


@triton.jit
def e2m1(both, scale):
    """Bytes of two codes each, and the scale of each byte's, bfloat16 by its bits (int16): what the
    low ones stand for, and the high ones, bfloat16."""
    return tl.inline_asm_elementwise(
        E2M1, "=r,=r,=r,=r,r,r,r", [both, scale], (tl.bfloat16, tl.bfloat16), True, 4
    )


@triton.jit
def nibbles(both):
    """The low and the high four bits of each byte, float16."""
    return tl.inline_asm_elementwise(
        NIBBLES, "=r,=r,=r,=r,r", [both], (tl.float16, tl.float16), True, 4
    )


@triton.jit
def e4m3(codes):
    """Bytes of E4M3 as bfloat16, exactly; 480 or -480 for what is no number."""
    return tl.inline_asm_elementwise(E4M3, "=r,=r,r", [codes], tl.bfloat16, True, 4)
