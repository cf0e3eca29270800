"""Products with codes whose scales lie in a plane of their own, as Hugging Face's directories have
them: the bits of the arithmetic in int8_products.py, on every instruction set and in any batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moebius.ops import ExpertWeights, Matrix
from moebius.ops.cpu import CpuOps
from moebius.ops.formats import Integers, format_named
from ops.int8_products import product
from ops.levels import LEVELS, bits, level
from ops.quantised_products import (
    DTYPES,
    activations,
    assert_bits,
    assert_on_every_level,
    logits,
)

NAMES = [
    "mxfp4_planes",
    "int4[32,bfloat16]",
    "int4[64,float16]",
    "int4[0,float32]",
    "int4[96,float16,words zeros]",
    "int4[32,bfloat16,int8 zeros]",
    "int8[0,bfloat16]",
    "int8[192,float16]",
    "int8_words[32,float32]",
    "affine4[32,bfloat16]",
    "affine4[64,float32]",
    "affine8[96,float16]",
    "int4_ordered[64,float16]",
    "int4_ordered[32,bfloat16,words zeros]",
    "int8_words_ordered[96,float32]",
]
# (rows, outputs, columns): all groups above divide them; one has more blocks than are found at once.
SHAPES = [(1, 35, 192), (2, 7, 576), (14, 16, 192), (5, 17, 1152), (1, 3, 192 * 45)]

pytestmark = pytest.mark.usefixtures("seeded")


def random_matrix(name: str, rows: int, columns: int, spread: float = 0.02) -> Matrix:
    """Any codes, zero points up to eight, scales as large as those of trained weights."""
    format = format_named(name)
    planes = []
    for number, (dtype, shape) in enumerate(format.planes(rows, columns)):
        if dtype.is_floating_point:
            planes.append((torch.randn(shape) * spread).to(dtype))
        elif name == "mxfp4_planes" and number == 1:
            planes.append(torch.randint(112, 125, shape, dtype=dtype))
        elif "_ordered" in name and shape == (columns,):
            planes.append(torch.randperm(columns).to(dtype))
        elif dtype == torch.int8 and number == 2:
            planes.append(torch.randint(-8, 9, shape, dtype=dtype))
        else:
            info = torch.iinfo(dtype)
            planes.append(torch.randint(info.min, info.max + 1, shape).to(dtype))
    return Matrix(format, (rows, columns), tuple(planes))


@pytest.mark.parametrize("name", NAMES)
def test_every_level_has_the_arithmetics_bits(name: str) -> None:
    for dtype in DTYPES:
        for rows, outputs, columns in SHAPES:
            x = activations(rows, columns, dtype)
            matrix = random_matrix(name, outputs, columns)
            assert_on_every_level(x, matrix)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_codes_and_activations(name: str) -> None:
    """Codes of -128, zero points at both ends, and sums as large as there can be."""
    matrix = random_matrix(name, 32, 192)
    codes = matrix.planes[0].view(torch.uint8)
    codes[:] = torch.tensor([0x00, 0xFF, 0x80, 0x7F, 0x88, 0x08, 0x77, 0x01]).repeat(4).view(-1, 1)
    if "int8 zeros" in name:
        matrix.planes[2][::2] = 8
        matrix.planes[2][1::2] = -8
    x = torch.ones(9, 192)
    x[1] = -1
    x[2, ::2] = -1
    x[3:] = torch.randn(6, 192)
    wanted = product(x, matrix).out
    for isa in LEVELS:
        assert_bits(logits(level(isa, 1), x, matrix), wanted, isa)
        assert_bits(logits(level(isa, 1), x[:3], matrix), wanted[:3], isa)


@pytest.mark.parametrize("name", NAMES)
def test_a_rows_bits_are_its_own(name: str) -> None:
    matrix = random_matrix(name, 611, 192)
    x = activations(70, 192, torch.bfloat16)
    alone = torch.cat([logits(level(LEVELS[0], 1), x[i : i + 1], matrix) for i in (0, 1, 33, 69)])
    for isa in LEVELS:
        ops = level(isa, 2)
        assert_bits(logits(ops, x, matrix)[[0, 1, 33, 69]], alone, isa)
        for rows in (2, 3, 4, 7, 16):
            assert_bits(logits(ops, x[:rows], matrix)[:2], alone[:2], f"{isa} {rows}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_embedded_rows_are_widened_and_rounded_once(name: str, dtype: torch.dtype) -> None:
    table = random_matrix(name, 40, 576)
    ids = torch.randint(0, 40, (70,))
    wide = table.widened(torch.float32)[ids]
    if name == "mxfp4_planes":
        wide += 0.0  # E2M1 has two zeros, kernels one
    for isa in LEVELS:
        for multiplier in (1.0, 12.375):
            found = level(isa, 1).embed(ids, table, multiplier, dtype)
            assert_bits(found, (wide * multiplier).to(dtype), isa)


def test_a_scale_of_mxfp4_that_is_none() -> None:
    """E8M0's 255, which blocks of GGUF do not know as such; its rows are NaN, and no others."""
    matrix = random_matrix("mxfp4_planes", 40, 192)
    matrix.planes[1][7, 2] = 255
    x = torch.randn(9, 192)
    for isa in LEVELS:
        ops = level(isa, 1)
        for rows in (1, 9):
            found = logits(ops, x[:rows], matrix)
            assert_bits(found, product(x[:rows], matrix).out, isa)
            assert found[:, 7].isnan().all() and found.isnan().sum() == rows
        assert ops.embed(torch.tensor([7]), matrix, 1.0, torch.float32)[0, 64:96].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beside_blocks_and_plain_numbers(dtype: torch.dtype) -> None:
    """What is made of x for one kind of codes is not taken for another's."""
    from ops.formats.blocks import random_matrix as random_blocks

    x = activations(9, 768, dtype)
    plain = torch.randn(6, 768).to(dtype)
    matrices = [random_blocks("q4_0", 33, 768), random_blocks("q4_k", 33, 768)]
    matrices[1:1] = [random_matrix(name, 33, 768) for name in NAMES if "96" not in name]
    for isa in LEVELS:
        ops = level(isa, 2)
        together = ops.prepare_linear(*((m, None) for m in matrices), (plain, None), dtype=dtype)
        for rows in (1, 9):
            part = x[:rows]
            alone = [ops.linear(part, ops.prepare_linear((m, None), dtype=dtype)) for m in matrices]
            alone.append(ops.linear(part, ops.prepare_linear((plain, None))))
            assert torch.equal(bits(ops.linear(part, together)), bits(torch.cat(alone, dim=1)))


