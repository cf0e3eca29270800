"""Matrices of 4-bit floating-point codes (E2M1, OCP Microscaling Formats 1.0) in planes.

A byte holds an even column's code in its low bits and the next column's in its high ones, unlike
GGUF's blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.ops.formats.format import Format, Planes, PlaneShape
from moebius.ops.formats.groups import times_groups

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# What the codes stand for; 8 is a zero with a sign.
_VALUES = _E2M1 + tuple(-value for value in _E2M1)
MX_GROUP = 32
_NV_GROUP = 16


def _codes(rows: int, columns: int, group: int) -> PlaneShape:
    if columns % group:
        raise ValueError(f"rows of {columns} numbers are no whole groups of {group}")
    return torch.uint8, (rows, columns // 2)


def _numbers(codes: Tensor) -> Tensor:
    pairs = torch.tensor([(_VALUES[b % 16], _VALUES[b // 16]) for b in range(256)])
    # Looked up as one thing of eight bytes each: seven times as fast as two numbers.
    wide = pairs.to(codes.device).view(torch.float64).view(-1)
    found = wide.index_select(0, codes.reshape(-1).int())
    return found.view(torch.float32).view(len(codes), 2 * codes.shape[1])


class Mxfp4Planes(Format):
    """Codes, and for each 32 columns a power of two, as E8M0: 2^(byte - 127), NaN for 255."""

    name = "mxfp4_planes"

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        scales = (torch.uint8, (rows, columns // MX_GROUP))
        return _codes(rows, columns, MX_GROUP), scales

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        codes, exponents = planes
        numbers = _numbers(codes)
        scales = exponents.contiguous().view(torch.float8_e8m0fnu).float()
        times_groups(numbers, scales, MX_GROUP)
        return numbers.to(dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return torch.promote_types(torch.bfloat16, dtype) == dtype


def planes_of_blocks(blocks_RY: Tensor) -> Planes:
    """Mxfp4Planes' planes of GGUF's MXFP4: blocks of 17 bytes (R, 17 * groups), on whatever device.

    A block is a scale and 16 bytes, the low bits of which are columns 0 to 15. Raises ValueError
    for a scale of 255, which is 2^128 there and no number here.
    """
    rows = len(blocks_RY)
    blocks_RGY = blocks_RY.view(rows, -1, 17)
    exponents_RG = blocks_RGY[:, :, 0].contiguous()
    if bool((exponents_RG == 255).any()):
        raise ValueError("a scale of its MXFP4 blocks is 2^128")
    both_RGY = blocks_RGY[:, :, 1:]
    columns_RGY = torch.cat((both_RGY & 15, both_RGY >> 4), 2)
    codes_RGY = columns_RGY[:, :, ::2] | (columns_RGY[:, :, 1::2] << 4)
    return codes_RGY.reshape(rows, -1), exponents_RG


@dataclass(frozen=True, slots=True, eq=False)
class Nvfp4(Format):
    """Codes, an E4M3 scale for each 16 columns, and one float32 for all.

    divided   the group's scale is divided by that one, as compressed-tensors does; else multiplied,
              as NVIDIA's modelopt does
    """

    name: str
    divided: bool

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        scales = (torch.float8_e4m3fn, (rows, columns // _NV_GROUP))
        return _codes(rows, columns, _NV_GROUP), scales, (torch.float32, (1,))

    def select(self, planes: Planes, rows: slice | Tensor) -> tuple[Format, Planes]:
        codes, scales, whole = planes
        # torch indexes no 8-bit floating point on every device.
        return self, (codes[rows], scales.view(torch.uint8)[rows].view(scales.dtype), whole)

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        codes, scales, whole = planes
        numbers = _numbers(codes)
        wide = scales.float()
        wide = wide.div_(whole) if self.divided else wide.mul_(whole)
        times_groups(numbers, wide, _NV_GROUP)
        return numbers.to(dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return False


FP4 = (Mxfp4Planes(), Nvfp4("nvfp4_divided", True), Nvfp4("nvfp4_multiplied", False))
