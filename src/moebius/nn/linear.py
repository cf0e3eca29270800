"""Linear layers and norms: parameters, and the backend's operation on them."""

import torch
from torch import Tensor, nn

from moebius.ops import Ops, PreparedLinear


class Linear(nn.Module):
    """y = x W^T + b with weight (O, I) and, where asked for, bias (O,)."""

    def __init__(
        self, ops: Ops, in_size: int, out_size: int, *, bias: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype)) if bias else None
        self._prepared: PreparedLinear | None = None

    def prepared(self) -> PreparedLinear:
        """The backend's handle, made at first use, and anew where a parameter is another since."""
        layer = (self.weight, self.bias)
        if self._prepared is None or not self._prepared.is_of(layer):
            self._prepared = self.ops.prepare_linear(layer)
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
