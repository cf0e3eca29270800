"""Formats of several planes: their numbers beside transformers', and rows of them in every way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moebius.ops import Matrix
from moebius.ops.formats import PLANE_FORMATS, Format, Repacked, format_named
from moebius.ops.formats.groups import packed, unpacked
from moebius.ops.reference import ReferenceOps
from packing import E2M1

F32, BF16 = torch.float32, torch.bfloat16
NAMES = [
    "fp8[24x16,float32]",
    "fp8[24x48,float8_e8m0fnu]",
    "fp8[1x0,bfloat16]",
    "fp8[0x0,float32]",
    "mxfp4_planes",
    "nvfp4_divided",
    "nvfp4_multiplied",
    "int4[32,bfloat16]",
    "int4[0,float16,words zeros]",
    "int4[32,float16,int8 zeros]",
    "int4_ordered[16,float16,words zeros]",
    "int4_indexed[16,float16,words zeros]",
    "int8[0,float32]",
    "int8[32,bfloat16,int8 zeros]",
    "int8_words[32,float16,words zeros]",
    "int8_words_ordered[32,float16,int16 zeros]",
    "int8_words_indexed[32,bfloat16]",
    "affine4[32,float16]",
    "affine8[64,bfloat16]",
    "gptq4[32,float16,minus one,plain]",
    "gptq8[16,float16,plain,ordered]",
    "awq[32,float16]",
]

pytestmark = pytest.mark.usefixtures("seeded")


def random_plane(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Any codes; scales and numbers of moderate size."""
    if dtype == torch.float8_e4m3fn:
        return torch.randn(shape).to(dtype)
    if dtype == torch.float8_e8m0fnu:
        return torch.randint(110, 140, shape, dtype=torch.uint8).view(dtype)
    if dtype == torch.uint8:
        return torch.randint(100, 150, shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.rand(shape).to(dtype) + 0.1
    info = torch.iinfo(dtype)
    low, high = (-128, 128) if dtype == torch.int16 else (info.min, info.max)
    return torch.randint(low, high, shape, dtype=dtype)


def random_matrix(name: str, rows: int, columns: int) -> Matrix:
    format = format_named(name)
    shapes = format.planes(rows, columns)
    groups = shapes[1][1][0 if name.startswith(("gptq", "awq")) else 1]
    planes = tuple(random_plane(dtype, shape) for dtype, shape in shapes)
    following = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    if "plain]" in name:
        planes = (*planes[:-1], following)
    elif "_indexed" in name or ",ordered]" in name:
        planes = (*planes[:-1], following[torch.randperm(columns)])
    elif "_ordered" in name:
        planes = (*planes[:-1], torch.randperm(columns, dtype=torch.int32))
    return Matrix(format, (rows, columns), planes)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_whole_matrix_rows(name: str) -> None:
    """Slices that begin within what rows share, and ids; each of them again."""
    matrix = random_matrix(name, 56, 96 if "64" not in name else 128)
    whole = matrix.widened(F32)
    assert torch.isfinite(whole).all() and whole.unique().numel() > 20
    for start, stop in ((0, 56), (24, 48), (8, 16), (3, 4), (5, 50), (30, 99), (7, 7)):
        part = matrix.rows(start, stop)
        assert torch.equal(part.widened(F32), whole[start:stop])
        if stop - start > 10:
            assert torch.equal(part.rows(2, 9).widened(F32), whole[start + 2 : start + 9])
            assert torch.equal(part.take(torch.tensor([9, 1]), F32), whole[[start + 9, start + 1]])
    ids = torch.tensor([55, 0, 17, 17, 24])
    assert torch.equal(matrix.take(ids, F32), whole[ids])
    assert torch.equal(matrix.widened(BF16), whole.to(BF16))


@pytest.mark.parametrize("name", ["fp8[24x16,float32]", "int4[32,bfloat16,words zeros]"])
def test_rows_between_what_is_shared_are_views(name: str) -> None:
    matrix = random_matrix(name, 72, 96)
    part = matrix.rows(24, 72)
    assert part.format is matrix.format
    memory = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in matrix.planes]
    for plane, (start, stop) in zip(part.planes, memory, strict=True):
        assert start < plane.data_ptr() < stop


