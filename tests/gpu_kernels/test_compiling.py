"""The helper that compiles kernels without a GPU finds what the interpreter lets through."""

from __future__ import annotations

import sys

import pytest
import torch
import triton
import triton.language as tl

from gpu_kernels.compiling import SHARED_BYTES, assert_compile, launches
from gpu_kernels.conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")


@triton.jit
def good(x, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0)
    tl.store(out + at, value + 1, mask=at < size)


@triton.jit
def leaves_early(x, out, size):  # type: ignore[no-untyped-def]
    for at in range(size):
        if tl.load(x + at) > 0:
            break
        tl.store(out + at, 1.0)


def test_it_tells_what_compiles_from_what_does_not() -> None:
    x = torch.zeros(8, dtype=torch.bfloat16)
    out = torch.zeros(8)
    with launches() as seen:
        good[(1,)](x, out, 8, BLOCK=8)
        good[(1,)](x, out, 8, BLOCK=8)
    assert len(seen) == 1 and not out.any()
    with pytest.raises(AssertionError, match=r"not launched.*leaves_early"):
        assert_compile(seen, sys.modules[__name__])
    with launches() as seen:
        good[(1,)](x, out, 8, BLOCK=8)
        leaves_early[(1,)](x, out, 8)
    with pytest.raises(AssertionError, match="node type: Break") as caught:
        assert_compile(seen, sys.modules[__name__])
    for capability in SHARED_BYTES:
        assert f"leaves_early on sm_{capability}" in str(caught.value)
    assert "good on" not in str(caught.value)
