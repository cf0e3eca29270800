"""A format that no backend has kernels for: int8 codes, and one float32 scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.ops.formats import Format, Planes, PlaneShape
from moebius.ops.weights import Matrix


class Int8(Format):
    name = "toy-int8"

    def planes(self, rows: int, columns: int) -> tuple[PlaneShape, ...]:
        return ((torch.int8, (rows, columns)), (torch.float32, (rows, 1)))

    def widened(self, planes: Planes, dtype: torch.dtype) -> Tensor:
        codes, scales = planes
        return (codes * scales).to(dtype)

    def exact_in(self, dtype: torch.dtype) -> bool:
        return False


def quantised(weight: Tensor) -> Matrix:
    scales = weight.detach().abs().amax(1, keepdim=True) / 127
    codes = (weight.detach() / scales).round().to(torch.int8)
    rows, columns = weight.shape
    return Matrix(Int8(), (rows, columns), (codes, scales))
