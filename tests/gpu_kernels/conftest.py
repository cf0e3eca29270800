"""Kernels in Triton run on a GPU where there is one, and else in Triton's interpreter, which
tests/conftest.py asks for before anything imports triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from gpu_kernels.interpreting import hurrying, sum_in_order

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _numbers_as_on_a_gpu() -> Iterator[None]:
    """The interpreter computes with NumPy, which would warn of infinities; a GPU says nothing."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _the_interpreter_hurries() -> Iterator[None]:
    if DEVICE == "cuda":
        yield
        return
    with hurrying():
        yield


@pytest.fixture
def sums_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products as a GPU's: what a row of a tile gives does not depend on its
    place in it, as in NumPy's."""
    if DEVICE != "cuda":
        sum_in_order(monkeypatch)


@pytest.fixture
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@contextmanager
def counted() -> Iterator[list[str]]:
    """The kernels that are launched within the context, by name."""
    seen: list[str] = []
    from moebius.ops.triton.kernels import pointwise

    kind = type(pointwise.clip)
    run = kind.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "run", noted)
        yield seen
