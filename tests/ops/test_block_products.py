"""Products with weights in blocks: the same bits on every instruction set, in any batch, which are
those of the arithmetic written down in int8_products.py."""

from __future__ import annotations

import pytest
import torch

from moebius.ops import ExpertWeights, Matrix
from moebius.ops.cpu import CpuOps
from moebius.ops.formats import BLOCK_FORMATS
from ops.formats.blocks import BLOCKS, HALVES_AT, random_blocks, random_matrix, with_halves
from ops.int8_products import product
from ops.levels import LEVELS, level
from ops.quantised_products import (
    DTYPES,
    activations,
    assert_bits,
    assert_on_every_level,
    logits,
)

pytestmark = pytest.mark.usefixtures("seeded")


# (rows, outputs, blocks): one block and more than sixteen lanes, more than a kernel finds at once,
# outputs and rows that no tile divides; rows that share the lanes, and do not fill their share.
SHAPES = [(1, 1, 1), (2, 7, 16), (3, 50, 2), (5, 17, 33), (14, 16, 1), (1, 2, 301)]
SHAPES += [(1, 35, 3), (1, 70, 4), (2, 9, 5), (1, 13, 8), (3, 19, 7), (1, 5, 9)]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_level_has_the_arithmetics_bits(name: str) -> None:
    size = BLOCKS[name].elements
    for dtype in DTYPES:
        for rows, outputs, blocks in SHAPES:
            x = activations(rows, blocks * size, dtype)
            matrix = random_matrix(name, outputs, blocks * size)
            assert_on_every_level(x, matrix)


