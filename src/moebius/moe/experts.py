"""A layer's experts: their parameters, and the backend's operations on them."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from moebius.moe.config import FeedForwardConfig
from moebius.nn.linear import WeightList
from moebius.ops import ExpertWeights, Ops, PreparedExperts


class Experts(nn.Module):
    """E experts: gate_proj.e, up_proj.e where gated (F, D), down_proj.e (D, F); dense is E = 1."""

    def __init__(
        self,
        ops: Ops,
        config: FeedForwardConfig,
        num_experts: int,
        hidden_size: int,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.activation = config.activation
        self._prepared: PreparedExperts | None = None

        def tensors(*shape: int, wanted: bool) -> list[nn.Parameter]:
            count = num_experts if wanted else 0
            return [nn.Parameter(torch.empty(*shape, dtype=dtype)) for _ in range(count)]

        self.gate_proj = WeightList(tensors(width, hidden_size, wanted=True))
        self.up_proj = WeightList(tensors(width, hidden_size, wanted=config.gated))
        self.down_proj = WeightList(tensors(hidden_size, width, wanted=True))
        self.gate_bias = nn.ParameterList(tensors(width, wanted=config.bias))
        self.up_bias = nn.ParameterList(tensors(width, wanted=config.bias and config.gated))
        self.down_bias = nn.ParameterList(tensors(hidden_size, wanted=config.bias))

    def weights(self) -> ExpertWeights:
        """The weights as they are now."""
        return ExpertWeights(
            self.gate_proj.held(),
            self.up_proj.held(),
            self.down_proj.held(),
            _tensors(self.gate_bias),
            _tensors(self.up_bias),
            _tensors(self.down_bias),
        )

    def forward(
        self, x_TD: Tensor, weights_TK: Tensor | None = None, expert_ids_TK: Tensor | None = None
    ) -> Tensor:
        weights = self.weights()
        if self._prepared is None or not self._prepared.is_of(weights):
            self._prepared = self.ops.prepare_experts(weights, self.activation, x_TD.dtype)
        return self.ops.experts(x_TD, weights_TK, expert_ids_TK, self._prepared)


def _tensors(parameters: nn.ParameterList) -> tuple[Tensor, ...]:
    """Its parameters; its own indexing costs a millisecond a hundred."""
    return tuple(parameters._parameters.values())  # type: ignore[arg-type]  # none of them is None
