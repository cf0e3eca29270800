"""Matrices, and products with weights of another format than x's dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moebius.ops import ExpertWeights, Matrix
from moebius.ops.formats import FORMATS, Dense, dense
from moebius.ops.reference import LOGITS_ROWS, ReferenceOps
from ops.levels import LEVELS, bits, level
from ops.toy_format import Int8, quantised

HALVES = [torch.float16, torch.bfloat16]
REFERENCE = ReferenceOps()

pytestmark = pytest.mark.usefixtures("seeded")


def halves(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random weights, some of them as small as float16's subnormal numbers."""
    x = torch.randn(shape) / shape[-1] ** 0.5
    x[..., ::5] *= 2e-5
    return x.to(dtype)


# --- the record ---


def test_rows_are_views_and_widen_as_the_whole_does() -> None:
    matrix = quantised(torch.randn(7, 5))
    part = matrix.rows(2, 6)
    assert part.shape == (4, 5)
    whole = matrix.widened(torch.float32)
    assert torch.equal(part.widened(torch.float32), whole[2:6])
    assert [plane.data_ptr() for plane in part.planes] == [
        plane[2:].data_ptr() for plane in matrix.planes
    ]
    assert matrix.rows(5, 99).shape == (2, 5)
    ids = torch.tensor([6, 0, 0])
    assert torch.equal(matrix.take(ids, torch.float32), whole[ids])
    assert matrix.nbytes == 7 * 5 + 7 * 4


def test_planes_of_another_format_are_refused() -> None:
    codes, scales = quantised(torch.randn(3, 4)).planes
    for planes in ((codes,), (codes, scales[:2]), (codes.float(), scales), (scales, codes)):
        with pytest.raises(ValueError, match="toy-int8 matrix"):
            Matrix(Int8(), (3, 4), planes)


@pytest.mark.parametrize(
    ("stored", "wanted", "exact"),
    [
        (torch.float16, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.bfloat16, False),
        (torch.bfloat16, torch.float16, False),
        (torch.float32, torch.bfloat16, False),
    ],
)
def test_what_widens_exactly(stored: torch.dtype, wanted: torch.dtype, exact: bool) -> None:
    assert dense(stored).exact_in(wanted) == exact


@pytest.mark.parametrize("isa", LEVELS)
def test_kernels_read_in_place_exactly_what_widens_exactly(isa: str) -> None:
    """Whatever they read is exact, and of the three formats nothing that is exact is left out."""
    for dtype in (torch.float32, torch.bfloat16):
        plain = {name: each for name, each in FORMATS.items() if isinstance(each, Dense)}
        exact = {name for name, each in plain.items() if each.exact_in(dtype)}
        assert level(isa, 1).formats(dtype) & set(plain) == exact


# --- products ---


@pytest.mark.parametrize("stored", HALVES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_products_have_the_bits_of_weights_copied_to_float32(isa: str, stored: torch.dtype) -> None:
    """Sizes that no tile divides, and layers of two formats side by side."""
    ops = level(isa, 2)
    for rows in (1, 2, 3, 4, 5, 13, 64, 70):
        for out, size in ((131, 100), (300, 1000), (5, 31), (64, 64)):
            x = torch.randn(rows, size)
            weight, other = halves(out, size, dtype=stored), torch.randn(7, size)
            bias = torch.randn(out)
            here = ops.prepare_linear((weight, bias), (other, None), dtype=torch.float32)
            copied = ops.prepare_linear((weight.float(), bias), (other, None))
            assert torch.equal(ops.linear(x, here), ops.linear(x, copied))
            head = ops.prepare_linear((weight, None), dtype=torch.float32)
            exact = x.double() @ weight.double().T
            terms = x.double().abs() @ weight.double().abs().T
            assert ((ops.logits(x, head) - exact).abs() <= 2.0**-20 * terms).all()


@pytest.mark.parametrize("stored", HALVES, ids=str)
@pytest.mark.parametrize("isa", LEVELS)
def test_experts_have_the_bits_of_weights_copied_to_float32(isa: str, stored: torch.dtype) -> None:
    ops = level(isa, 2)
    for count, k, width, hidden in ((8, 3, 100, 33), (2, 1, 48, 200)):
        gate, up, down = (
            [halves(*shape, dtype=stored) for _ in range(count)]
            for shape in ((width, hidden), (width, hidden), (hidden, width))
        )
        biases = [torch.randn(width) for _ in range(count)]
        here = ExpertWeights(gate, up, down, biases)
        copied = ExpertWeights(*([w.float() for w in kind] for kind in (gate, up, down)), biases)
        mixed = ExpertWeights(gate, copied.up_FD, down, biases)
        for rows in (1, 5, 70):
            x, share = torch.randn(rows, hidden), torch.rand(rows, k)
            ids = torch.stack([torch.randperm(count)[:k] for _ in range(rows)])
            found = [
                ops.experts(x, share, ids, ops.prepare_experts(w, "silu", torch.float32))
                for w in (here, copied, mixed)
            ]
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("isa", LEVELS)
def test_every_float16_number_is_embedded_as_torch_widens_it(isa: str) -> None:
    table = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).view(256, 256)
    ids = torch.randperm(256)
    exact = table.float()[ids]
    found = level(isa, 1).embed(ids, table, 1.0, torch.float32)
    numbers = ~exact.isnan()
    assert torch.equal(bits(found)[numbers], bits(exact)[numbers])
    assert found[~numbers].isnan().all()
    scaled = level(isa, 1).embed(ids, table, 12.0, torch.float32)
    assert torch.equal(bits(scaled)[numbers], bits(exact * 12.0)[numbers])


