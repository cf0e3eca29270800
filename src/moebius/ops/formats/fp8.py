"""Matrices of 8-bit floating-point codes (E4M3, arXiv 2209.05433), and scales of blocks of them.

Checkpoints have blocks of 128 x 128 (DeepSeek-V3, arXiv 2412.19437), a scale a row, or one in all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.ops.formats.dense import dtype_name
from moebius.ops.formats.format import Format, Planes, PlaneShape
from moebius.ops.formats.groups import row_ids, times_groups

_CODE = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, eq=False)
class Fp8(Format):
    """Codes (rows, columns), and scales of blocks of them, of which the last may be smaller.

    block_rows, block_columns   a block's sizes; 0 is all that the matrix has
    scale                       the scales' dtype; float8_e8m0fnu holds powers of two
    """

    name: str
    block_rows: int
    block_columns: int
    scale: torch.dtype

    @classmethod
    def of(cls, block_rows: int, block_columns: int, scale: torch.dtype) -> "Fp8":
        name = f"fp8[{block_rows}x{block_columns},{dtype_name(scale)}]"
        return cls(name, block_rows, block_columns, scale)

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        scales = (_blocks(rows, self.block_rows), _blocks(columns, self.block_columns))
        return (_CODE, (rows, columns)), (self.scale, scales)

    def select(self, planes: Planes, rows: slice | Tensor) -> tuple[Format, Planes]:
        codes, scales = planes
        if self.block_rows == 0:
            return self, (codes[rows], scales)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(codes))
            if step == 1 and start % self.block_rows == 0:
                last = start // self.block_rows + _blocks(max(stop - start, 0), self.block_rows)
                return self, (codes[rows], scales[start // self.block_rows : last])
        ids = row_ids(rows, codes)
        parted = Fp8.of(1, self.block_columns, self.scale)
        # torch indexes no 8-bit floating point on every device.
        of_rows = scales.view(torch.uint8) if self.scale.itemsize == 1 else scales
        return parted, (codes[rows], of_rows[ids // self.block_rows].view(self.scale))

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        codes, scales = planes
        numbers = codes.float()
        ids = torch.arange(len(codes), device=codes.device)
        of_rows = scales.float()[ids // (self.block_rows or max(len(codes), 1))]
        times_groups(numbers, of_rows, self.block_columns)
        return numbers.to(dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return False


def _blocks(count: int, size: int) -> int:
    """How many blocks so many rows or columns are."""
    return -(-count // size) if size else 1
