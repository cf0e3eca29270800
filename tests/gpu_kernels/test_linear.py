"""Tables and linear layers in Triton beside plain PyTorch, from weights as they are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE, counted
from moebius.ops import Matrix, Weight
from moebius.ops.formats import format_named
from moebius.ops.reference import ReferenceOps
from moebius.ops.reference.linear import ReferenceLinear
from moebius.ops.triton import TritonOps, linear
from moebius.ops.triton.kernels import linear as kernels
from moebius.ops.triton.linear import TritonLinear
from moebius.ops.triton.weights import READ
from ops.formats.blocks import BLOCKS, random_matrix

pytestmark = pytest.mark.usefixtures("seeded")

OPS = TritonOps()
REF = ReferenceOps()
DTYPES = [torch.bfloat16, torch.float32]
ALL_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FP8 = [
    "fp8[128x128,bfloat16]",
    "fp8[1x0,float32]",
    "fp8[16x32,float8_e8m0fnu]",
    "fp8[4x48,float16]",
]
CODES = ["q8_0", "q4_k", "q6_k", "mxfp4_planes", *FP8]


def random_weight(name: str, rows: int, columns: int) -> Weight:
    """Any codes under scales as large as those of trained weights, with a NaN among the codes."""
    if name in BLOCKS:
        return random_matrix(name, rows, columns).moved(lambda plane: plane.to(DEVICE))
    format = format_named(name)
    planes = []
    for dtype, shape in format.planes(rows, columns):
        if dtype == torch.uint8 or dtype.itemsize == 1:
            plane = torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype)
        else:
            plane = (torch.randn(shape) * 0.02).to(dtype)
        planes.append(plane)
    if planes[1].dtype.itemsize == 1:  # powers of two, which must not be any
        planes[1] = torch.randint(118, 128, planes[1].shape, dtype=torch.uint8).view(
            planes[1].dtype
        )
    if name.startswith("fp8"):
        codes = planes[0].view(torch.uint8)
        codes[codes & 0x7F == 0x7F] = 1
    return Matrix(format, (rows, columns), tuple(plane.to(DEVICE) for plane in planes))


def near(found: Tensor, wanted: Tensor, x: Tensor, *weights: Tensor) -> None:
    """As close as two orders of a sum of float32 products, rounded once, have to be."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    sizes = [x.double().abs() @ weight.double().abs().T for weight in weights]
    bound = torch.cat(sizes, 1) * 2.0**-20
    if found.dtype == torch.bfloat16:
        bound += 2.0**-8 * wanted.double().abs()
    assert ((found.double() - wanted.double()).abs() <= bound).all()


def wide(weight: Weight) -> Tensor:
    return Matrix.of(weight).widened(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 67])
def test_layers_side_by_side(rows: int, dtype: torch.dtype) -> None:
    """Of sizes that are no multiples of a tile, with a bias and without."""
    x = torch.randn(rows, 75, device=DEVICE).to(dtype)
    weights = [torch.randn(size, 75, device=DEVICE).to(dtype) for size in (70, 1)]
    layers = ((weights[0], torch.randn(70, device=DEVICE).to(dtype)), (weights[1], None))
    found = OPS.linear(x, OPS.prepare_linear(*layers, dtype=dtype))
    near(found, REF.linear(x, REF.prepare_linear(*layers, dtype=dtype)), x, *weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODES)
def test_codes_are_widened_as_plain_pytorch_widens_them(name: str, dtype: torch.dtype) -> None:
    """By products with rows that are zero but for a one: each is a weight, rounded once."""
    columns = 512 if name.endswith("_k") else 96
    weight = random_weight(name, 5, columns)
    prepared = OPS.prepare_linear((weight, None), dtype=dtype)
    assert isinstance(prepared, TritonLinear) and not prepared.others
    x = torch.eye(columns, device=DEVICE).to(dtype)[torch.randperm(columns)[:64]]
    exact = x.float() @ wide(weight).T
    found = OPS.linear(x, prepared)
    assert found.dtype == dtype
    # A GPU adds a minimum in the step that multiplies, which is a rounding less.
    least = 2.0**-20 * wide(weight).abs().max().item()
    torch.testing.assert_close(found, exact.to(dtype), rtol=2.0**-7, atol=least)
    torch.testing.assert_close(OPS.logits(x, prepared), exact, rtol=2.0**-20, atol=least)


