"""Matrices whose numbers are plain floating point."""

from functools import cache

import torch
from torch import Tensor

from moebius.ops.formats.format import Format, Planes, PlaneShape


class Dense(Format):
    """One plane: the numbers themselves, row-major."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = dtype_name(dtype)

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        return ((self.dtype, (rows, columns)),)

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        return planes[0].to(dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return torch.promote_types(self.dtype, dtype) == dtype


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float16 -> 'float16'."""
    return str(dtype).removeprefix("torch.")


@cache
def dense(dtype: torch.dtype) -> Dense:
    """The format of matrices whose numbers are plain `dtype`."""
    return Dense(dtype)
