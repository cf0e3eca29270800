"""The feed-forward part of a layer: router, dispatch, experts, and the expert that is always on."""

from torch import Tensor, nn

from moebius.moe.config import FeedForwardConfig
from moebius.moe.dispatch import Dispatcher
from moebius.moe.experts import Experts, Held
from moebius.moe.router import Router, Routing
from moebius.nn.linear import Linear
from moebius.nn.spec import Place


class FeedForward(nn.Module):
    """Dense (no router, one expert) or a mixture of experts, by its configuration."""

    def __init__(
        self, config: FeedForwardConfig, place: Place, dispatch: Dispatcher, held: Held = None
    ) -> None:
        super().__init__()
        self.ops = place.ops
        self.dispatch = dispatch
        size = place.hidden_size
        router = config.router
        self.router = None if router is None else Router(place.ops, router, size, place.dtype)
        count = 1 if router is None else router.num_experts
        self.experts = Experts(config, place, count, config.width, held)
        self.shared: Experts | None = None
        self.shared_gate: Linear | None = None
        if config.shared_width:
            self.shared = Experts(config, place, 1, config.shared_width)
            if config.shared_gate:
                self.shared_gate = Linear(place.ops, size, 1, dtype=place.dtype)

    def forward(self, x_TD: Tensor, _: Tensor | None = None) -> tuple[Tensor, Routing | None]:
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
