"""Experts whose gate's and up's rows take turns in memory, as gpt-oss' files in MXFP4 have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from moebius.ops import ExpertWeights, Matrix
from moebius.ops.config import Activation, ClampedSwiGLU
from moebius.ops.cpu import CpuOps
from moebius.ops.formats import format_named
from ops.formats.blocks import random_matrix
from ops.levels import LEVELS, bits, level
from ops.quantised_products import DTYPES

E, K, F, D = 4, 2, 37, 256
ROWS = 70

pytestmark = pytest.mark.usefixtures("seeded")


def in_planes(rows: int) -> Matrix:
    codes = torch.randint(0, 256, (rows, D // 2), dtype=torch.uint8)
    scales = torch.randint(115, 125, (rows, D // 32), dtype=torch.uint8)
    return Matrix(format_named("mxfp4_planes"), (rows, D), (codes, scales))


def in_blocks(rows: int) -> Matrix:
    return random_matrix("q4_k", rows, D)


def copied(matrix: Matrix) -> Matrix:
    return matrix.moved(Tensor.contiguous)


def experts(
    both: Sequence[Matrix], dtype: torch.dtype, seed: int, of: Callable[[Matrix], Matrix]
) -> ExpertWeights:
    """Those whose rows are `both`'s, as `of` leaves them; the rest by the seed."""
    torch.manual_seed(seed)
    gate = [of(each.rows(0, 2 * F, 2)) for each in both]
    up = [of(each.rows(1, 2 * F, 2)) for each in both]
    down = [(torch.randn(D, F) / F**0.5).to(dtype) for _ in both]
    biases = [[torch.randn(n).to(dtype) for _ in both] for n in (F, F, D)]
    return ExpertWeights(gate, up, down, *biases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("matrix", [in_planes, in_blocks])
@pytest.mark.parametrize("activation", ["silu", ClampedSwiGLU(1.702, 7.0)], ids=["silu", "clamped"])
@pytest.mark.parametrize("isa", LEVELS)
def test_they_have_the_bits_of_copies(
    isa: str, activation: Activation, matrix: Callable[[int], Matrix], dtype: torch.dtype
) -> None:
    """One row, and so few and so many that products go by other ways."""
    both = [matrix(2 * F) for _ in range(E)]
    x = torch.randn(ROWS, D).to(dtype)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(ROWS)])
    for float_activations in (False, True):
        kind = "float" if float_activations else "int8"
        ops = CpuOps(2, isa, activations=kind)
        apart, together = (
            ops.prepare_experts(experts(both, dtype, 5, of), activation, dtype)
            for of in (copied, lambda each: each)
        )
        for rows in (1, 3, 9, ROWS):
            wanted = ops.expert_rows(x[:rows], ids[:rows], apart)
            assert torch.equal(bits(ops.expert_rows(x[:rows], ids[:rows], together)), bits(wanted))


def test_holes_stay_holes() -> None:
    ops = level(LEVELS[-1], 1)
    weights = experts([in_planes(2 * F) for _ in range(E)], torch.float32, 5, lambda each: each)
    held = ExpertWeights(*([None, *kind[1:]] for kind in weights))
    x = torch.randn(3, D)
    ids = torch.tensor([[1], [3], [2]])
    wanted = ops.expert_rows(x, ids, ops.prepare_experts(weights, "silu", torch.float32))
    prepared = ops.prepare_experts(held, "silu", torch.float32)
    assert torch.equal(ops.expert_rows(x, ids, prepared), wanted)
    with pytest.raises(IndexError, match="expert 0 is not held here"):
        ops.expert_rows(x, ids * 0, prepared)


def test_all_of_a_layer_or_none() -> None:
    both = [in_planes(2 * F) for _ in range(2)]
    one = experts(both, torch.float32, 5, lambda each: each)
    other = experts(both, torch.float32, 5, copied)
    mixed = ExpertWeights(
        *([kind[0], separate[1]] for kind, separate in zip(one, other, strict=True))
    )
    with pytest.raises(ValueError, match="in some experts of a layer, not in all"):
        level(LEVELS[-1], 1).prepare_experts(mixed, "silu", torch.float32)
