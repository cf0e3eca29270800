"""The feed-forward part of a layer: router, dispatch, experts, and the expert that is always on."""

from typing import Protocol

import torch
from torch import Tensor, nn

from moebius.moe.config import FeedForwardConfig
from moebius.moe.router import Router, Routing
from moebius.nn.linear import Linear, WeightList
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


class Dispatcher(Protocol):
    """Brings every (token, expert) pair to the rank that holds the expert, and the weighted sum
    back: (T, D). Nothing else knows about ranks."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor: ...


class LocalDispatcher:
    """All experts are here."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        ids_TK = routing.expert_ids_TK
        if routing.kept_TK is not None:
            # The number after the last expert's stands for none.
            ids_TK = ids_TK.masked_fill(~routing.kept_TK, routing.logits_TE.shape[1])
        out_TD: Tensor = experts(x_TD, routing.weights_TK, ids_TK)
        return out_TD


class FeedForward(nn.Module):
    """Dense (no router, one expert) or a mixture of experts, by its configuration."""

    def __init__(
        self,
        config: FeedForwardConfig,
        hidden_size: int,
        ops: Ops,
        dispatch: Dispatcher,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.dispatch = dispatch
        router = config.router
        self.router = None if router is None else Router(ops, router, hidden_size, dtype)
        count = 1 if router is None else router.num_experts
        self.experts = Experts(ops, config, count, hidden_size, config.width, dtype)
        self.shared: Experts | None = None
        self.shared_gate: Linear | None = None
        if config.shared_width:
            self.shared = Experts(ops, config, 1, hidden_size, config.shared_width, dtype)
            if config.shared_gate:
                self.shared_gate = Linear(ops, hidden_size, 1, dtype=dtype)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routing | None]:
        """The layer's output (T, D), and where its tokens went, None for a dense one."""
        if self.router is None:
            return self.experts(x_TD), None
        routing = self.router(x_TD)
        out_TD = self.dispatch(x_TD, routing, self.experts)
        if self.shared is not None:
            gate = self.shared_gate
            gate_T1 = None if gate is None else gate.logits(x_TD)
            out_TD = self.ops.add_gated(out_TD, self.shared(x_TD), gate_T1)
        return out_TD, routing
