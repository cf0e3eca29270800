"""Kernels in Triton run on a GPU where there is one, and else in Triton's interpreter, which
tests/conftest.py asks for before anything imports triton."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _numbers_as_on_a_gpu() -> Iterator[None]:
    """The interpreter computes with NumPy, which would warn of infinities; a GPU says nothing."""
    with np.errstate(all="ignore"):
        yield
