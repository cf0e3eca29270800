"""Latent attention's own operations in Triton beside plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from moebius.ops import FORMATS, Matrix
from moebius.ops.cache_spec import latent_spec
from moebius.ops.config import Temperature
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Rotation
from moebius.ops.triton import TritonOps
from moebius.ops.triton.kernels import latent as kernels
from moebius.quantize.encode import encoded

OPS = TritonOps()
REF = ReferenceOps()
DTYPES = [torch.bfloat16, torch.float32]
BLOCK_SIZE = 4


def near(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    tolerance = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-19}[found.dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "outs", "columns", "behind"),
    [(1, 1, 1, 1, 0), (3, 3, 13, 5, 4), (70, 2, 80, 40, 0), (0, 2, 4, 4, 2)],
)
def test_head_products(
    rows: int, heads: int, outs: int, columns: int, behind: int, dtype: torch.dtype
) -> None:
    """Of several tiles of rows, of outputs and of columns, and of parts of one."""
    weight = (torch.randn(heads * outs, columns, device=DEVICE) / columns**0.5).to(dtype)
    x = torch.randn(rows, heads, columns + behind + 3, device=DEVICE).to(dtype)[..., 3:]
    found = OPS.head_products(x, OPS.prepare_heads(weight, heads))
    wanted = REF.head_products(x.double(), REF.prepare_heads(weight.double(), heads))
    near(found, wanted.to(dtype))
    assert torch.equal(found[..., outs:], x[..., columns:])
    if rows:
        alone = OPS.head_products(x[rows // 2 :][:1], OPS.prepare_heads(weight, heads))
        assert torch.equal(found[rows // 2], alone[0])


def test_head_products_of_codes_are_those_of_what_they_stand_for() -> None:
    plain = torch.randn(2 * 5, 32)
    codes = Matrix(FORMATS["q8_0"], (10, 32), (encoded(plain, "q8_0").to(DEVICE),))
    x = torch.randn(3, 2, 32, device=DEVICE)
    found = OPS.head_products(x, OPS.prepare_heads(codes, 2))
    wide = OPS.prepare_heads(codes.widened(torch.float32), 2)
    assert torch.equal(found, OPS.head_products(x, wide))


def rotated(half: int, rows: int, *, interleaved: bool) -> Rotation:
    angles = torch.randn(rows, half, device=DEVICE)
    return Rotation(angles.cos(), angles.sin(), interleaved)


def stored(ops: ReferenceOps, inputs: tuple[Tensor, Tensor], **kwargs: object) -> list[Tensor]:
    """Queries, and all that the cache holds then: NaN where nobody wrote."""
    q, latents = inputs
    size = len(kwargs["norm_C"])  # type: ignore[arg-type]
    spec = latent_spec(size, latents.shape[1] - size, latents.dtype)
    stride = ops.cache_bytes_per_block(spec, BLOCK_SIZE) + 64
    buffer = torch.full((5 * stride,), 255, dtype=torch.uint8, device=DEVICE)
    cache = ops.make_cache(buffer, spec, BLOCK_SIZE, stride=stride)
    turned = ops.rotate_and_store_latent(q.clone(), latents, cache=cache, eps=1e-6, **kwargs)  # type: ignore[arg-type]
    memory = [plane for block in range(5) for plane in ops.block_memory(cache, block)]
    return [turned, torch.cat(memory)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("temperature", [None, Temperature(0.3, 2)])
@pytest.mark.parametrize(("heads", "size", "half"), [(1, 1, 1), (6, 13, 3), (5, 16, 8)])
def test_rotate_and_store_latent(
    heads: int,
    size: int,
    half: int,
    temperature: Temperature | None,
    interleaved: bool,
    dtype: torch.dtype,
) -> None:
    q = torch.randn(4, heads, size + 2 * half, device=DEVICE).to(dtype)
    latents = torch.randn(4, size + 2 * half, device=DEVICE).to(dtype)
    given = {
        "rotation": rotated(half, 4, interleaved=interleaved),
        "slot_mapping_T": torch.tensor([17, 0, 5, 4], device=DEVICE),
        "norm_C": torch.randn(size, device=DEVICE).to(dtype),
        "temperature": temperature,
        "positions_T": torch.tensor([0, 3, 4, 1001], device=DEVICE),
    }
    found = stored(OPS, (q, latents), **given)
    for mine, wanted in zip(found, stored(REF, (q, latents), **given), strict=True):
        assert torch.equal(mine.isnan(), wanted.isnan())
        near(mine.nan_to_num(), wanted.nan_to_num())
    # The last row by itself, into the same slot.
    cos, sin, _ = given["rotation"]  # type: ignore[misc]
    given["rotation"] = Rotation(cos[3:], sin[3:], interleaved)
    given["slot_mapping_T"] = torch.tensor([4], device=DEVICE)
    given["positions_T"] = torch.tensor([1001], device=DEVICE)
    turned, memory = stored(OPS, (q[3:], latents[3:]), **given)
    assert torch.equal(turned[0], found[0][3]) and torch.equal(memory[4], found[1][4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("half", [0, 1, 2])
def test_what_does_not_turn_stays(half: int, interleaved: bool, dtype: torch.dtype) -> None:
    """Behind what does, if anything does; and at a temperature it grows all the same."""
    q = torch.randn(3, 2, 11, device=DEVICE).to(dtype)
    latents = torch.randn(3, 11, device=DEVICE).to(dtype)
    given = {
        "rotation": rotated(half, 3, interleaved=interleaved),
        "slot_mapping_T": torch.tensor([2, 3, -1], device=DEVICE),
        "norm_C": torch.randn(4, device=DEVICE).to(dtype),
    }
    turned, memory = stored(OPS, (q, latents), **given)
    assert torch.equal(turned[..., :4], q[..., :4])
    behind = 4 + 2 * half
    assert torch.equal(turned[..., behind:], q[..., behind:])
    assert torch.equal(memory[2:4, 0, behind:], latents[:2, behind:])
    there = given | {"slot_mapping_T": torch.tensor([2, 3, 7], device=DEVICE)}
    wanted = stored(REF, (q, latents), **there)
    near(turned, wanted[0])
    near(memory[2:4], wanted[1][2:4])
    # Nobody's row is nowhere in the cache.
    assert memory[:2].isnan().all() and memory[4:].isnan().all()
    warm = {"temperature": Temperature(0.3, 2), "positions_T": torch.tensor([0, 5, 9]).to(DEVICE)}
    near(
        stored(OPS, (q, latents), **given, **warm)[0], stored(REF, (q, latents), **there, **warm)[0]
    )
    # The second row by itself, into the same slot.
    cos, sin, _ = given["rotation"]
    given["rotation"] = Rotation(cos[1:2], sin[1:2], interleaved)
    given["slot_mapping_T"] = torch.tensor([3], device=DEVICE)
    alone = stored(OPS, (q[1:2], latents[1:2]), **given)
    assert torch.equal(alone[0][0], turned[1]) and torch.equal(alone[1][3], memory[3])


def test_no_rows_at_all() -> None:
    none = {
        "rotation": rotated(3, 0, interleaved=False),
        "slot_mapping_T": torch.zeros(0, dtype=torch.int64, device=DEVICE),
        "norm_C": torch.ones(4, device=DEVICE),
    }
    q, latents = torch.zeros(0, 3, 10, device=DEVICE), torch.zeros(0, 10, device=DEVICE)
    turned, memory = stored(OPS, (q, latents), **none)
    assert turned.shape == (0, 3, 10) and memory.isnan().all()


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
def test_kernels_compile() -> None:
    slots = torch.zeros(2, dtype=torch.int64)
    with launches() as seen:
        for dtype, interleaved in ((torch.bfloat16, True), (torch.float32, False)):
            spec = latent_spec(512, 64, dtype)
            buffer = torch.zeros(OPS.cache_bytes_per_block(spec, 16), dtype=torch.uint8)
            cache = OPS.make_cache(buffer, spec, 16)
            x = torch.zeros(2, 4, 128 + 64, dtype=dtype)
            heads = OPS.prepare_heads(torch.zeros(4 * 512, 128, dtype=dtype), 4)
            q = OPS.head_products(x, heads)
            norm = torch.ones(512, dtype=dtype)
            rotation = rotated(32, 2, interleaved=interleaved)
            given = (q, q[:, 0].contiguous(), rotation, cache, slots, norm, 1e-6)
            OPS.rotate_and_store_latent(*given)
            warm = Temperature(0.1, 8192)
            OPS.rotate_and_store_latent(*given, temperature=warm, positions_T=slots)
            still = rotated(0, 2, interleaved=interleaved)
            unturned = (*given[:2], still, *given[3:])
            OPS.rotate_and_store_latent(*unturned, temperature=warm, positions_T=slots)
    assert_compile(seen, kernels)