@pytest.mark.parametrize("name", BLOCKS)
def test_extreme_codes_scales_and_activations(name: str) -> None:
    """Codes and scales of -128, on which instructions for signed bytes break, and sums as large as
    there can be: every byte of a block the same, under scales of every kind."""
    format = BLOCKS[name]
    size = format.elements
    count = 3 * 16
    blocks = torch.arange(0, 256, 17, dtype=torch.uint8).repeat(3)[:count]
    blocks = blocks.view(-1, 1).expand(-1, format.nbytes).clone()
    blocks[32:] = torch.tensor([0x80, 0x7F, 0x88, 0x08], dtype=torch.uint8).repeat(4).view(-1, 1)
    scales = torch.tensor([1.0, -1.0, 2.0**-24, 65504.0]).repeat(count // 4)
    with_halves(name, blocks, (scales, scales.flip(0)))
    if not HALVES_AT[name]:
        blocks[:, 0] = torch.arange(count, dtype=torch.uint8) * 5 + 3
    matrix = Matrix(format, (count // 2, 2 * size), (blocks.view(count // 2, -1),))
    x = torch.ones(4, 2 * size)
    x[1] = -1
    x[2, ::2] = -1
    x[3] = torch.randn(2 * size)
    wanted = product(x, matrix).out
    for isa in LEVELS:
        assert_bits(logits(level(isa, 1), x, matrix), wanted, isa)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_rows_bits_are_its_own(name: str) -> None:
    """Whatever the number of rows and threads, and however the outputs are shared out."""
    size = BLOCKS[name].elements * 3
    matrix = random_matrix(name, 611, size)
    x = activations(70, size, torch.bfloat16)
    alone = torch.cat([logits(level(LEVELS[0], 1), x[i : i + 1], matrix) for i in (0, 1, 33, 69)])
    for isa in LEVELS:
        for threads in (1, 2):
            ops = level(isa, threads)
            assert_bits(logits(ops, x, matrix)[[0, 1, 33, 69]], alone, isa)
            for rows in (2, 3, 4, 7, 16):
                assert_bits(logits(ops, x[:rows], matrix)[:2], alone[:2], f"{isa} {rows}")


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q4_k", "q6_k"])
def test_what_is_no_number_makes_nan_of_its_row_alone(name: str, bad: float) -> None:
    size = BLOCKS[name].elements * 4
    matrix = random_matrix(name, 9, size)
    x = torch.randn(6, size)
    wanted = product(x, matrix).out
    broken = x.clone()
    broken[4, 5] = bad
    for isa in LEVELS:
        found = logits(level(isa, 2), broken, matrix)
        assert found[4].isnan().all()
        good = [0, 1, 2, 3, 5]
        assert_bits(found[good], wanted[good], isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_of_several_formats_side_by_side(dtype: torch.dtype) -> None:
    """Blocks of both sizes and plain numbers, with biases, rounded once as dense products are."""
    x, plain = activations(5, 512, dtype), torch.randn(6, 512).to(dtype)
    matrices = [random_matrix(name, 33, 512) for name in ("q4_k", "q8_0", "q6_k", "q5_0")]
    bias = torch.randn(33).to(dtype)
    for isa in LEVELS:
        ops = level(isa, 2)
        layers = ops.prepare_linear(
            *((matrix, bias) for matrix in matrices), (plain, None), dtype=dtype
        )
        parts = [product(x, matrix).out + bias.float() for matrix in matrices]
        parts.append(ops.logits(x, ops.prepare_linear((plain, None))))
        assert_bits(ops.linear(x, layers), torch.cat(parts, dim=1).to(dtype), isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "names", [("q4_k", "q4_k", "q6_k"), ("mxfp4", "mxfp4", "mxfp4"), ("q2_k", "q3_k", "iq4_nl")]
)
def test_experts_are_their_products(names: tuple[str, str, str], dtype: torch.dtype) -> None:
    """Against each expert's three linear layers, whose bits other tests hold: one row and many, and
    some of it on plain numbers."""
    gate, up, down = ([random_matrix(name, 256, 256, 0.01) for _ in range(5)] for name in names)
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(70)])
    x, share = torch.randn(70, 256).to(dtype), torch.rand(70, 2)
    for isa in LEVELS:
        ops = level(isa, 2)
        experts = ops.prepare_experts(ExpertWeights(gate, up, down), "relu", dtype)
        wanted = []
        for e in range(5):
            inner = logits(ops, x, gate[e]).relu() * logits(ops, x, up[e])
            layer = ops.prepare_linear((down[e], None), dtype=dtype)
            wanted.append(ops.linear(inner.to(dtype), layer))
        rows_TKD = torch.stack(wanted, dim=1)[torch.arange(70).view(-1, 1), ids]
        exact = ops.combine(rows_TKD.contiguous(), share)
        for rows in (1, 70):
            found = ops.experts(x[:rows], share[:rows], ids[:rows], experts)
            assert_bits(found, exact[:rows], isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_embedded_rows_are_widened_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    table = random_matrix(name, 40, 512)
    ids = torch.randint(0, 40, (70,))
    wide = table.widened(torch.float32)[ids]
    for isa in LEVELS:
        for multiplier in (1.0, 12.375):
            found = level(isa, 1).embed(ids, table, multiplier, dtype)
            assert_bits(found, (wide * multiplier).to(dtype), isa)


def test_any_bytes_are_embedded_with_gguf_pys_bits() -> None:
    """Scales that are no numbers and codes of every kind; subnormal results are flushed."""
    for name, format in BLOCKS.items():
        blocks = random_blocks(name, 512)
        if name == "mxfp4":
            blocks[:, 0].clamp_(min=2)  # under which the scale itself is subnormal
        table = Matrix(format, (512, format.elements), (blocks,))
        wide = table.widened(torch.float32)
        wide = torch.where(wide.abs() < 2.0**-126, torch.zeros(()).copysign(wide), wide)
        ids = torch.arange(512)
        assert_bits(level(LEVELS[-1], 1).embed(ids, table, 1.0, torch.float32), wide, name)


@pytest.mark.parametrize("isa", LEVELS)
def test_blocks_are_read_in_place(isa: str) -> None:
    """By whatever computes in either dtype, wherever they lie."""
    ops = level(isa, 1)
    names = {format.name for format in BLOCK_FORMATS}
    for dtype in DTYPES:
        assert names <= ops.formats(dtype)
    matrix = random_matrix("q8_0", 5, 64)
    x = torch.randn(1, 64)
    wanted = logits(ops, x, matrix)
    nbytes = matrix.planes[0].nbytes
    for shift in (1, 2, 7):
        memory = torch.zeros(nbytes + shift, dtype=torch.uint8)
        memory[shift:] = matrix.planes[0].view(-1)
        moved = Matrix(matrix.format, matrix.shape, (memory[shift:].view(5, -1),))
        assert_bits(logits(ops, x, moved), wanted)


@pytest.mark.parametrize("isa", LEVELS)
def test_activations_that_stay_as_they_are_meet_widened_weights(isa: str) -> None:
    """The bits of float32 products with the weights' float32 numbers, one row and many; experts
    too, which round between their layers as always."""
    exact, plain = CpuOps(2, isa, "float"), level(isa, 2)
    assert exact.name == f"{plain.name}-float"
    for name in BLOCKS:
        matrix = random_matrix(name, 35, 512)
        wide = matrix.widened(torch.float32)
        for dtype, rows in ((torch.float32, 1), (torch.bfloat16, 3), (torch.bfloat16, 70)):
            x = activations(rows, 512, dtype)
            layers = plain.prepare_linear((wide, None))
            wanted = plain.logits(x.float(), layers)
            assert_bits(logits(exact, x, matrix), wanted, name)
            here = exact.prepare_linear((matrix, None), dtype=dtype)
            assert_bits(exact.linear(x, here), wanted.to(dtype), name)
    kinds = [[random_matrix(name, 256, 256, 0.01) for _ in range(3)] for name in ("q4_k", "q8_0")]
    experts = ExpertWeights(kinds[0], kinds[1], kinds[0])
    copied = ExpertWeights(*([w.widened(torch.float32) for w in kind] for kind in experts[:3]))
    x, share = torch.randn(20, 256), torch.rand(20, 2)
    ids = torch.stack([torch.randperm(3)[:2] for _ in range(20)])
    found = exact.experts(x, share, ids, exact.prepare_experts(experts, "silu", torch.float32))
    assert_bits(found, plain.experts(x, share, ids, plain.prepare_experts(copied, "silu")))


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    ops = level(LEVELS[-1], 1)
    with pytest.raises(ValueError, match="512 columns where the input has 256"):
        ops.prepare_linear(
            (random_matrix("q8_0", 3, 256), None),
            (random_matrix("q4_k", 3, 512), None),
            dtype=torch.float32,
        )
    with pytest.raises(ValueError, match="compute in bfloat16 and float32"):
        ops.prepare_linear((random_matrix("q8_0", 3, 256), None))
