"""Kernels in Triton run on a GPU where there is one, and else in Triton's interpreter, which
tests/conftest.py asks for before anything imports triton."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
