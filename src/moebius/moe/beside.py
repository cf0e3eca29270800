"""Gemma 4's feed-forward part: a dense one and experts side by side, each between norms of its own,
and a router that sees the residual stream as directions.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebius.errors import ConfigError
from moebius.moe.config import FeedForwardConfig
from moebius.moe.dispatch import Dispatcher
from moebius.moe.experts import Held
from moebius.moe.layer import FeedForward
from moebius.moe.router import Router, Routing
from moebius.nn.linear import RMSNorm
from moebius.nn.spec import Parameter, Parameters, Place
from moebius.ops import Operation, Use

_NORMS = ("shared_output_norm", "experts_norm", "experts_output_norm")


@dataclass(frozen=True, slots=True)
class DenseBeside(FeedForwardConfig):
    """Experts, and beside them a dense part, which is the shared expert of other models.

    What either gives is normed before they are added, and experts read the stream behind a norm
    that the dense part does not share.
    """

    def __post_init__(self) -> None:
        # Plain super() knows a class before it has slots, and not this one.
        FeedForwardConfig.__post_init__(self)
        if self.router is None or not self.shared_width or self.shared_gate:
            raise ConfigError("a dense part stands beside experts: give a router, shared_width")

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of FeedForwardBeside."""
        assert self.router is not None
        yield from FeedForwardConfig.parameters(self, hidden_size)
        yield Parameter("router.norm.weight", (hidden_size,))
        yield Parameter("router.expert_scale", (self.router.num_experts,), float32=True)
        for name in _NORMS:
            yield Parameter(f"{name}.weight", (hidden_size,), norm=True)

    def uses(self, dtype: torch.dtype) -> Iterator[Use]:
        """What serving it asks of a backend."""
        yield from FeedForwardConfig.uses(self, dtype)
        yield Use(Operation.DIVIDE, torch.float32)


class DirectionRouter(Router):
    """A router of rows of length 1, times a learned scale of each value: norm.weight (D,).

    expert_scale (E,) multiplies an expert's weights, whichever others are chosen.
    """

    def __init__(self, config: FeedForwardConfig, place: Place) -> None:
        assert config.router is not None
        super().__init__(place.ops, config.router, place.hidden_size, place.dtype)
        self.norm = RMSNorm(place.ops, place.hidden_size, place.norm_eps, dtype=place.dtype)
        count = config.router.num_experts
        self.expert_scale = nn.Parameter(torch.empty(count, dtype=torch.float32))
        self._length = math.sqrt(place.hidden_size)

    def logits(self, x_TD: Tensor) -> Tensor:
        """The norm's rows are sqrt(D) long."""
        return self.ops.divide(super().logits(self.norm(x_TD)), self._length)


class FeedForwardBeside(FeedForward):
    """The module of DenseBeside at one layer."""

    def __init__(
        self, config: FeedForwardConfig, place: Place, dispatch: Dispatcher, held: Held = None
    ) -> None:
        super().__init__(config, place, dispatch, held)
        self.router: DirectionRouter = DirectionRouter(config, place)

        def norm() -> RMSNorm:
            return RMSNorm(place.ops, place.hidden_size, place.norm_eps, dtype=place.norm_dtype)

        self.shared_output_norm = norm()
        self.experts_norm = norm()
        self.experts_output_norm = norm()

    def forward(
        self, x_TD: Tensor, stream_TD: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """The layer's output (T, D), and where its tokens went. x is what the dense part reads."""
        assert self.shared is not None and stream_TD is not None
        routing = self.router(stream_TD)
        sparse_TD = self.dispatch(self.experts_norm(stream_TD), routing, self.experts)
        dense_TD = self.shared_output_norm(self.shared(x_TD))
        return self.ops.add_gated(dense_TD, self.experts_output_norm(sparse_TD)), routing


def feed_forward(
    config: FeedForwardConfig, place: Place, dispatch: Dispatcher, held: Held = None
) -> FeedForward:
    """The module of a configuration at one layer."""
    kind = FeedForwardBeside if isinstance(config, DenseBeside) else FeedForward
    return kind(config, place, dispatch, held)
