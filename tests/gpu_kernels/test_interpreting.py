"""The interpreter in a hurry is the interpreter: the same numbers, and integers that overflow are
found."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.language import core

from gpu_kernels.conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU interprets nothing")


@triton.jit
def grow(out, x, by, count: tl.constexpr, wide: tl.constexpr):
    at = tl.arange(0, count)
    found = tl.load(x + at)
    if wide:
        found = found.to(tl.int64)
    tl.store(out + at, found * 2 + by)


@pytest.mark.parametrize(("start", "by"), [(2**30 - 1, 1), (-(2**30), 0), (5, -7)])
def test_what_fits_is_what_it_is(start: int, by: int) -> None:
    x = torch.full((4,), start, dtype=torch.int32)
    out = torch.empty_like(x)
    grow[(1,)](out, x, by, 4, False)
    assert out.tolist() == [2 * start + by] * 4


@pytest.mark.parametrize(("start", "by"), [(2**30, 0), (2**30 - 1, 2), (-(2**30) - 1, 0)])
def test_integers_that_overflow_are_found(start: int, by: int) -> None:
    x = torch.tensor([3, 1, start, 2], dtype=torch.int32)
    with pytest.raises(Exception, match="int32 overflow detected for operation"):
        grow[(1,)](torch.empty_like(x), x, by, 4, False)
    out = torch.empty(4, dtype=torch.int64)
    grow[(1,)](out, x, by, 4, True)
    assert out[2] == 2 * start + by


def test_a_type_is_one_object_and_says_what_it_is() -> None:
    one = core.block_type(core.float32, [core.constexpr(4), 8])
    assert one is core.block_type(core.float32, [4, 8])
    assert one is not core.block_type(core.int32, [4, 8])
    assert one.shape.values == [4, 8] and one.numel == 32 and one.scalar is core.float32
    tensor = core.tensor(None, one)
    assert [size.value for size in tensor.shape] == [4, 8] and tensor.numel.value == 32
