"""What the tests of products with quantised weights share."""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.ops import Matrix
from moebius.ops.cpu import CpuOps
from ops.int8_products import product
from ops.levels import LEVELS, bits, level

DTYPES = [torch.float32, torch.bfloat16]


def activations(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """Rows of different sizes, with outliers, blocks of zeros, and blocks too small to count."""
    x = torch.randn(rows, size) * torch.logspace(-6, 3, rows).view(-1, 1)
    x[torch.rand(rows, size) < 0.01] *= 50
    x[::3, :32] = 0
    x[1::3, -32:] *= 1e-33
    return x.to(dtype)


def logits(ops: CpuOps, x: Tensor, matrix: Matrix) -> Tensor:
    return ops.logits(x, ops.prepare_linear((matrix, None), dtype=x.dtype))


def assert_bits(found: Tensor, wanted: Tensor, what: str = "") -> None:
    """The same bits; a NaN is a NaN."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, what
    assert torch.equal(found.isnan(), wanted.isnan()), what
    numbers = ~wanted.isnan()
    assert torch.equal(bits(found)[numbers], bits(wanted)[numbers]), what


def assert_on_every_level(x: Tensor, matrix: Matrix) -> None:
    """The oracle's bits on each instruction set, and the oracle within the bound of 8 bits."""
    wanted = product(x, matrix)
    assert ((wanted.out - wanted.exact).abs() <= wanted.bound).all()
    for isa in LEVELS:
        assert_bits(logits(level(isa, 2), x, matrix), wanted.out, f"{isa} {x.shape}")
