"""Block formats of 32 numbers that share one scale, and for some a minimum.

Sixteen bytes of four-bit codes hold numbers 0 to 15 in their low bits and 16 to 31 in their high
ones.
"""

import torch
from torch import Tensor

from moebius.ops.formats.blocks import BlockFormat, Unpacked, fields, halves, looked_up, nibbles

# What the codes of IQ4_NL and IQ4_XS stand for, in units of the scale.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice what four-bit floating point (E2M1, OCP Microscaling Formats 1.0) stands for.
E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _q4_0(blocks_NY: Tensor) -> Unpacked:
    return Unpacked(halves(blocks_NY, 0), nibbles(blocks_NY[:, 2:], 16).float() - 8)


def _q4_1(blocks_NY: Tensor) -> Unpacked:
    codes_N1P = nibbles(blocks_NY[:, 4:], 16).float()
    return Unpacked(halves(blocks_NY, 0), codes_N1P, halves(blocks_NY, 2))


def _five_bits(blocks_NY: Tensor, start: int) -> Tensor:
    """Codes whose fifth bits are the four bytes from `start`, and the rest follow: (N, 1, 32)."""
    fifth_N1P = fields(blocks_NY[:, start : start + 4], 1, 1).reshape(len(blocks_NY), 1, 32)
    return (nibbles(blocks_NY[:, start + 4 :], 16) | (fifth_N1P << 4)).float()


def _q5_0(blocks_NY: Tensor) -> Unpacked:
    return Unpacked(halves(blocks_NY, 0), _five_bits(blocks_NY, 2) - 16)


def _q5_1(blocks_NY: Tensor) -> Unpacked:
    return Unpacked(halves(blocks_NY, 0), _five_bits(blocks_NY, 4), halves(blocks_NY, 2))


def _q8_0(blocks_NY: Tensor) -> Unpacked:
    codes_NP = blocks_NY[:, 2:].view(torch.int8).float()
    return Unpacked(halves(blocks_NY, 0), codes_NP.unsqueeze(1))


def _iq4_nl(blocks_NY: Tensor) -> Unpacked:
    return Unpacked(halves(blocks_NY, 0), looked_up(nibbles(blocks_NY[:, 2:], 16), IQ4_VALUES))


def _mxfp4(blocks_NY: Tensor) -> Unpacked:
    codes_N1P = looked_up(nibbles(blocks_NY[:, 1:], 16), E2M1_TWICE)
    return Unpacked(half_power(blocks_NY[:, :1]), codes_N1P)


def half_power(exponents: Tensor) -> Tensor:
    """2^(e - 128), half of what an E8M0 scale stands for, as codes are twice theirs: float32."""
    e = exponents.int()
    subnormal = torch.tensor(0x00200000, dtype=torch.int32, device=e.device) << e.clamp(max=1)
    return torch.where(e < 2, subnormal, (e - 1) << 23).view(torch.float32)


BLOCKS_OF_32 = (
    BlockFormat("q4_0", 32, 18, _q4_0),
    BlockFormat("q4_1", 32, 20, _q4_1, exact=None),
    BlockFormat("q5_0", 32, 22, _q5_0),
    BlockFormat("q5_1", 32, 24, _q5_1, exact=None),
    BlockFormat("q8_0", 32, 34, _q8_0),
    BlockFormat("iq4_nl", 32, 18, _iq4_nl),
    BlockFormat("mxfp4", 32, 17, _mxfp4, exact=torch.bfloat16),
)
