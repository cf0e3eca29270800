"""The router: one linear layer and a choice of experts, in float32 (arXiv 2101.03961 section 2.4).

What training does to a routing and serving never does is in capacity.py and noise.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moebius.moe.capacity import kept
from moebius.moe.noise import jittered, noisy
from moebius.moe.share import WHOLE_BATCH
from moebius.moe.training import TrainingRouting
from moebius.nn.linear import Weighted
from moebius.ops import Ops, PreparedLinear, RouterTally
from moebius.ops.config import RouterConfig


class Routing(NamedTuple):
    """Where one layer sent its tokens.

    weights_TK      float32, what each chosen expert's output is multiplied by
    expert_ids_TK   int64, best first, ties to the lowest id
    logits_TE       float32, for the losses and for inspection
    kept_TK         in training: which choices there was room for; None where none is ever dropped
    """

    weights_TK: Tensor
    expert_ids_TK: Tensor
    logits_TE: Tensor
    kept_TK: Tensor | None = None


class Router(Weighted):
    """weight (E, D), and where there are such bias, selection_bias (E,), noise_weight (E, D).

    `limits` is what training does beside; nothing that serves sets it. `share` is of the batch
    whose tokens come. `tally` counts what was chosen, where it is set.
    """

    def __init__(self, ops: Ops, config: RouterConfig, width: int, dtype: torch.dtype) -> None:
        held = torch.float32 if config.float32 else dtype
        super().__init__(config.num_experts, width, held)
        self.ops = ops
        self.config = config
        self.limits: TrainingRouting | None = None
        self.share = WHOLE_BATCH
        self.tally: RouterTally | None = None
        self._prepared: PreparedLinear | None = None

        def where(wanted: bool, *shape: int, kind: torch.dtype = dtype) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(*shape, dtype=kind)) if wanted else None

        experts = config.num_experts
        self.bias = where(config.logit_bias, experts)
        self.selection_bias = where(config.selection_bias, experts, kind=torch.float32)
        self.expert_scale: Tensor | None = None
        self.noise_weight = where(config.learned_noise, experts, width)

    def logits(self, x_TD: Tensor) -> Tensor:
        """What experts are chosen by, (T, E) float32."""
        layer = (self.held(), self.bias)
        if self._prepared is None or not self._prepared.is_of(layer):
            self._prepared = self.ops.prepare_linear(layer, dtype=x_TD.dtype)
        return self.ops.logits(x_TD, self._prepared)

    def forward(self, x_TD: Tensor) -> Routing:
        if self.limits is not None and self.limits.jitter and self.training:
            x_TD = jittered(x_TD, self.limits.jitter, self.share)
        logits_TE = self.logits(x_TD)
        if self.noise_weight is not None and self.limits is not None and self.training:
            noise = self.ops.prepare_linear((self.noise_weight, None))
            logits_TE = noisy(logits_TE, self.ops.logits(x_TD, noise), self.share)
        chosen = (self.selection_bias, self.tally, self.expert_scale)
        weights_TK, ids_TK = self.ops.route(logits_TE, self.config, *chosen)
        kept_TK = None
        if self.limits is not None:
            kept_TK = kept(
                weights_TK.detach(),
                ids_TK,
                self.config.num_experts,
                self.limits,
                self.training,
                self.share,
            )
        return Routing(weights_TK, ids_TK, logits_TE, kept_TK)
