"""Tiles of products by generation of cards."""

from __future__ import annotations

import pytest
import torch

from gpu_kernels.conftest import DEVICE
from gpu_kernels.test_linear import OPS, random_weight
from moebius.ops import Matrix
from moebius.ops.triton import linear
from moebius.ops.triton.linear import TritonLinear
from moebius.ops.triton.tiles import TILES, generation, tile_for
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
    """Rows and weights of float32 in all steps that are on their way, in linear layers; in experts,
    of which one step fewer is, two tiles of weights."""
    assert set(SHARED) == set(TILES)
    for entry, tile in TILES.items():
        rows, columns = (4 * size * tile.depth for size in (tile.rows, tile.columns))
        assert (tile.stages - 1) * (rows + columns) <= SHARED[entry] * 1024
        assert max(1, tile.stages - 2) * (rows + 2 * columns) <= SHARED[entry] * 1024
        # Splits of sums end where steps do, and so do the groups of all codes.
        assert linear.SPLIT % tile.depth == 0 and tile.depth % 32 == 0
        assert tile.rows >= linear.FEW_ROWS


def test_a_layer_is_computed_with_the_tile_of_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    monkeypatch.setattr(linear, "tile_for", lambda _: tile_for(device)._replace(columns=32))
    weight = torch.randn(70, 40, device=DEVICE)
    prepared = OPS.prepare_linear((weight, None))
    assert isinstance(prepared, TritonLinear) and len(prepared.launches[0].tiles) == 3
    x = torch.randn(3, 40, device=DEVICE)
    torch.testing.assert_close(OPS.linear(x, prepared), x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["q8_0", "q6_k"])
def test_codes_on_odd_addresses_are_plain_pytorchs(name: str) -> None:
    weight = random_weight(name, 3, 256)
    assert isinstance(weight, Matrix) and stored(weight) is not None
    (plane,) = weight.planes
    room = torch.empty(plane.numel() + 1, dtype=torch.uint8, device=DEVICE)
    odd = room[1 if room.data_ptr() % 2 == 0 else 0 :][: plane.numel()].view_as(plane)
    odd.copy_(plane)
    assert stored(Matrix(weight.format, weight.shape, (odd,))) is None
