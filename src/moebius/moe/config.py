"""A layer's feed-forward part as data."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moebius.errors import ConfigError, require_word
from moebius.nn.spec import Parameter, Parameters
from moebius.ops import Feature, Operation, Use
from moebius.ops.config import Activation, ActivationWord, ClampedSwiGLU, RouterConfig


@dataclass(frozen=True, slots=True)
class FeedForwardConfig:
    """One layer's feed-forward part: `router` None means dense, which is the case of one expert.

    width is an expert's hidden size F; shared_width the always-on expert's (0: none), gated by
    sigmoid(w·x) when shared_gate is set (Qwen2-MoE). Not gated, an expert is down(act(gate x)).
    latent: how many values a router's experts see of a token, where fewer than D (Nemotron 3).
    """

    width: int
    router: RouterConfig | None = None
    activation: Activation = "silu"
    bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    gated: bool = True
    latent: int | None = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"the feed-forward width is {self.width}; it must be at least 1")
        if not isinstance(self.activation, ClampedSwiGLU):
            require_word("the feed-forward's activation", self.activation, ActivationWord)
        elif not self.gated:
            raise ConfigError("ClampedSwiGLU joins two matrices; these experts have only a gate")
        if self.router is None and (self.shared_width or self.latent):
            raise ConfigError(
                "shared_width and latent go with a router's experts; this feed-forward has none"
            )
        if self.shared_gate and not self.shared_width:
            raise ConfigError("shared_gate gates a shared expert; give shared_width")

    def parameters(self, hidden_size: int) -> Parameters:
        """Those of FeedForward (moebius.moe.layer); a dense one's have the role of no expert."""
        if self.router is None:
            yield from self._expert("experts.", "", self.width, hidden_size)
            return
        count = self.router.num_experts
        wide = self.router.float32
        yield Parameter("router.weight", (count, hidden_size), float32=wide)
        if self.router.logit_bias:
            yield Parameter("router.bias", (count,))
        if self.router.selection_bias:
            yield Parameter("router.selection_bias", (count,), float32=True)
        if self.router.learned_noise:
            yield Parameter("router.noise_weight", (count, hidden_size))
        inner = self.latent or hidden_size
        for e in range(count):
            yield from self._expert("experts.", "experts.", self.width, inner, e, count)
        if self.latent:
            yield Parameter("dispatch.down.weight", (self.latent, hidden_size))
            yield Parameter("dispatch.up.weight", (hidden_size, self.latent))
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
        e = number or 0
        for which in ("gate", "up", "down") if self.gated else ("gate", "down"):
            shape = (hidden, width) if which == "down" else (width, hidden)
            yield Parameter(f"{at}{which}_proj.{e}", shape, f"{role}{which}_proj", number, of)
            if self.bias:
                bias = f"{which}_bias"
                yield Parameter(f"{at}{bias}.{e}", shape[:1], role + bias, number, of)
