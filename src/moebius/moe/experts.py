"""The grouped feed-forward: parameters of E parallel experts, one tensor an expert and projection."""

from typing import Any

import torch
from torch import Tensor, nn

from moebius.config import FeedForwardConfig
from moebius.ops import ExpertWeights, Ops


class Experts(nn.Module):
    """E experts of width F: gate_proj.e and, where gated, up_proj.e (F, D), down_proj.e (D, F); a dense feed-forward
    is E = 1."""

    def __init__(
        self, ops: Ops, config: FeedForwardConfig, num_experts: int, hidden_size: int, width: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.ops, self.activation = ops, config.activation
        self._prepared: Any = None

        def tensors(*shape: int, wanted: bool = True) -> nn.ParameterList:
            return nn.ParameterList(
                nn.Parameter(torch.empty(*shape, dtype=dtype)) for _ in range(num_experts if wanted else 0)
            )

        self.gate_proj = tensors(width, hidden_size)
        self.up_proj = tensors(width, hidden_size, wanted=config.gated)
        self.down_proj = tensors(hidden_size, width)
        self.gate_bias = tensors(width, wanted=config.bias)
        self.up_bias = tensors(width, wanted=config.bias and config.gated)
        self.down_bias = tensors(hidden_size, wanted=config.bias)

    def weights(self) -> ExpertWeights:
        """The tensors as they are now; ParameterList's own indexing costs a millisecond for a hundred experts."""
        lists = (self.gate_proj, self.up_proj, self.down_proj, self.gate_bias, self.up_bias, self.down_bias)
        return ExpertWeights(*(tuple(each._parameters.values()) for each in lists))  # type: ignore[arg-type]

    def forward(self, x_TD: Tensor, weights_TK: Tensor | None = None, expert_ids_TK: Tensor | None = None) -> Tensor:
        if self._prepared is None:
            self._prepared = self.ops.prepare_experts(self.weights(), self.activation)
        return self.ops.experts(x_TD, weights_TK, expert_ids_TK, self._prepared)
