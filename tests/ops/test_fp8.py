"""FP8 on the compiled kernels: codes are multiplied as the numbers that they are, block by block of
columns, and sums of blocks are scaled; in any batch the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moebius.ops import ExpertWeights, Matrix
from moebius.ops.cpu import CpuOps
from moebius.ops.formats import Fp8, format_named
from ops.formats.blocks import random_matrix
from ops.levels import LEVELS, bits, level

F32, BF16 = torch.float32, torch.bfloat16
# A block of rows and columns (0: all), and the scales' dtype.
KINDS = [
    (48, 40, F32),
    (16, 64, torch.float8_e8m0fnu),
    (1, 0, BF16),
    (0, 0, F32),
    (1, 32, torch.float16),
]

pytestmark = pytest.mark.usefixtures("seeded")


def fp8(rows: int, columns: int, kind: tuple[int, int, torch.dtype] = KINDS[0]) -> Matrix:
    format = Fp8.of(*kind)
    (_, codes), (dtype, shape) = format.planes(rows, columns)
    every = torch.randint(0, 256, codes, dtype=torch.uint8)
    every[(every & 127) == 127] = 0  # NaN
    scales = torch.rand(shape) / 16
    if dtype == torch.float8_e8m0fnu:
        scales = torch.exp2(torch.randint(-12, 0, shape).float())
    return Matrix(format, (rows, columns), (every.view(torch.float8_e4m3fn), scales.to(dtype)))


def test_every_code_is_what_torch_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    planes = (codes.view(torch.float8_e4m3fn), torch.full((1, 1), 0.75))
    table = Matrix(format_named("fp8[0x0,float32]"), (16, 16), planes)
    wanted = planes[0].float() * 0.75
    numbers = ~wanted.isnan()
    for isa in LEVELS:
        found = level(isa, 1).embed(torch.arange(16), table, 1.0, F32)
        assert torch.equal(bits(found)[numbers], bits(wanted)[numbers])
        assert found[~numbers].isnan().all()


def of_blocks(ops: CpuOps, x_TI: Tensor, matrix: Matrix) -> Tensor:
    """What products with these weights are, (T, O) float32, by products of plain numbers."""
    assert isinstance(matrix.format, Fp8)
    codes_OI, scales = matrix.planes
    outputs, size = matrix.shape
    width = matrix.format.block_columns or size
    if width % 32 and width < size:  # no whole steps of the kernels: weights are scaled before
        return ops.logits(x_TI.float(), ops.prepare_linear((matrix.widened(F32), None)))
    # Processors that multiply bfloat16 by itself do so; else both are widened.
    narrow = x_TI.dtype == BF16 and ops.name.partition("-")[2] in (
        "avx512bf16",
        "amx_emulated",
        "amx",
    )
    dtype = BF16 if narrow else F32
    of_rows = torch.arange(outputs) // (matrix.format.block_rows or outputs)
    total = torch.zeros(len(x_TI), outputs)
    for block, first in enumerate(range(0, size, width)):
        columns = slice(first, first + width)
        plain = codes_OI.float()[:, columns].to(dtype).contiguous()
        x = x_TI[:, columns].to(dtype).contiguous()
        sums = ops.logits(x, ops.prepare_linear((plain, None)))
        scaled = sums * scales.float()[of_rows, block]
        total = scaled if block == 0 else total + scaled
    return total


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}x{kind[1]}")
@pytest.mark.parametrize("isa", LEVELS)
def test_products_are_sums_of_blocks(isa: str, kind: tuple[int, int, torch.dtype]) -> None:
    ops = level(isa, 2)
    assert "fp8" in ops.formats(F32) & ops.formats(BF16)
    for outputs, size in ((131, 100), (300, 520), (5, 31), (64, 64)):
        matrix = fp8(outputs, size, kind)
        for dtype in (F32, BF16):
            here = ops.prepare_linear((matrix, None), dtype=dtype)
            for rows in (1, 2, 3, 4, 5, 70):
                x = torch.randn(rows, size).to(dtype)
                wanted = of_blocks(ops, x, matrix)
                exact = x.double() @ matrix.widened(F32).double().T
                error = (wanted - exact).abs().amax() / exact.abs().amax()
                assert error < 2.0**-18
                assert torch.equal(bits(ops.logits(x, here)), bits(wanted))
                assert torch.equal(bits(ops.linear(x, here)), bits(wanted.to(dtype)))


@pytest.mark.parametrize("rows", [1, 4, 256])
@pytest.mark.parametrize("isa", LEVELS)
def test_products_with_ones_are_the_codes(isa: str, rows: int) -> None:
    """Subnormal codes, both zeros and both NaN among them, in every place of a step."""
    ops = level(isa, 1)
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    for row in range(256):
        codes[row] = codes[row].roll(row)
    # A row of weights with a NaN gives nothing else.
    codes[16:][(codes[16:] & 127) == 127] = 0
    matrix = Matrix(
        format_named("fp8[0x0,float32]"),
        (256, 256),
        (codes.view(torch.float8_e4m3fn), torch.full((1, 1), 0.75)),
    )
    wanted = matrix.widened(F32).T.contiguous()
    wanted[:, :16] = torch.nan
    for dtype in (F32, BF16):
        here = ops.prepare_linear((matrix, None), dtype=dtype)
        ones = torch.eye(256, dtype=dtype)
        found = torch.cat([ops.logits(ones[i : i + rows], here) for i in range(0, 256, rows)])
        assert torch.equal(found.nan_to_num(999.0), wanted.nan_to_num(999.0))


@pytest.mark.parametrize("isa", LEVELS)
def test_layers_of_many_formats_side_by_side(isa: str) -> None:
    """Each is what it is alone: what is made of x for one is not taken for another's."""
    ops = level(isa, 2)
    size = 256
    bias = torch.randn(40, dtype=BF16)
    layers: list[tuple[Matrix | Tensor, Tensor | None]] = [
        (random_matrix("q4_0", 24, size), None),
        (fp8(40, size), bias),
        (torch.randn(16, size, dtype=BF16), None),
        (random_matrix("q4_k", 24, size), None),
        (fp8(24, size, KINDS[2]), None),
    ]
    for rows in (1, 3, 70):
        x = torch.randn(rows, size, dtype=BF16)
        together = ops.linear(x, ops.prepare_linear(*layers, dtype=BF16))
        alone = [ops.linear(x, ops.prepare_linear(each, dtype=BF16)) for each in layers]
        assert torch.equal(bits(together), bits(torch.cat(alone, dim=1)))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("isa", LEVELS)
