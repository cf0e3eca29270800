"""Linear layers and norms: parameters, and the backend's operation on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebius.ops import Ops


class Linear(nn.Module):
    """y = x W^T + b with weight (O, I) and, where asked for, bias (O,)."""

    def __init__(self, ops: Ops, in_size: int, out_size: int, *, bias: bool = False, dtype: torch.dtype) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype)) if bias else None

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.ops.linear(x_TI, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, ops: Ops, size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.ops, self.eps = ops, eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)
