"""Fixtures of the kernels' tests: every instruction set, both dtypes, the same random numbers, no
gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moebius.ops.cpu import CpuOps
from ops.levels import LEVELS, ROUNDOFF, level


@pytest.fixture(scope="module", params=LEVELS)
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return level(request.param, threads=2)


@pytest.fixture(params=list(ROUNDOFF), ids=str)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