@pytest.mark.parametrize("stored", [*HALVES, torch.int8], ids=str)
def test_the_reference_widens_rows(stored: torch.dtype) -> None:
    """Against float64, for a vocabulary that is widened in parts too."""
    dense_weight = torch.randn(LOGITS_ROWS + 3, 6)
    weight = quantised(dense_weight) if stored == torch.int8 else dense_weight.to(stored)
    numbers = Matrix.of(weight).widened(torch.float32)
    x = torch.randn(3, 6)
    bias = torch.randn(len(numbers))
    with torch.no_grad():
        layer = REFERENCE.prepare_linear((weight, bias), dtype=torch.float32)
        exact = (x.double() @ numbers.double().T + bias).float()
        torch.testing.assert_close(REFERENCE.linear(x, layer), exact)
        torch.testing.assert_close(REFERENCE.logits(x, layer), exact)
        ids = torch.tensor([LOGITS_ROWS + 2, 0])
        found = REFERENCE.embed(ids, weight, 2.0, torch.float32)
        assert torch.equal(found, numbers[ids] * 2.0)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("as_matrix", [False, True])
def test_the_reference_rounds_an_embedding_once(stored: torch.dtype, as_matrix: bool) -> None:
    """By default to the table's dtype."""
    table = torch.randn(40, 33).to(stored)
    given = Matrix.of(table) if as_matrix else table
    ids = torch.randint(0, 40, (50,))
    for dtype in (None, torch.bfloat16, torch.float32):
        found = REFERENCE.embed(ids, given, 12.375, dtype)
        exact = (table[ids].float() * 12.375).to(dtype or stored)
        assert found.dtype == exact.dtype and torch.equal(found, exact)


def test_what_no_kernel_reads_is_refused_when_it_is_prepared() -> None:
    ops = level(LEVELS[-1], 1)
    x = torch.ones(4, 8)
    for weight, dtype in ((x.half(), torch.bfloat16), (x.double(), None)):
        with pytest.raises(ValueError, match=r"read no float.. weights|compute in bfloat16 and"):
            ops.prepare_linear((weight, None), dtype=dtype)
    three = ExpertWeights((x.half(),), (x.half(),), (torch.ones(8, 4).half(),))
    with pytest.raises(ValueError, match="read no float16 weights where they compute in"):
        ops.prepare_experts(three, "silu", torch.bfloat16)
    with pytest.raises(ValueError, match="read no float16 weights"):
        ops.embed(torch.tensor([0]), x.half(), 1.0, torch.bfloat16)
    with pytest.raises(ValueError, match="7 columns where the input has 8"):
        ops.prepare_linear((x, None), (torch.ones(4, 7), None))
    with pytest.raises(ValueError, match="one dtype"):
        ops.prepare_linear((x.half(), x[0, :4].half()), dtype=torch.float32)
