"""Tiles of products by generation of cards, and for how many rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from gpu_kernels.test_attention import Drawn
from gpu_kernels.test_linear import OPS, random_weight
from moebius.ops import ExpertWeights, Matrix, Weight
from moebius.ops.triton import TritonOps, attention, experts, linear, tiles
from moebius.ops.triton.linear import TritonLinear
from moebius.ops.triton.tiles import TILES, ManyRows, enough, generation, tiles_for
from moebius.ops.triton.weights import stored

# Shared memory of a block of threads in KiB (CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability").
SHARED = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}


@pytest.mark.parametrize(
    ("capability", "entry"),
    [
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 9), 86),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 120),
        ((13, 0), 120),
        ((7, 5), 80),
    ],
)
def test_cards_take_the_newest_that_is_no_newer(capability: tuple[int, int], entry: int) -> None:
    assert generation(*capability) == entry


def test_tiles_fit() -> None:
    """Rows and weights in all steps that are on their way, of float32 where rows are few; where two
    sums are kept, two tiles of weights."""
    assert set(SHARED) == set(TILES)
    for entry, sizes in TILES.items():
        for many, codes, sums in product((False, True), (False, True), (1, 2)):
            tile = sizes.sized(many=many, codes=codes, sums=sums)
            stages = tile.stages - 1 - (sums == 2 and not many)
            size = 2 if many else 4
            step = size * tile.depth * (tile.rows + sums * tile.columns)
            assert max(1, stages) * step <= SHARED[entry] * 1024
        # Splits of sums end where steps do, and so do the groups of all codes.
        few, many_rows, _ = sizes
        assert linear.SPLIT % few.depth == 0 and few.depth % 32 == 0
        assert few.rows >= linear.FEW_ROWS
        # A row's bits are to be the same by both: steps of a sum, and rows of a warp.
        assert few.depth == many_rows.depth
        assert few.rows // few.warps == many_rows.rows // many_rows.warps == 16


def test_a_layer_is_computed_with_the_tile_of_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    own = tiles_for(device)
    monkeypatch.setattr(
        linear, "tiles_for", lambda _: own._replace(few=own.few._replace(columns=32))
    )
    weight = torch.randn(70, 40, device=DEVICE)
    prepared = OPS.prepare_linear((weight, None))
    assert isinstance(prepared, TritonLinear) and len(prepared.launches[0].tiles) == 3
    x = torch.randn(3, 40, device=DEVICE)
    torch.testing.assert_close(OPS.linear(x, prepared), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_what_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, of a card of 132 processors: 99 tiles leave a quarter of it idle."""
    device = torch.device(DEVICE)
    monkeypatch.setattr(tiles, "processors", lambda _: 132)
    assert enough(99, 0.75, device, ManyRows.WHERE_ENOUGH)
    assert not enough(98, 1.0, device, ManyRows.WHERE_ENOUGH)
    assert not enough(1000, 0.7, device, ManyRows.WHERE_ENOUGH)
    assert enough(1, 0.1, device, ManyRows.ALWAYS)
    assert not enough(1000, 1.0, device, ManyRows.NEVER)


def by_both(work: Callable[[TritonOps], Tensor]) -> list[Tensor]:
    """What comes of tiles for few rows, and of those for many."""
    found = []
    for when in (ManyRows.NEVER, ManyRows.ALWAYS):
        ops = TritonOps()
        ops.many_rows = when
        found.append(work(ops).nan_to_num())
    return found


@pytest.mark.usefixtures("seeded", "sums_in_order")
@pytest.mark.parametrize("name", ["plain", "q4_k", "mxfp4_planes"])
def test_many_rows_have_the_bits_of_few(name: str) -> None:
    """More rows and columns than the largest tile has, but no two tiles full of them."""
    dtype = torch.bfloat16
    x = torch.randn(140, 256, device=DEVICE).to(dtype)

    def weight(rows: int, columns: int) -> Weight:
        if name == "plain":
            return (torch.randn(rows, columns) / 16).to(DEVICE, dtype)
        return random_weight(name, rows, columns)

    layer = weight(140, 256)
    few, many = by_both(lambda ops: ops.linear(x, ops.prepare_linear((layer, None), dtype=dtype)))
    assert torch.equal(few, many)
    inner = [weight(256, 256) for _ in range(2)]
    weights = ExpertWeights(inner, inner[::-1], inner)
    ids = torch.randint(2, (140, 1), device=DEVICE)
    share = torch.rand(140, 1, device=DEVICE)
    few, many = by_both(
        lambda ops: ops.experts(x, share, ids, ops.prepare_experts(weights, "silu", dtype))
    )
    assert torch.equal(few, many)


@pytest.mark.usefixtures("seeded", "sums_in_order")
def test_sums_of_many_rows_are_split_where_those_of_few_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "LONG", 64)
    monkeypatch.setattr(linear, "SPLIT", 64)
    x = torch.randn(140, 200, device=DEVICE).bfloat16()
    layer = torch.randn(140, 200, device=DEVICE).bfloat16()
    few, many = by_both(lambda ops: ops.linear(x, ops.prepare_linear((layer, None))))
    assert torch.equal(few, many)
    wide = by_both(lambda ops: ops.logits(x, ops.prepare_linear((layer, None))))
    assert torch.equal(*wide)