def test_scales_that_are_no_numbers_and_codes_at_their_ends() -> None:
    codes = torch.tensor([[0x00, 0x80, 0x01, 0x07, 0x08, 0x7E, 0xFE, 0x7F]], dtype=torch.uint8)
    scales = torch.ones(1, 1)
    fp8 = Matrix(
        format_named("fp8[0x0,float32]"), (1, 8), (codes.view(torch.float8_e4m3fn), scales)
    )
    powers = torch.tensor([[0, 1, 251, 255]], dtype=torch.uint8)
    four_bits = Matrix(
        format_named("mxfp4_planes"),
        (1, 128),
        (torch.full((1, 64), 0x72, dtype=torch.uint8), powers),
    )
    for weight in (fp8, four_bits):
        moved = weight.moved(lambda plane: plane.to(DEVICE))
        found = OPS.embed(
            torch.zeros(1, dtype=torch.int64, device=DEVICE), moved, 1.0, torch.float32
        )
        assert torch.equal(found.isnan(), wide(moved).isnan())
        assert torch.equal(found.nan_to_num(), wide(moved).nan_to_num())


@pytest.mark.parametrize("table", ["bfloat16", "float32", "q8_0", "fp8[16x32,float8_e8m0fnu]"])
def test_rows_of_tables(table: str) -> None:
    plain = getattr(torch, table, None)
    weight = random_weight(table, 9, 96) if plain is None else torch.randn(9, 96).to(DEVICE, plain)
    ids = torch.tensor([8, 0, 3, 3], device=DEVICE)
    for dtype in DTYPES:
        found = OPS.embed(ids, weight, 1.5, dtype)
        assert torch.equal(found, REF.embed(ids, weight, 1.5, dtype))
    assert OPS.embed(ids[:0], weight, 1.0, torch.float32).shape == (0, 96)
    for wrong in (-1, 9):
        with pytest.raises(IndexError, match=f"token id {wrong} is outside the table of 9 rows"):
            OPS.embed(torch.tensor([0, wrong], device=DEVICE), weight, 1.0, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_has_the_bits_that_it_has_among_others(dtype: torch.dtype) -> None:
    x = torch.randn(66, 160, device=DEVICE).to(dtype)
    weights = (torch.randn(3, 160, device=DEVICE).to(dtype), random_weight("q8_0", 3, 160))
    prepared = OPS.prepare_linear(*((weight, None) for weight in weights), dtype=dtype)
    whole = OPS.linear(x, prepared)
    for row in (0, 63, 65):
        assert torch.equal(OPS.linear(x[row : row + 1], prepared)[0], whole[row])


@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("plain", torch.bfloat16), ("plain", torch.float32), ("q8_0", torch.float32)],
)
def test_split_sums_are_the_same_in_parts_and_in_order(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few rows, whose splits a program each takes, and of more; of columns that are no multiple
    of a split; with a bias and without."""
    monkeypatch.setattr(linear, "SPLIT", 128)
    monkeypatch.setattr(linear, "LONG", 300)
    columns = 320 if name == "q8_0" else 333
    x = torch.randn(18, columns, device=DEVICE).to(dtype)
    weights: list[Weight] = [
        torch.randn(size, columns, device=DEVICE).to(dtype)
        if name == "plain"
        else random_weight(name, size, columns)
        for size in (70, 3)
    ]
    layers = ((weights[0], torch.randn(70, device=DEVICE).to(dtype)), (weights[1], None))
    prepared = OPS.prepare_linear(*layers, dtype=dtype)
    assert isinstance(prepared, TritonLinear)
    assert [launch.split for launch in prepared.launches] == [128, 128]
    whole = OPS.linear(x, prepared)
    near(whole, REF.linear(x, ReferenceLinear(layers)), x, *map(wide, weights))
    for rows in (1, 16):
        with counted() as launched:
            found = OPS.linear(x[:rows], prepared)
        assert torch.equal(found, whole[:rows])
        assert {*launched} == {"linear_split", "join_splits"}
    monkeypatch.setattr(linear, "PARTS_BYTES", 3 * 16 * 73 * 4 - 1)
    with counted() as launched:
        assert torch.equal(OPS.linear(x[:16], prepared), whole[:16])
    assert {*launched} == {"linear"}


def test_sums_are_split_by_the_layer_alone() -> None:
    def split(rows: int, columns: int) -> int:
        weight = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
        prepared = OPS.prepare_linear((weight, None))
        assert isinstance(prepared, TritonLinear)
        return prepared.launches[0].split

    assert split(64, 2048) == split(8192, 2048) == 1024
    assert split(64, 2047) == split(8193, 2048) == 0


def test_other_weights_are_plain_pytorchs() -> None:
    """Beside those that the kernels read, each in its columns."""
    x = torch.randn(2, 256, device=DEVICE)
    layers = (
        (torch.randn(3, 256, device=DEVICE), None),
        (random_weight("q5_k", 4, 256), torch.randn(4, device=DEVICE)),
    )
    prepared = OPS.prepare_linear(*layers, dtype=torch.float32)
    assert isinstance(prepared, TritonLinear) and len(prepared.others) == 1
    assert prepared.is_of(*layers) and not prepared.is_of(layers[0])
    wanted = REF.linear(x, ReferenceLinear(layers))
    torch.testing.assert_close(OPS.linear(x, prepared), wanted, rtol=1e-5, atol=1e-4)


def test_what_is_trained_has_a_gradient() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.randn(2, 6, device=DEVICE)
        trained = torch.randn(4, 6, device=DEVICE, requires_grad=True)
        OPS.linear(x, OPS.prepare_linear((trained, None))).sum().backward()
        assert trained.grad is not None
        torch.testing.assert_close(trained.grad, x.sum(0).expand(4, -1))


def test_what_is_refused() -> None:
    weight = torch.randn(4, 8, device=DEVICE)
    prepared = OPS.prepare_linear((weight, None))
    with pytest.raises(ValueError, match=r"bfloat16 meet weights of torch.float32"):
        OPS.linear(torch.zeros(2, 8, device=DEVICE).bfloat16(), prepared)
    with pytest.raises(ValueError, match="have 8 numbers, not 9"):
        OPS.linear(torch.zeros(2, 9, device=DEVICE), prepared)
    with pytest.raises(ValueError, match=r"a bias has the shape \(3,\), not \(4,\)"):
        OPS.prepare_linear((weight, torch.zeros(3, device=DEVICE)))
    with pytest.raises(ValueError, match="have 8 and 7 columns"):
        OPS.prepare_linear((weight, None), (weight[:, :7], None))


def test_formats_are_those_that_are_read_in_place() -> None:
    for dtype in DTYPES:
        names = {name.partition("[")[0] for name in CODES}
        assert names | {str(dtype).removeprefix("torch.")} <= OPS.formats(dtype)
        assert names <= READ
    assert "bfloat16" in OPS.formats(torch.float32)
    assert "float32" not in OPS.formats(torch.bfloat16)


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", *CODES])
def test_all_formats_compile(name: str, dtype: torch.dtype) -> None:
    x = torch.zeros(64, 2048, dtype=dtype)
    bias = torch.zeros(64, dtype=dtype)
    weights: list[Weight] = []
    if name == "plain":
        fit = [each for each in ALL_DTYPES if torch.promote_types(each, dtype) == dtype]
        weights += [torch.zeros(64, 2048, dtype=each) for each in fit]
    else:
        weights.append(random_weight(name, 64, 2048))
    with launches() as seen:
        for weight in weights:
            layers = OPS.prepare_linear((weight, bias), dtype=dtype)
            OPS.linear(x, layers)
            OPS.linear(x[:1], layers)
        OPS.embed(torch.zeros(3, dtype=torch.int64), weights[0], 2.0, dtype)
        if name == "plain" and dtype == torch.bfloat16:
            OPS.logits(x, OPS.prepare_linear((x, None), dtype=dtype))
            OPS.linear(x[:, :1024], OPS.prepare_linear((x[:5, :1024], None), dtype=dtype))
    assert_compile(seen, kernels)
