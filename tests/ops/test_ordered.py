"""Products of plain numbers in one order: the bits of one instruction set are those of all."""

from __future__ import annotations

import pytest
import torch

from moebius import _cpu
from moebius.ops.cpu import CpuOps

LEVELS = [level for level in _cpu.available() if level != "amx"]
# What is computed in, and what weights are stored in.
PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.float32),
]


def products(level: str, x: torch.Tensor, weight: torch.Tensor, *, ordered: bool) -> torch.Tensor:
    ops = CpuOps(1, level, ordered=ordered)
    return ops.logits(x, ops.prepare_linear((weight, None), dtype=x.dtype))


@pytest.mark.parametrize(("computed", "stored"), PAIRS, ids=str)
@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 1, 5), (3, 9, 16), (7, 34, 1000)])
def test_every_level_has_the_same_bits(
    computed: torch.dtype, stored: torch.dtype, rows: int, columns: int, inner: int
) -> None:
    torch.manual_seed(inner)
    x = torch.randn(rows, inner).to(computed)
    weight = torch.randn(columns, inner).to(stored)
    first = products(LEVELS[0], x, weight, ordered=True)
    torch.testing.assert_close(
        first.double(), x.double() @ weight.double().T, rtol=0, atol=1e-5 * inner
    )
    for level in LEVELS[1:]:
        assert torch.equal(products(level, x, weight, ordered=True), first), level
    alone = torch.cat([products(LEVELS[-1], row[None], weight, ordered=True) for row in x])
    assert torch.equal(alone, first)


@pytest.mark.skipif(
    not {"avx2", "avx512"} <= set(LEVELS), reason="both instruction sets are needed"
)
def test_the_fastest_order_is_another_on_each_level() -> None:
    """So that the test above can fail."""
    torch.manual_seed(0)
    x = torch.randn(5, 1000)
    weight = torch.randn(40, 1000)
    found = [products(level, x, weight, ordered=False) for level in ("avx2", "avx512")]
    assert not torch.equal(*found)
