"""The feed-forward part of a layer: router, dispatch, experts, and the expert that is always on."""

from collections.abc import Container

import torch
from torch import Tensor, nn

from moebius.moe.config import FeedForwardConfig
from moebius.moe.dispatch import Dispatcher
from moebius.moe.experts import Experts
from moebius.moe.router import Router, Routing
from moebius.nn.linear import Linear
from moebius.ops import Ops


class FeedForward(nn.Module):
    """Dense (no router, one expert) or a mixture of experts, by its configuration.

    held: the experts that lie at this rank; None for all of them.
    """

    def __init__(
        self,
        config: FeedForwardConfig,
        hidden_size: int,
        ops: Ops,
        dispatch: Dispatcher,
        dtype: torch.dtype,
        held: Container[int] | None = None,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.dispatch = dispatch
        router = config.router
        self.router = None if router is None else Router(ops, router, hidden_size, dtype)
        count = 1 if router is None else router.num_experts
        self.experts = Experts(ops, config, count, hidden_size, config.width, dtype, held)
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
