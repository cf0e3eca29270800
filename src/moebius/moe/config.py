"""A layer's feed-forward part as data, and what routing does in training only."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from moebius.errors import ConfigError, require, require_word
from moebius.nn.spec import Parameter, Parameters
from moebius.ops import Feature, Operation, Use
from moebius.ops.config import Activation, RouterConfig


@dataclass(frozen=True, slots=True)
class FeedForwardConfig:
    """One layer's feed-forward part: `router` None means dense, which is the case of one expert.

    width is an expert's hidden size F; shared_width the always-on expert's (0: none), gated by
    sigmoid(w·x) when shared_gate is set (Qwen2-MoE). An expert that is not gated has two matrices:
    down(act(gate x)).
    """

    width: int
    router: RouterConfig | None = None
    activation: Activation = "silu"
    bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    gated: bool = True

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"the feed-forward width is {self.width}; it must be at least 1")
        require_word("the feed-forward's activation", self.activation, Activation)
        if self.router is None and self.shared_width:
            raise ConfigError(
                "a shared expert (shared_width) stands beside those of a router; this feed-forward "
                "has none"
            )
        if self.shared_gate and not self.shared_width:
            raise ConfigError("shared_gate gates a shared expert; give shared_width")

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of moebius.moe.layer.FeedForward, in a model of this width. A dense one's have the
        role of no expert: `gate_proj`."""
        if self.router is None:
            yield from self._expert("experts.", "", self.width, hidden_size)
            return
        count = self.router.num_experts
        yield Parameter("router.weight", (count, hidden_size))
        if self.router.logit_bias:
            yield Parameter("router.bias", (count,))
        if self.router.selection_bias:
            yield Parameter("router.selection_bias", (count,), float32=True)
        if self.router.learned_noise:
            yield Parameter("router.noise_weight", (count, hidden_size))
        for e in range(count):
            yield from self._expert("experts.", "experts.", self.width, hidden_size, e, count)
        if self.shared_width:
            yield from self._expert("shared.", "shared.", self.shared_width, hidden_size)
            if self.shared_gate:
                yield Parameter("shared_gate.weight", (1, hidden_size))

    def uses(self, dtype: torch.dtype) -> Iterator[Use]:
        """What serving it asks of a backend."""
        features = frozenset() if self.gated else frozenset({Feature.TWO_MATRICES})
        yield Use(Operation.EXPERTS, dtype, features)
        if self.router is not None:
            yield Use(Operation.LOGITS, dtype)
            yield Use(Operation.ROUTE, dtype)
        if self.shared_width:
            yield Use(Operation.ADD_GATED, dtype)

    def _expert(
        self, at: str, role: str, width: int, hidden: int, number: int | None = None, of: int = 1
    ) -> Parameters:
        """The matrices of one expert, and as many biases where it has them."""
        into = (width, hidden)
        wanted = {"gate": into, "up": into, "down": into[::-1]}
        for which, shape in wanted.items():
            if which == "up" and not self.gated:
                continue
            e = 0 if number is None else number
            yield Parameter(f"{at}{which}_proj.{e}", shape, f"{role}{which}_proj", number, of)
            if self.bias:
                bias = f"{which}_bias"
                yield Parameter(f"{at}{bias}.{e}", shape[:1], role + bias, number, of)


@dataclass(frozen=True, slots=True)
class TrainingRouting:
    """What is done to a routing in training only. A model is served without any of it: a token's
    answer must not depend on the tokens beside it, which is what a capacity makes it do.

    dropless          no capacity: every expert takes whatever comes
    capacity_factor   an expert takes capacity_factor * K / E of a micro-batch's tokens, at least
                      min_capacity. GShard counts so; Mesh and ST-MoE leave out K (their 1.25 at
                      top-2 is 0.625 here)
    eval_capacity_factor   the same for measuring held-out text, beside measuring it dropless
    second_policy     of a token's choices after the first: `all` stay, those whose share of the
                      token's weights exceeds second_threshold (`threshold`), or each with
                      probability share / second_threshold (`random`; GShard's threshold is 0.5,
                      ST-MoE's 0.2, arXiv 2202.08906 appendix G)
    jitter            eps: the router's input is multiplied by uniform(1 - eps, 1 + eps), as Mesh
                      TensorFlow does
    """

    dropless: bool = True
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    second_policy: Literal["all", "threshold", "random"] = "all"
    second_threshold: float = 0.2
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf,
                f"routing.{name} is {value}; it must be positive",
            )
            require(
                value is None or not self.dropless,
                f"routing.{name} is {value}, but a dropless router has no capacity; set "
                "routing.dropless = false",
            )
        require(
            self.dropless or self.capacity_factor is not None,
            "routing.dropless is false; give capacity_factor",
        )
        require(
            self.min_capacity >= 0,
            f"routing.min_capacity is {self.min_capacity}; it must not be negative",
        )
        require(
            0 < self.second_threshold < 1,
            f"routing.second_threshold is {self.second_threshold}; use 0 < it < 1",
        )
        require(
            0 <= self.jitter < 1,
            f"routing.jitter is {self.jitter}; it must be at least 0 and less than 1",
        )
