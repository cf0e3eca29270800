"""Numbers into the block formats of 32: one scale a block, and for some a minimum.

All but IQ4_NL follow gguf-py's arithmetic (float32, in its order), and both give the same bytes.
Suffixes: N blocks, P their 32 numbers, Y bytes.
"""

from itertools import pairwise

import torch
from torch import Tensor

from moebius.ops.formats.blocks_of_32 import E2M1_TWICE, IQ4_VALUES
from moebius.quantize.packing import five_bits, half_bytes, inverse, nibbles, power_of_two
from moebius.quantize.search import Levels, columns, nearest_scale

# Between which magnitudes a number goes to the next value of E2M1: half way, ties to the lower.
_E2M1_BETWEEN = tuple((low + high) / 2 for low, high in pairwise(E2M1_TWICE[:8]))


def _of_largest(x_NP: Tensor, lowest: int) -> tuple[Tensor, Tensor]:
    """Scales (N, 1) by which each block's largest number becomes `lowest`, and codes from 0 on."""
    largest_N1 = x_NP.gather(1, x_NP.abs().argmax(dim=1, keepdim=True))
    d_N1 = largest_N1 / lowest
    codes_NP = (x_NP * inverse(d_N1) + (0.5 - lowest)).trunc_().clamp_(0, -2 * lowest - 1)
    return d_N1, codes_NP.to(torch.uint8)


def _of_range(x_NP: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and minima (N, 1) by which each block reaches from 0 to `most`, and its codes."""
    least_N1 = x_NP.amin(dim=1, keepdim=True)
    d_N1 = (x_NP.amax(dim=1, keepdim=True) - least_N1) / most
    codes_NP = ((x_NP - least_N1) * inverse(d_N1) + 0.5).trunc_().clamp_(0, most)
    return d_N1, least_N1, codes_NP.to(torch.uint8)


def q4_0(x_NP: Tensor) -> Tensor:
    d_N1, codes_NP = _of_largest(x_NP, -8)
    return torch.cat((half_bytes(d_N1), nibbles(codes_NP, 16)), dim=1)


def q4_1(x_NP: Tensor) -> Tensor:
    d_N1, least_N1, codes_NP = _of_range(x_NP, 15)
    return torch.cat((half_bytes(d_N1), half_bytes(least_N1), nibbles(codes_NP, 16)), dim=1)


def q5_0(x_NP: Tensor) -> Tensor:
    d_N1, codes_NP = _of_largest(x_NP, -16)
    return torch.cat((half_bytes(d_N1), five_bits(codes_NP)), dim=1)


def q5_1(x_NP: Tensor) -> Tensor:
    d_N1, least_N1, codes_NP = _of_range(x_NP, 31)
    return torch.cat((half_bytes(d_N1), half_bytes(least_N1), five_bits(codes_NP)), dim=1)


def q8_0(x_NP: Tensor) -> Tensor:
    d_N1 = x_NP.abs().amax(dim=1, keepdim=True) / 127
    scaled_NP = x_NP * inverse(d_N1)
    # Halves go away from zero; a float just below one must not.
    size_NP = scaled_NP.abs()
    whole_NP = size_NP.floor()
    whole_NP += ((size_NP - whole_NP) * 2).floor_()
    codes_NP = whole_NP.copysign_(scaled_NP).to(torch.int8)
    return torch.cat((half_bytes(d_N1), codes_NP.view(torch.uint8)), dim=1)


def iq4_nl(x_NP: Tensor) -> Tensor:
    levels = Levels(IQ4_VALUES)
    x_PN = columns(x_NP)
    d_N = nearest_scale(x_PN, x_PN * x_PN, levels, steps=7, reach=7.0)
    d_N = d_N.half().float()
    codes_PN = levels.codes(levels.nearest(x_PN * inverse(d_N)))
    return torch.cat((half_bytes(d_N.unsqueeze(1)), nibbles(codes_PN.t(), 16)), dim=1)


def mxfp4_blocks(codes_RY: Tensor, scales_RG: Tensor) -> Tensor:
    """GGUF's blocks of the codes and scales of Mxfp4Planes: (R, 17 * G). The numbers stay."""
    pairs_NY = codes_RY.reshape(-1, 16)
    codes_NP = torch.stack((pairs_NY & 15, pairs_NY >> 4), dim=-1).flatten(1)
    blocks_NY = torch.cat((scales_RG.reshape(-1, 1), nibbles(codes_NP, 16)), dim=1)
    return blocks_NY.view(len(codes_RY), -1)


def mxfp4(x_NP: Tensor) -> Tensor:
    """The scale is the power of two by which the largest number lies within 4 to 8 (OCP
    Microscaling Formats 1.0, 6.3); what is beyond 6 becomes 6."""
    size_NP = x_NP.abs()
    largest_N1 = size_NP.amax(dim=1, keepdim=True)
    # frexp's fraction is from 1/2 to 1.
    power_N1 = torch.frexp(largest_N1).exponent - 1
    e_N1 = torch.where(largest_N1 > 0, (power_N1 - 2 + 127).clamp(0, 254), 0)
    # In two steps: 2^(128 - e) alone may be beyond float32.
    part_N1 = e_N1 // 2
    twice_NP = size_NP * power_of_two(64 - part_N1) * power_of_two(64 - (e_N1 - part_N1))
    codes_NP = torch.zeros_like(x_NP, dtype=torch.uint8)
    for between in _E2M1_BETWEEN:
        codes_NP += twice_NP > between
    codes_NP += ((x_NP < 0) & (codes_NP > 0)).to(torch.uint8) << 3
    return torch.cat((e_N1.to(torch.uint8), nibbles(codes_NP, 16)), dim=1)
