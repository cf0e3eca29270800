"""Norms, rotation and residuals in Triton beside plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moebius.ops.reference import ReferenceOps
from moebius.ops.triton import TritonOps
from moebius.ops.triton.kernels import pointwise as kernels
from ops.triton.compiling import assert_compile, launches
from ops.triton.conftest import DEVICE

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


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
def test_kernels_compile() -> None:
    weight = torch.ones(4096)
    with launches() as seen:
        for dtype in DTYPES:
            x = torch.zeros(2, 4096, dtype=dtype)
            OPS.rms_norm(x, weight, 1e-6)
            OPS.rms_norm(x, weight.to(dtype), 1e-6, less_mean=True)
            OPS.add_rms_norm(x, x, 1.0, weight, 1e-5)
            OPS.add_rms_norm(x, x, 0.5, weight.to(dtype), 1e-5, scale_1=weight[:1])
    assert_compile(seen, kernels)