@pytest.mark.usefixtures("seeded", "sums_in_order")
def test_a_prompts_attention_has_the_bits_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a decode whose keys are split, and one whose are not."""
    monkeypatch.setattr(attention, "SPLIT", 64)
    drawn = Drawn.of([(150, 40), (130, 1), (20, 1)], (4, 2, 16, 16), torch.bfloat16)
    options = {"window": 70, "sinks_H": torch.randn(4, device=DEVICE)}
    few, many = by_both(lambda ops: drawn.attend(ops, 0.25, **options))
    assert torch.equal(few, many)


def tiles_launched(work: Callable[[TritonOps], object], when: ManyRows) -> dict[str, set[int]]:
    """Rows (of attention, entries) of the tiles that each kernel was launched with."""
    ops = TritonOps()
    ops.many_rows = when
    with launches() as seen:
        work(ops)
    found: dict[str, set[int]] = {}
    for each in seen:
        if "M" in each.constants:
            found.setdefault(each.name, set()).add(each.constants["M"])
    return found


@pytest.mark.skipif(DEVICE == "cuda", reason="what is launched is noted in the interpreter")
def test_which_tiles_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, of a card of four processors: three tiles of 128 x 128 are enough for it."""
    monkeypatch.setattr(tiles, "processors", lambda _: 4)
    layer = torch.zeros(384, 64, dtype=torch.bfloat16)

    def product(rows: int, dtype: torch.dtype) -> dict[str, set[int]]:
        x = torch.zeros(rows, 64, dtype=dtype)
        return tiles_launched(
            lambda ops: ops.linear(x, ops.prepare_linear((layer.to(dtype), None))),
            ManyRows.WHERE_ENOUGH,
        )

    assert product(96, torch.bfloat16) == {"linear": {128}}
    assert product(95, torch.bfloat16) == {"linear": {64}}
    assert product(1000, torch.float32) == {"linear": {64}}

    def attended(rows: int) -> dict[str, set[int]]:
        drawn = Drawn.of([(rows, rows), (600, 1), (20, 1)], (4, 1, 16, 16), torch.bfloat16)
        return tiles_launched(lambda ops: drawn.attend(ops, 0.25), ManyRows.WHERE_ENOUGH)

    # Tiles of 32 rows, by four heads of each.
    assert attended(65) == {"attend_in_order": {64, 128}, "attend_split": {64}}
    assert attended(64) == {"attend_in_order": {64}, "attend_split": {64}}


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
@pytest.mark.parametrize("entry", [80, 90])
def test_tiles_for_many_rows_compile(entry: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the sizes of real models, of plain numbers and of codes, with sums that are split and
    without."""
    monkeypatch.setattr("moebius.ops.triton.experts._require_held", lambda *_, **__: None)
    for module in (linear, experts):
        monkeypatch.setattr(module, "tiles_for", lambda _: TILES[entry])
    ops = TritonOps()
    ops.many_rows = ManyRows.ALWAYS
    x = torch.zeros(256, 2048, dtype=torch.bfloat16)
    ids = torch.zeros(256, 2, dtype=torch.int64)
    with launches() as seen:
        for name in ("plain", "q4_k", "mxfp4_planes"):
            weight = random_weight(name, 256, 2048) if name != "plain" else x
            for few_tiles in (0, linear.FEW_TILES):
                monkeypatch.setattr(linear, "FEW_TILES", few_tiles)
                ops.linear(x, ops.prepare_linear((weight, None), dtype=x.dtype))
            outer = random_weight(name, 2048, 256) if name != "plain" else x.T.contiguous()
            weights = ExpertWeights([weight] * 2, [weight] * 2, [outer] * 2)
            held = ops.prepare_experts(weights, "silu", x.dtype)
            ops.experts(x, torch.zeros(256, 2), ids, held)
        for heads in ((32, 4, 128, 128), (64, 8, 64, 64)):
            Drawn.of([(1100, 100)], heads, x.dtype).attend(ops, 0.1, window=1024)
    large = [each for each in seen if each.constants.get("M") == 128]
    assert {each.name for each in large} == {"linear", "gate_up", "down", "attend_in_order"}
    assert_compile(large, capabilities=[entry])


@pytest.mark.parametrize("name", ["q8_0", "q6_k"])
def test_codes_on_odd_addresses_are_plain_pytorchs(name: str) -> None:
    weight = random_weight(name, 3, 256)
    assert isinstance(weight, Matrix) and stored(weight) is not None
    (plane,) = weight.planes
    room = torch.empty(plane.numel() + 1, dtype=torch.uint8, device=DEVICE)
    odd = room[1 if room.data_ptr() % 2 == 0 else 0 :][: plane.numel()].view_as(plane)
    odd.copy_(plane)
    assert stored(Matrix(weight.format, weight.shape, (odd,))) is None
