"""Many rows meet weights in blocks by panels, a few rows as they lie: neither may change a bit, nor
how rows and outputs are shared out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from covering import each_value
from moebius.ops import ExpertWeights, Matrix
from moebius.ops.cpu import CpuOps
from ops.formats.blocks import BLOCKS, random_matrix, with_halves
from ops.int8_products import product
from ops.levels import LEVELS, level
from ops.quantised_products import DTYPES, activations, assert_bits, logits

pytestmark = pytest.mark.usefixtures("seeded")

# Around the sizes of tiles and of blocks of rows.
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 24, 31, 33, 63, 64, 65, 72, 129, 200]


@pytest.mark.parametrize(("name", "blocks"), each_value(BLOCKS, [1, 7, 18]))
def test_any_number_of_rows(name: str, blocks: int) -> None:
    """Blocks for some of the lanes, and two for some; outputs that no panel divides."""
    size = BLOCKS[name].elements * blocks
    outputs = 37 if blocks < 18 else 9
    x = activations(ROWS[-1], size, torch.float32)
    matrix = random_matrix(name, outputs, size)
    wanted = product(x, matrix).out
    for isa in LEVELS:
        layer = level(isa, 1).prepare_linear((matrix, None), dtype=x.dtype)
        some = ROWS if isa not in ("portable", "amx_emulated") else ROWS[7::4]
        for rows in some:
            found = level(isa, 1).logits(x[:rows], layer)
            assert_bits(found, wanted[:rows], f"{isa}, {rows} rows")


@pytest.mark.parametrize("name", BLOCKS)
def test_extreme_codes_meet_many_rows(name: str) -> None:
    """Every byte of a block the same, 0x80 among them, and activations whose codes are all 127 or
    -127: sums as large as there can be, where instructions for bytes and 16 bits saturate."""
    format = BLOCKS[name]
    size = 2 * format.elements
    codes = torch.arange(256, dtype=torch.uint8).repeat(2).view(-1, 1)
    bytes_NY = codes.expand(-1, format.nbytes).clone()
    with_halves(name, bytes_NY, torch.randn(2, 512))
    if name == "mxfp4":
        bytes_NY[:, 0] = 127
    matrix = Matrix(format, (256, size), (bytes_NY.view(256, -1),))
    x = torch.ones(24, size)
    x[1::4] = -1
    x[2::4, ::2] = -1
    x[3::4] = torch.randn(6, size)
    wanted = product(x, matrix).out
    for isa in LEVELS:
        assert_bits(logits(level(isa, 1), x, matrix), wanted, isa)


@pytest.mark.parametrize(("threads", "dtype"), each_value([1, 2, 3], DTYPES), ids=str)
def test_batches_chunks_and_threads(threads: int, dtype: torch.dtype) -> None:
    """More rows than a batch has, more outputs than an item, formats side by side with plain
    numbers: each row as when it is alone."""
    x = activations(1100, 512, dtype)
    matrices = [random_matrix(name, 531, 512) for name in ("q4_k", "q8_0", "q4_k", "q6_k")]
    bias, plain = torch.randn(531).to(dtype), torch.randn(6, 512).to(dtype)
    some = [0, 15, 511, 512, 513, 1023, 1099]
    for isa in LEVELS[-2:]:
        ops = level(isa, threads)
        layers = ops.prepare_linear(
            *((matrix, bias) for matrix in matrices), (plain, None), dtype=dtype
        )
        found = ops.linear(x, layers)
        for row in some:
            assert_bits(found[row : row + 1], ops.linear(x[row : row + 1], layers), f"{isa} {row}")


def expert_outputs(ops: CpuOps, x: Tensor, kinds: list[list[Matrix]]) -> Tensor:
    """Each row's output of each expert, one row at a time: (rows, experts, hidden)."""
    outputs = []
    for gate, up, down in zip(*kinds, strict=True):
        layer = ops.prepare_linear((down, None), dtype=x.dtype)
        rows = []
        for row in x.split(1):
            inner = logits(ops, row, gate).relu() * logits(ops, row, up)
            rows.append(ops.linear(inner.to(x.dtype), layer))
        outputs.append(torch.cat(rows))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_with_few_and_many_rows(dtype: torch.dtype) -> None:
    """One expert has nearly all rows, others one to thirty or none; formats differ from expert to
    expert, and one expert's gate is plain numbers."""
    names = ["q4_k", "q6_k", "q4_k", "q8_0", "iq4_xs", "q2_k"]
    kinds = [[random_matrix(name, 256, 256, 0.01) for name in names] for _ in range(3)]
    kinds[0][2] = Matrix.of(torch.randn(256, 256).to(dtype) * 0.1)
    counts = [600, 30, 9, 1, 0, 12]
    ids = torch.cat([torch.full((count,), e) for e, count in enumerate(counts)])
    ids = ids[torch.randperm(len(ids))].view(-1, 1)
    x = torch.randn(len(ids), 256).to(dtype)
    share = torch.ones(len(ids), 1)
    picked = torch.randperm(len(ids))[:60]
    for isa in LEVELS[-2:]:
        ops = level(isa, 2)
        experts = ops.prepare_experts(ExpertWeights(*kinds), "relu", dtype)
        found = ops.experts(x, share, ids, experts)
        alone = expert_outputs(level(isa, 1), x[picked], kinds)
        wanted = alone[torch.arange(len(picked)), ids[picked, 0]]
        assert_bits(found[picked], wanted, isa)
