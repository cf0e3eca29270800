"""Matrices of several planes as blocks of GGUF's types, which stand for the same numbers.

So kernels compute with them that read blocks alone. Codes stay what they are, and a group's scale
is written into each of its blocks.

Suffixes: R rows, C columns, B blocks of a row, 32 numbers each.
"""

import torch
from torch import Tensor

from moebius.ops.formats.format import Format, Planes
from moebius.ops.formats.fp4 import Mxfp4Planes
from moebius.ops.formats.groups import two_a_byte
from moebius.ops.formats.integers import Integers
from moebius.ops.formats.repacked import Repacked

# What is added to a signed code to get the block's.
_OFFSETS = {"q4_0": 8, "q5_0": 16, "q8_0": 0}


class Inexact(ValueError):
    """The other format does not hold these very numbers."""


def repacked(format: Format, planes: Planes, wanted: str) -> Planes:
    """The planes of the format `wanted`, which stand for the same numbers.

    From GPTQ and AWQ to what they are repacked to, and from these and MXFP4 to blocks. Raises
    ValueError for planes that contradict their format, Inexact where the numbers would be others.
    """
    if isinstance(format, Repacked):
        planes = format.repacked(planes)
        format = format.target
        if format.name == wanted:
            return planes
    if isinstance(format, Mxfp4Planes):
        return (_mxfp4_as_blocks(planes),)
    assert isinstance(format, Integers), f"nothing makes {wanted} of {format.name}"
    return (_integers_as_blocks(format, planes, wanted),)


def _integers_as_blocks(format: Integers, planes: Planes, wanted: str) -> Tensor:
    """The bytes of q4_0, q5_0 or q8_0 blocks (R, B * bytes)."""
    codes_RC = format.signed_codes(planes)
    rows = len(codes_RC)
    blocks_RBE = codes_RC.view(rows, -1, 32)
    scales_RG = planes[1]
    halves_RB = _halves(scales_RG, blocks_RBE)
    unsigned = (blocks_RBE + _OFFSETS[wanted]).to(torch.uint8)
    parts = [halves_RB.unsqueeze(-1).view(torch.uint8)]
    if wanted == "q5_0":
        bits = (unsigned >> 4).view(rows, -1, 4, 8) << torch.arange(8, dtype=torch.uint8)
        parts.append(bits.sum(-1, dtype=torch.uint8))
    parts.append(unsigned if wanted == "q8_0" else _paired(unsigned & 15))
    return torch.cat(parts, dim=-1).view(rows, -1)


def _mxfp4_as_blocks(planes: Planes) -> Tensor:
    """The bytes of mxfp4 blocks (R, B * 17)."""
    codes, exponents_RB = planes
    if bool((exponents_RB == 255).any()):
        raise Inexact("one of its scales is NaN")
    rows = len(codes)
    codes_RBE = two_a_byte(codes).view(rows, -1, 32)
    return torch.cat([exponents_RB.unsqueeze(-1), _paired(codes_RBE)], dim=-1).view(rows, -1)


def _paired(codes_RBE: Tensor) -> Tensor:
    """A byte holds number i of a block in its low bits, and number 16 + i in its high ones."""
    return codes_RBE[..., :16] | (codes_RBE[..., 16:] << 4)


def _halves(scales_RG: Tensor, blocks_RBE: Tensor) -> Tensor:
    """Each block's scale in float16; 0 where all of its codes are."""
    per_group = blocks_RBE.shape[1] // scales_RG.shape[1]
    scales_RB = scales_RG.repeat_interleave(per_group, dim=1)
    halves_RB = scales_RB.to(torch.float16)
    lost = halves_RB.to(scales_RB.dtype) != scales_RB
    if bool(lost.any()):
        nothing = (blocks_RBE == 0).all(-1)
        if bool((lost & ~nothing).any()):
            raise Inexact("float16 does not hold one of its scales exactly")
        halves_RB = halves_RB.masked_fill(lost, 0.0)
    return halves_RB
