"""Linear layers and norms: parameters, and the backend's operation on them."""

from typing import Any

import torch
from torch import Tensor, nn

from moebius.ops import Ops


class Linear(nn.Module):
    """y = x W^T + b with weight (O, I) and, where asked for, bias (O,)."""

    def __init__(
        self, ops: Ops, in_size: int, out_size: int, *, bias: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype)) if bias else None
        self._prepared: Any = None

    def prepared(self) -> Any:
        """The backend's handle, made at first use: parameters are in their place by then."""
        if self._prepared is None:
            self._prepared = self.ops.prepare_linear((self.weight, self.bias))
        return self._prepared

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.ops.linear(x_TI, self.prepared())

    def logits(self, x_TI: Tensor) -> Tensor:
        """In float32, never rounded."""
        return self.ops.logits(x_TI, self.prepared())


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467)."""

    def __init__(self, ops: Ops, size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.ops = ops
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, update: Tensor | None, multiplier: float) -> tuple[Tensor, Tensor]:
        """The residual stream x + multiplier * update, and its norm; without an update, x and its
        norm."""
        if update is None:
            return x, self.ops.rms_norm(x, self.weight, self.eps)
        return self.ops.add_rms_norm(x, update, multiplier, self.weight, self.eps)