@pytest.mark.parametrize("name", NAMES)
def test_a_name_makes_the_format_that_has_it(name: str) -> None:
    assert format_named(name).name == name


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not isinstance(format_named(name), Repacked)]
)
def test_plain_pytorch_computes_with_every_format(name: str) -> None:
    """A product, and rows of a table, beside the widened numbers in float64."""
    ops = ReferenceOps()
    assert name.partition("[")[0] in ops.formats(F32) & PLANE_FORMATS
    matrix = random_matrix(name, 40, 128)
    wide = matrix.widened(F32)
    x = torch.randn(3, 128)
    with torch.no_grad():
        layer = ops.prepare_linear((matrix, None), dtype=F32)
        exact = x.double() @ wide.double().T
        terms = x.double().abs() @ wide.double().abs().T
        assert ((ops.linear(x, layer) - exact).abs() <= 2.0**-20 * terms).all()
        ids = torch.tensor([39, 0, 7])
        assert torch.equal(ops.embed(ids, matrix, 1.0, F32), wide[ids])


@pytest.mark.parametrize("name", ["nothing", "fp8[1x0,int8]", "int5[32,float16]"])
def test_names_of_nothing(name: str) -> None:
    with pytest.raises((KeyError, ValueError)):
        format_named(name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mxfp4_planes", (4, 48)),
        ("nvfp4_divided", (4, 24)),
        ("int4[32,float16]", (4, 48)),
        ("int4[0,float16]", (4, 12)),
        ("affine4[32,float16]", (4, 48)),
        ("gptq4[16,float16,plain,none]", (12, 16)),
        ("awq[16,float16]", (12, 16)),
    ],
)
def test_sizes_that_cannot_be(name: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no whole"):
        format_named(name).planes(*shape)


# --- beside transformers ---


def test_mxfp4_is_transformers() -> None:
    """Every byte of two codes, with every scale that does not leave bfloat16's numbers."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for exponent in range(2, 253):
        scales = torch.full((1, 1, 16), exponent, dtype=torch.uint8)
        theirs = convert_moe_packed_tensors(codes, scales, dtype=BF16)
        planes = (codes.view(1, 256), scales.view(1, 16))
        ours = Matrix(format_named("mxfp4_planes"), (1, 512), planes).widened(BF16)
        assert torch.equal(ours.view(torch.int16), theirs.reshape(1, 512).view(torch.int16))


def test_mxfp4_by_hand() -> None:
    """Scales of all sizes; 255 is none."""
    codes = torch.tensor([[0x21, 0xF8]], dtype=torch.uint8).repeat(4, 8)
    scales = torch.tensor([[127], [0], [254], [255]], dtype=torch.uint8)
    found = Matrix(format_named("mxfp4_planes"), (4, 32), (codes, scales)).widened(F32)
    for row, power in enumerate((1.0, 2.0**-127, 2.0**127)):
        expected = torch.tensor([E2M1[1], E2M1[2], -0.0, -E2M1[7]]).double() * power
        assert torch.equal(found[row, :4], expected.float())
        assert torch.equal(found[row, 4:8], found[row, :4])
    assert found[3].isnan().all()


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fp8_is_transformers(scale: torch.dtype, dtype: torch.dtype) -> None:
    """Every code that is a number, in blocks and with a scale a row."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[~every.float().isnan()]
    codes = every.view(torch.uint8).repeat(16)[: 48 * 80].view(48, 80).view(torch.float8_e4m3fn)
    for rows, columns in ((16, 20), (1, 80), (48, 80)):
        shape = (48 // rows, 80 // columns)
        name = f"fp8[{rows}x{columns},{str(scale).removeprefix('torch.')}]"
        scales = random_plane(scale, shape)
        theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
        ours = Matrix(format_named(name), (48, 80), (codes, scales)).widened(dtype)
        assert torch.equal(ours, theirs)


def test_blocks_that_do_not_divide_a_matrix() -> None:
    codes = torch.randn(21, 37).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 5)
    found = Matrix(format_named("fp8[8x8,float32]"), (21, 37), (codes, scales)).widened(F32)
    for i, j in ((0, 0), (7, 8), (8, 7), (20, 36), (16, 32), (15, 31)):
        assert found[i, j] == codes[i, j].float() * scales[i // 8, j // 8]


def test_columns_in_an_order_of_their_own_by_hand() -> None:
    """Codes of 0 to 7 twice, in two groups with scales of 1 and 100: the even columns are in the
    second group, and lie behind the odd ones."""
    codes = torch.arange(8, 16, dtype=torch.uint8).repeat(2)
    index = torch.tensor([1, 0] * 8, dtype=torch.int32)
    scales = torch.tensor([[1.0, 100.0]], dtype=torch.float16)
    indexed = format_named("int4_indexed[8,float16]")
    matrix = Matrix(indexed, (1, 16), (packed(codes.view(1, -1), 4), scales, index))
    by_hand = [100.0 * (i % 8) if i % 2 == 0 else i % 8 for i in range(16)]
    assert matrix.widened(F32).tolist() == [by_hand]
    assert isinstance(indexed, Repacked)
    words, _, columns = indexed.repacked(matrix.planes)
    assert columns.tolist() == [1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14]
    assert (unpacked(words, 4)[0] - 8).tolist() == [1, 3, 5, 7, 1, 3, 5, 7, 0, 2, 4, 6, 0, 2, 4, 6]
    ordered = Matrix(indexed.target, (1, 16), (words, scales, columns))
    assert ordered.widened(F32).tolist() == [by_hand]


def test_groups_of_unequal_sizes_are_refused() -> None:
    index = torch.tensor([0] * 17 + [1] * 15, dtype=torch.int32)
    planes = (torch.zeros(1, 4, dtype=torch.int32), torch.ones(1, 2, dtype=torch.float16), index)
    matrix = Matrix(format_named("int4_indexed[16,float16]"), (1, 32), planes)
    with pytest.raises(ValueError, match="g_idx has groups of 15 to 17 columns"):
        matrix.widened(F32)


def test_repacking_keeps_the_order_of_files() -> None:
    """AWQ's codes as its own unpacking has them: nibbles 0, 4, 1, 5, 2, 6, 3, 7 are outputs."""
    word = sum(
        value << (4 * nibble)
        for nibble, value in zip((0, 4, 1, 5, 2, 6, 3, 7), range(8), strict=True)
    )
    codes = torch.full((16, 1), word, dtype=torch.int64).to(torch.int32)
    zeros, scales = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8, dtype=torch.float16)
    format: Format = format_named("awq[16,float16]")
    found = Matrix(format, (8, 16), (codes, zeros, scales)).widened(F32)
    assert torch.equal(found[:, 3], torch.arange(8.0))


def test_gptq_zeros_of_version_one_reach_two_to_the_bits() -> None:
    """A stored 15 is 16, as the kernels of vLLM have it; of 8 bits, 255 is 256."""
    for bits, dtype in ((4, torch.int8), (8, torch.int16)):
        format = format_named(f"gptq{bits}[0,float16,minus one,none]")
        per_word = 32 // bits
        words = torch.zeros(per_word, per_word, dtype=torch.int32)[:1]
        zeros = torch.full((1, 1), -1, dtype=torch.int32)
        planes = (words, zeros, torch.ones(1, per_word, dtype=torch.float16))
        matrix = Matrix(format, (per_word, per_word), planes)
        assert (matrix.widened(F32) == -(2**bits)).all()
        assert isinstance(format, Repacked)
        assert format.repacked(planes)[2].dtype == dtype
