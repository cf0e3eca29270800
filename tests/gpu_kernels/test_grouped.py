"""Grouped products for training, beside a loop over experts: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from moebius.ops.triton.grouped import TILES, Groups, Matrices, grouped_product
from moebius.ops.triton.kernels import grouped as kernels
from moebius.ops.triton.tiles import Tile

SIZES = {
    # rows of each expert, and last those of none
    "several tiles": ([70, 1, 33, 0], 37, 70),
    "none has any": ([0, 0, 0, 5], 16, 24),
    "no rows": ([0, 0, 0, 0], 16, 24),
    "one has all": ([0, 130, 0, 0], 65, 17),
    "some are dropped": ([3, 0, 2, 9], 8, 8),
    "a vector each": ([5, 4, 3, 2], 40, 1),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter a tile costs what its numbers cost, however few are there."""
    torch.manual_seed(0)
    if DEVICE == "cpu":
        monkeypatch.setitem(TILES, 2, Tile(32, 32, 16))
        monkeypatch.setitem(TILES, 4, Tile(32, 16, 16))


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def rows_of(counts: list[int]) -> Tensor:
    """The sorted experts of so many rows each."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(DEVICE)


def naive(
    x_PI: Tensor, ids_P: Tensor, weights: list[Tensor | None], grad_PO: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Product and gradients in float64, row by row."""
    outer = grad_PO.shape[1]
    out = torch.zeros(len(x_PI), outer, dtype=torch.float64)
    grad_x = torch.zeros(x_PI.shape, dtype=torch.float64)
    grads = [torch.zeros(outer, x_PI.shape[1], dtype=torch.float64) for _ in weights]
    x = x_PI.detach().cpu().double()
    g = grad_PO.cpu().double()
    for p, e in enumerate(ids_P.tolist()):
        weight = weights[e] if e < len(weights) else None
        if weight is not None:
            wide = weight.detach().cpu().double()
            out[p] = wide @ x[p]
            grad_x[p] = wide.T @ g[p]
            grads[e] += torch.outer(g[p], x[p])
    return out, grad_x, grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("counts", "outer", "inner"), SIZES.values(), ids=SIZES)
def test_values_and_gradients_are_those_of_a_loop(
    counts: list[int], outer: int, inner: int, dtype: torch.dtype
) -> None:
    ids_P = rows_of(counts)
    x_PI = drawn(dtype, len(ids_P), inner).requires_grad_()
    weights: list[Tensor | None] = [drawn(dtype, outer, inner).requires_grad_() for _ in range(3)]
    grad_PO = drawn(dtype, len(ids_P), outer)
    out = grouped_product(x_PI, Groups.of(ids_P, 3), Matrices.of(weights))
    out.backward(grad_PO)
    wanted, grad_x, grads = naive(x_PI, ids_P, weights, grad_PO)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}[dtype]
    longest = max(inner, outer, *counts, 1)

    def near(found: Tensor | None, exact: Tensor) -> None:
        assert found is not None and found.dtype == dtype
        atol = tolerance * longest**0.5
        torch.testing.assert_close(found.cpu().double(), exact, rtol=tolerance, atol=atol)

    near(out, wanted)
    near(x_PI.grad, grad_x)
    for weight, grad in zip(weights, grads, strict=True):
        assert weight is not None
        near(weight.grad, grad)


def test_rows_of_experts_elsewhere_are_zeros_and_get_no_gradient() -> None:
    ids_P = rows_of([3, 4, 5, 2])
    x_PI = drawn(torch.float32, len(ids_P), 8).requires_grad_()
    weights = [drawn(torch.float32, 6, 8).requires_grad_(), None, drawn(torch.float32, 6, 8)]
    out = grouped_product(x_PI, Groups.of(ids_P, 3), Matrices.of(weights))
    out.backward(torch.ones_like(out))
    missing = ((ids_P == 1) | (ids_P == 3)).cpu()
    assert not out.detach().cpu()[missing].any() and out.detach().cpu()[~missing].all()
    assert x_PI.grad is not None and not x_PI.grad.cpu()[missing].any()
    assert weights[0] is not None and weights[0].grad is not None
    assert weights[2] is not None and weights[2].grad is None


def test_a_row_is_the_same_bits_in_any_company() -> None:
    """The order of its sum is the inner dimension's; that of a gradient's is the group's rows'."""
    few = rows_of([5, 7, 0])
    weights = [drawn(torch.bfloat16, 40, 70) for _ in range(2)]
    x_PI = drawn(torch.bfloat16, 12, 70)
    alone = grouped_product(x_PI, Groups.of(few, 2), Matrices.of(weights))
    more = torch.cat((x_PI[:5], drawn(torch.bfloat16, 64, 70), x_PI[5:]))
    ids_P = rows_of([69, 7, 0])
    beside = grouped_product(more, Groups.of(ids_P, 2), Matrices.of(weights))
    if DEVICE == "cuda":  # NumPy's products differ by their place
        assert torch.equal(beside[:5], alone[:5]) and torch.equal(beside[69:], alone[5:])
    torch.testing.assert_close(beside[69:], alone[5:], rtol=2.0**-7, atol=2.0**-5)


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_compile(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILES, 2, Tile(128, 128, 64, 8, 3))
    monkeypatch.setitem(TILES, 4, Tile(64, 64, 32, 4, 3))
    ids_P = rows_of([500, 300, 100, 100])
    with launches() as seen:
        for outer, inner in ((768, 2048), (33, 70), (768, 1)):
            x_PI = torch.zeros(1000, inner, dtype=dtype, requires_grad=True)
            weights = [torch.zeros(outer, inner, dtype=dtype, requires_grad=True) for _ in range(3)]
            out = grouped_product(x_PI, Groups.of(ids_P, 3), Matrices.of(weights))
            out.backward(torch.zeros_like(out))
    assert_compile(seen, kernels)
