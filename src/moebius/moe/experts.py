"""A layer's experts: their parameters, and the backend's operations on them."""

from collections.abc import Container

import torch
from torch import Tensor, nn

from moebius.moe.config import FeedForwardConfig
from moebius.nn.linear import WeightList
from moebius.nn.spec import Place
from moebius.ops import ExpertWeights, PreparedExperts

# The numbers of experts that lie here, None for all; the others are holes, without parameters.
Held = Container[int] | None


class Experts(nn.Module):
    """E experts: gate_proj.e, up_proj.e where gated (F, D), down_proj.e (D, F); dense is E = 1."""

    def __init__(
        self, config: FeedForwardConfig, place: Place, count: int, width: int, held: Held = None
    ) -> None:
        super().__init__()
        self.ops = place.ops
        size = place.hidden_size
        self.activation = config.activation
        self.on_disk = False
        """Whether what they lie in need not be in memory before it is computed with."""
        self._prepared: PreparedExperts | None = None

        def weights(*shape: int, wanted: bool = True) -> WeightList:
            return WeightList(count if wanted else 0, *shape, dtype=place.dtype, held=held)

        self.gate_proj = weights(width, size)
        self.up_proj = weights(width, size, wanted=config.gated)
        self.down_proj = weights(size, width)
        self.gate_bias = weights(width, wanted=config.bias)
        self.up_bias = weights(width, wanted=config.bias and config.gated)
        self.down_bias = weights(size, wanted=config.bias)

    def weights(self) -> ExpertWeights:
        """The weights as they are now."""
        return ExpertWeights(
            self.gate_proj.held(),
            self.up_proj.held(),
            self.down_proj.held(),
            self.gate_bias.vectors(),
            self.up_bias.vectors(),
            self.down_bias.vectors(),
        )

    def forward(
        self, x_TD: Tensor, weights_TK: Tensor | None = None, expert_ids_TK: Tensor | None = None
    ) -> Tensor:
        return self.ops.experts(x_TD, weights_TK, expert_ids_TK, self.prepared(x_TD.dtype))

    def rows(self, x_RD: Tensor, expert_ids_RK: Tensor) -> Tensor:
        """Each choice's own output (R, K, D); an id of E stands for none."""
        return self.ops.expert_rows(x_RD, expert_ids_RK, self.prepared(x_RD.dtype))

    def prepared(self, dtype: torch.dtype) -> PreparedExperts:
        """The backend's handle, which stays the same object where the backend can do so."""
        weights = self.weights()
        if self._prepared is None or not self._prepared.is_of(weights):
            made = self.ops.prepare_experts(weights, self.activation, dtype, on_disk=self.on_disk)
            if self._prepared is None or not self._prepared.become(made):
                self._prepared = made
        return self._prepared
