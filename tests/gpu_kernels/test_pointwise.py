"""Norms, rotation and residuals in Triton beside plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Rotation
from moebius.ops.triton import TritonOps
from moebius.ops.triton.kernels import pointwise as kernels

OPS = TritonOps()
REF = ReferenceOps()
DTYPES = [torch.bfloat16, torch.float32]


def near(found: Tensor, wanted: Tensor) -> None:
    """Equal but for the order of a row's sum, which may round a value to its neighbour."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    tolerance = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}[found.dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("less_mean", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 31), (5, 64), (2, 3, 100)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, less_mean: bool) -> None:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    for weight in (torch.randn(shape[-1], device=DEVICE), torch.randn(shape[-1]).to(DEVICE, dtype)):
        found = OPS.rms_norm(x, weight, 1e-6, less_mean=less_mean)
        near(found, REF.rms_norm(x, weight, 1e-6, less_mean=less_mean))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiplier", [1.0, 0.22])
@pytest.mark.parametrize("scaled", [False, True])
def test_add_rms_norm(dtype: torch.dtype, multiplier: float, scaled: bool) -> None:
    x, update = torch.randn(2, 7, 33, device=DEVICE).to(dtype)
    weight = torch.randn(33, device=DEVICE).to(dtype)
    scale = torch.tensor([0.7], device=DEVICE) if scaled else None
    found = OPS.add_rms_norm(x, update, multiplier, weight, 1e-5, scale_1=scale)
    wanted = REF.add_rms_norm(x, update, multiplier, weight, 1e-5, scale_1=scale)
    assert torch.equal(found[0], wanted[0])
    near(found[1], wanted[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_part(dtype: torch.dtype) -> None:
    x = torch.randn(5, 40, device=DEVICE).to(dtype)
    for weight in (torch.randn(12, device=DEVICE), torch.randn(12).to(DEVICE, dtype)):
        for start in (0, 9, 28):
            wanted = REF.rms_norm_part(x.clone(), start, weight, 1e-6)
            near(OPS.rms_norm_part(x.clone(), start, weight, 1e-6), wanted)
    assert OPS.rms_norm_part(x[:0], 3, weight, 1e-6).shape == (0, 40)
    with pytest.raises(ValueError, match="12 columns from 29 are not all of 40"):
        OPS.rms_norm_part(x, 29, weight, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip(dtype: torch.dtype) -> None:
    x = torch.randn(3, 700, device=DEVICE).to(dtype)
    x[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    found = OPS.clip(x, 0.3)
    assert torch.equal(found.nan_to_num(), REF.clip(x, 0.3).nan_to_num())
    assert found.isnan().sum() == 1 and found[0, 0].isnan()
    assert OPS.clip(x[:0], 0.3).shape == (0, 700)


def test_softcap() -> None:
    x = torch.cat([torch.randn(999) * 10.0**power for power in range(-6, 5)]).view(3, -1).to(DEVICE)
    x[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    for cap in (1.0, 30.0):
        wanted = REF.softcap(x.double(), cap).float()
        torch.testing.assert_close(OPS.softcap(x, cap), wanted, rtol=1e-6, atol=0, equal_nan=True)
    assert OPS.softcap(x[:0], 30.0).shape == (0, x.shape[1])


def test_divide() -> None:
    x = torch.randn(7, 333, device=DEVICE)
    assert torch.equal(OPS.divide(x, 0.7), REF.divide(x, 0.7))
    assert torch.equal(OPS.divide(x[:1, :1], 3.0), REF.divide(x[:1, :1], 3.0))


def test_rotation() -> None:
    """Beside the exact cosines and sines of the angle that is rounded to float32."""
    positions = torch.tensor([0, 1, 77, 131_071, 1_000_003], device=DEVICE)
    inverse = 10_000.0 ** -(torch.arange(12, device=DEVICE) / 12)
    angles = (positions.float()[:, None] * inverse).double()
    cos, sin = OPS.rotation(positions, inverse, 1.25)
    torch.testing.assert_close(cos, (angles.cos() * 1.25).float(), rtol=0, atol=3e-7)
    torch.testing.assert_close(sin, (angles.sin() * 1.25).float(), rtol=0, atol=3e-7)
    assert OPS.rotation(positions[:0], inverse, 1.0)[0].shape == (0, 12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "half", "size"), [(1, 1, 2), (5, 6, 12), (3, 8, 21), (2, 0, 5)])
def test_rotary(heads: int, half: int, size: int, interleaved: bool, dtype: torch.dtype) -> None:
    angles = torch.randn(4, half, device=DEVICE)
    rotation = Rotation(angles.cos(), angles.sin(), interleaved)
    # Heads of rows that hold something else too.
    x = torch.randn(4, heads, size + 3, device=DEVICE).to(dtype)[..., 3:]
    near(OPS.rotary(x, rotation), REF.rotary(x, rotation))
    near(OPS.rotary(x.mT.contiguous().mT, rotation), REF.rotary(x, rotation))
    none = Rotation(angles[:0], angles[:0], interleaved)
    assert OPS.rotary(x[:0], none).shape == (0, heads, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 1031)])
def test_add_gated(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, b = torch.randn(2, *shape, device=DEVICE).to(dtype)
    gate = torch.randn(shape[0], 1, device=DEVICE)
    assert torch.equal(OPS.add_gated(a, b), REF.add_gated(a, b))
    near(OPS.add_gated(a, b, gate), REF.add_gated(a, b, gate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_itself_in_any_company(dtype: torch.dtype) -> None:
    """Promise P1, by value: the interpreter has no bits of a GPU."""
    x, other = torch.randn(2, 6, 40, device=DEVICE).to(dtype)
    weight = torch.randn(40, device=DEVICE)
    gate = torch.randn(6, 1, device=DEVICE)
    angles = torch.randn(6, 4, device=DEVICE)

    def results(rows: slice) -> list[Tensor]:
        x_TD, other_TD = x[rows], other[rows]
        turned = Rotation(angles[rows].cos(), angles[rows].sin())
        return [
            OPS.rms_norm(x_TD, weight, 1e-6),
            *OPS.add_rms_norm(x_TD, other_TD, 0.5, weight, 1e-6),
            OPS.rms_norm_part(x_TD.clone(), 3, weight[:30], 1e-6),
            OPS.softcap(x_TD.float(), 3.0),
            OPS.rotary(x_TD.view(-1, 4, 10), turned),
            OPS.add_gated(x_TD, other_TD, gate[rows]),
        ]

    for together, alone in zip(results(slice(6)), results(slice(2, 3)), strict=True):
        assert torch.equal(together[2:3], alone)


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
def test_kernels_compile() -> None:
    weight = torch.ones(4096)
    with launches() as seen:
        x = torch.zeros(2, 4096, dtype=torch.bfloat16)
        OPS.rms_norm(x, weight.bfloat16(), 1e-6, less_mean=True)
        OPS.rms_norm_part(x, 128, weight[:1024], 1e-6)
        OPS.add_rms_norm(x, x, 0.5, weight.bfloat16(), 1e-5, scale_1=weight[:1])
        OPS.add_rms_norm(x.float(), x.float(), 1.0, weight, 1e-5)
        OPS.clip(x, 8.0)
        OPS.add_gated(x, x)
        OPS.add_gated(x, x, weight[:2, None])
        x_THN = x.view(2, 32, 128)
        for half in (64, 24):
            angles = torch.zeros(2, half)
            OPS.rotary(x_THN, Rotation(angles, angles, interleaved=half == 24))
        logits = torch.zeros(2, 32_000)
        OPS.softcap(logits, 30.0)
        OPS.divide(logits[:1, :1], 3.0)
        OPS.rotation(torch.zeros(2, dtype=torch.int64), weight[:64], 1.0)
    assert_compile(seen, kernels)