@pytest.mark.parametrize(
    "names",
    [
        ("mxfp4_planes", "int4[32,bfloat16,words zeros]", "int8[0,float16]"),
        ("int4_ordered[32,float16]", "int4_ordered[64,float16]", "int4_ordered[32,float16]"),
        ("int4[32,float16]", "int8_words_ordered[96,float32]", "int4_ordered[0,float16]"),
    ],
    ids=["kinds", "ordered", "ordered beside others"],
)
def test_experts_are_their_products(names: tuple[str, str, str]) -> None:
    gate, up, down = ([random_matrix(name, 192, 192, 0.01) for _ in range(5)] for name in names)
    # Of one expert alone gate and up have one order.
    if "_ordered" in gate[2].format.name:
        gate[2].planes[-1].copy_(up[2].planes[-1])
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(70)])
    x, share = torch.randn(70, 192), torch.rand(70, 2)
    for isa in LEVELS:
        ops = level(isa, 2)
        experts = ops.prepare_experts(ExpertWeights(gate, up, down), "relu", torch.float32)
        wanted = []
        for e in range(5):
            inner = logits(ops, x, gate[e]).relu() * logits(ops, x, up[e])
            wanted.append(logits(ops, inner, down[e]))
        rows_TKD = torch.stack(wanted, dim=1)[torch.arange(70).view(-1, 1), ids]
        exact = ops.combine(rows_TKD.contiguous(), share)
        for rows in (1, 70):
            found = ops.experts(x[:rows], share[:rows], ids[:rows], experts)
            assert_bits(found, exact[:rows], isa)


@pytest.mark.parametrize("name", NAMES)
def test_activations_that_stay_as_they_are(name: str) -> None:
    matrix = random_matrix(name, 33, 192)
    x = torch.randn(3, 192)
    exact = x.double() @ matrix.widened(torch.float64).T
    for isa in LEVELS:
        found = logits(CpuOps(1, isa, "float"), x, matrix)
        assert (found - exact).abs().max() < 2.0**-18 * exact.abs().max()


def test_layers_of_one_input_have_orders_of_their_own() -> None:
    """Two of the three have the same one; alone and beside each other they have the same bits."""
    matrices = [random_matrix("int4_ordered[32,float16]", 35, 192) for _ in range(3)]
    matrices[2].planes[-1].copy_(matrices[0].planes[-1])
    x = activations(21, 192, torch.bfloat16)
    for isa in LEVELS:
        ops = level(isa, 2)
        together = ops.prepare_linear(*((each, None) for each in matrices), dtype=torch.bfloat16)
        for rows in (1, 7, 21):
            part = x[:rows]
            alone = [logits(ops, part, each).to(torch.bfloat16) for each in matrices]
            assert torch.equal(bits(ops.linear(part, together)), bits(torch.cat(alone, dim=1)))


@pytest.mark.parametrize("columns", [[0, 1, 1], [0, 1, 192], [-1, 0, 1]])
def test_an_order_names_every_column_once(columns: list[int]) -> None:
    matrix = random_matrix("int4_ordered[32,float16]", 8, 192)
    matrix.planes[-1].copy_(torch.arange(192, dtype=torch.int32))
    matrix.planes[-1][:3] = torch.tensor(columns, dtype=torch.int32)
    with pytest.raises(ValueError, match="name each of them once"):
        logits(level(LEVELS[0], 1), torch.randn(1, 192), matrix)


@pytest.mark.parametrize("name", ["int4[16,float16]", "int8[32,float16,int8 zeros]"])
def test_what_kernels_do_not_read_is_refused(name: str) -> None:
    matrix = random_matrix(name, 8, 64)
    assert isinstance(matrix.format, Integers)
    with pytest.raises(ValueError, match=r"groups|four bits"):
        logits(level(LEVELS[0], 1), torch.randn(1, 64), matrix)


def test_planes_are_read_where_they_lie() -> None:
    matrix = random_matrix("int4[32,float16,int8 zeros]", 5, 64)
    ops = level(LEVELS[-1], 1)
    layer = ops.prepare_linear((matrix, None), dtype=torch.float32)
    x = torch.randn(1, 64)
    before: Tensor = ops.linear(x, layer)
    for plane in matrix.planes:
        plane.copy_(plane.flip(0))
    assert torch.equal(ops.linear(x, layer), before.flip(1))
