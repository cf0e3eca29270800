"""What the tests of the compiled kernels share: the instruction sets to test, and how close is
close enough."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moebius import _cpu
from moebius.ops.cpu import CpuOps
from moebius.ops.sampling import SamplerOps

LEVELS: list[str] = _cpu.available()
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def level(isa: str, threads: int) -> CpuOps:
    """The kernels of one instruction set; one pool of threads for all tests."""
    return CpuOps(threads, isa)


def assert_within(out: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Elementwise |out - exact| <= bound."""
    assert out.shape == exact.shape
    error = (out.double() - exact.double()).abs()
    assert (error <= bound).all(), f"off by {(error / bound).max().item():.3g} of the bound"


def bits(x: Tensor) -> Tensor:
    """A tensor's bits as integers: minus zero is not zero, and a NaN equals itself."""
    return x.contiguous().view(_BITS[x.element_size()])


def logits_seen(ops: SamplerOps, logits_LV: Tensor) -> Tensor:
    """The logits that the operations draw from, which need not lie in the tensor: within `shaped`
    they may be bounded as they are read."""
    rows, vocab = logits_LV.shape
    best = ops.log_softmax_top_k(logits_LV, range(rows), [vocab] * rows)
    seen = torch.empty_like(logits_LV)
    return seen.scatter_(1, best.ids.view(rows, vocab), best.values.view(rows, vocab))