def test_experts_of_fp8(isa: str, dtype: torch.dtype) -> None:
    """Beside float64, with other formats among the matrices; and a row alone as in a batch."""
    ops = level(isa, 2)
    count, top_k, width, hidden = 6, 2, 64, 96
    gate = [fp8(width, hidden) for _ in range(count)]
    up = [fp8(width, hidden, KINDS[2]) for _ in range(count)]
    down = [fp8(hidden, width, KINDS[3]) for _ in range(count)]
    weights = ExpertWeights(gate, up, down)
    prepared = ops.prepare_experts(weights, "silu", dtype)
    widened = ExpertWeights(*([w.widened(F32) for w in each] for each in (gate, up, down)))
    copied = ops.prepare_experts(widened, "silu", F32)
    x = torch.randn(70, hidden).to(dtype)
    share = torch.rand(70, top_k)
    ids = torch.stack([torch.randperm(count)[:top_k] for _ in range(70)])
    found = ops.experts(x, share, ids, prepared)
    wanted = ops.experts(x.float(), share, ids, copied)
    error = (found.float() - wanted).abs().max() / wanted.abs().max()
    assert error < (2.0**-18 if dtype == F32 else 2.0**-6)
    for row in (0, 33, 69):
        part = slice(row, row + 1)
        alone = ops.experts(x[part], share[part], ids[part], prepared)
        assert torch.equal(bits(alone), bits(found[part]))


def test_scales_outlive_what_they_were_made_of() -> None:
    """Kernels keep a copy in float32."""
    ops = level(LEVELS[-1], 1)
    matrix = fp8(32, 80)
    layer = ops.prepare_linear((matrix, None), dtype=F32)
    x = torch.randn(2, 80)
    before = ops.linear(x, layer)
    junk = [torch.full((32, 80), float("nan")) for _ in range(50)]
    assert torch.equal(ops.linear(x, layer), before) and len(junk) == 50
    assert layer.is_of((matrix, None)) and not layer.is_of((fp8(32, 80), None))
