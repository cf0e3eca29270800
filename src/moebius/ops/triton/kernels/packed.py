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

# Each byte's low and high four bits, numbers of OCP Microscaling's E2M1, times a scale, as
# bfloat16: $0, $1 the low ones of four bytes $4, $2, $3 the high ones; $5, $6 the bytes' scales.
#
# A sign and three bits, put where a bfloat16 has its sign, the last two bits of its exponent and
# the first of its fraction, are 2^-126 times what the code stands for, zero and the half without a
# leading one included. All products are exact.
E2M1 = tl.constexpr("""
{
.reg .b32 two, sign, rest, unit, none;
mov.b32 unit, 0x7E807E80;
mov.b32 none, 0x80008000;
prmt.b32 two, $4, 0, 0x4140;
shl.b32 sign, two, 12;
shl.b32 rest, two, 6;
and.b32 sign, sign, 0x80008000;
and.b32 rest, rest, 0x01C001C0;
or.b32 rest, rest, sign;
fma.rn.bf16x2 rest, rest, unit, none;
fma.rn.bf16x2 $0, rest, $5, none;
shl.b32 sign, two, 8;
shl.b32 rest, two, 2;
and.b32 sign, sign, 0x80008000;
and.b32 rest, rest, 0x01C001C0;
or.b32 rest, rest, sign;
fma.rn.bf16x2 rest, rest, unit, none;
fma.rn.bf16x2 $2, rest, $5, none;
prmt.b32 two, $4, 0, 0x4342;
shl.b32 sign, two, 12;
shl.b32 rest, two, 6;
and.b32 sign, sign, 0x80008000;
and.b32 rest, rest, 0x01C001C0;
or.b32 rest, rest, sign;
fma.rn.bf16x2 rest, rest, unit, none;
fma.rn.bf16x2 $1, rest, $6, none;
shl.b32 sign, two, 8;
shl.b32 rest, two, 2;
and.b32 sign, sign, 0x80008000;
and.b32 rest, rest, 0x01C001C0;
or.b32 rest, rest, sign;
fma.rn.bf16x2 rest, rest, unit, none;
fma.rn.bf16x2 $3, rest, $6, none;
}
""")
# Each byte's low and high four bits, numbers from 0 to 15, as float16: $0, $1 the low ones of four
# bytes $4, $2, $3 the high ones.
#
# In the last bits of a float16 of 1,024 they are as much more than it, or sixteen times as much.
NIBBLES = tl.constexpr("""
{
.reg .b32 two, code, one, offset, sixteenth, its_offset;
mov.b32 one, 0x3C003C00;
mov.b32 offset, 0xE400E400;
mov.b32 sixteenth, 0x2C002C00;
mov.b32 its_offset, 0xD400D400;
prmt.b32 two, $4, 0, 0x4140;
and.b32 code, two, 0x000F000F;
or.b32 code, code, 0x64006400;
fma.rn.f16x2 $0, code, one, offset;
and.b32 code, two, 0x00F000F0;
or.b32 code, code, 0x64006400;
fma.rn.f16x2 $2, code, sixteenth, its_offset;
prmt.b32 two, $4, 0, 0x4342;
and.b32 code, two, 0x000F000F;
or.b32 code, code, 0x64006400;
fma.rn.f16x2 $1, code, one, offset;
and.b32 code, two, 0x00F000F0;
or.b32 code, code, 0x64006400;
fma.rn.f16x2 $3, code, sixteenth, its_offset;
}
""")
# What four bytes $2 are in FP8's E4M3 (arXiv 2209.05433), as bfloat16, but 480 for what is no
# number: $0 and $1.
#
# As above: with all four bits of an exponent and three of a fraction, 2^-120 times the number.
E4M3 = tl.constexpr("""
{
.reg .b32 two, sign, rest, unit, none;
mov.b32 unit, 0x7B807B80;
mov.b32 none, 0x80008000;
prmt.b32 two, $2, 0, 0x4140;
shl.b32 sign, two, 8;
shl.b32 rest, two, 4;
and.b32 sign, sign, 0x80008000;
and.b32 rest, rest, 0x07F007F0;
or.b32 rest, rest, sign;
fma.rn.bf16x2 $0, rest, unit, none;
prmt.b32 two, $2, 0, 0x4342;
shl.b32 sign, two, 8;
shl.b32 rest, two, 4;
and.b32 sign, sign, 0x80008000;
and.b32 rest, rest, 0x07F007F0;
or.b32 rest, rest, sign;
fma.rn.bf16x2 $1, rest, unit, none;
}
""")


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
