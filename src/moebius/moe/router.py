"""The router: one linear layer and a choice of experts, in float32 (arXiv 2101.03961 section 2.4).
Behind it, what training does to a routing and serving never does: room for so many tokens an
expert, and noise.

Shape legend: T tokens, E experts, K experts a token, P = T * K pairs of token and choice.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.moe.config import TrainingRouting
from moebius.ops import Ops, PreparedLinear, RouterTally
from moebius.ops.config import RouterConfig


class Routing(NamedTuple):
    """Where one layer sent its tokens.

    weights_TK      float32, what each chosen expert's output is multiplied by
    expert_ids_TK   int64, best first, ties to the lowest id
    logits_TE       float32, for the losses and for inspection
    kept_TK         in training only: which choices there was room for; None where no choice is ever
                    dropped
    """

    weights_TK: Tensor
    expert_ids_TK: Tensor
    logits_TE: Tensor
    kept_TK: Tensor | None = None


class Router(nn.Module):
    """weight (E, D); bias (E,), selection_bias (E,) and noise_weight (E, D) where the architecture
    has them.

    `limits` is what training does beside; nothing that serves sets it. `tally` counts what was
    chosen, where it is set.
    """

    def __init__(self, ops: Ops, config: RouterConfig, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.ops, self.config = ops, config
        self.limits: TrainingRouting | None = None
        self.tally: RouterTally | None = None
        self._prepared: PreparedLinear | None = None
        self.weight = nn.Parameter(torch.empty(config.num_experts, width, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(config.num_experts, dtype=dtype))
            if config.logit_bias
            else None
        )
        self.selection_bias: nn.Parameter | None = None
        if config.selection_bias:
            self.selection_bias = nn.Parameter(torch.empty(config.num_experts, dtype=torch.float32))
        self.noise_weight: nn.Parameter | None = None
        if config.learned_noise:
            self.noise_weight = nn.Parameter(torch.empty(config.num_experts, width, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Routing:
        layer = (self.weight, self.bias)
        if self._prepared is None or not self._prepared.is_of(layer):
            self._prepared = self.ops.prepare_linear(layer, dtype=x_TD.dtype)
        if self.limits is not None and self.limits.jitter and self.training:
            x_TD = jittered(x_TD, self.limits.jitter)
        logits_TE = self.ops.logits(x_TD, self._prepared)
        if self.noise_weight is not None and self.limits is not None and self.training:
            width_TE = F.softplus(
                self.ops.logits(x_TD, self.ops.prepare_linear((self.noise_weight, None)))
            )
            logits_TE = logits_TE + torch.randn_like(logits_TE) * width_TE
        weights_TK, ids_TK = self.ops.route(logits_TE, self.config, self.selection_bias, self.tally)
        kept_TK = None
        if self.limits is not None:
            kept_TK = kept(
                weights_TK.detach(), ids_TK, self.config.num_experts, self.limits, self.training
            )
        return Routing(weights_TK, ids_TK, logits_TE, kept_TK)


def jittered(x_TD: Tensor, eps: float) -> Tensor:
    """The router's input times uniform(1 - eps, 1 + eps), in float32; the experts' stays as it is.

    So in Mesh TensorFlow's code; the paper's figure 15 adds the noise to the logits, ST-MoE says it
    multiplies them.
    """
    return x_TD.float() * torch.empty(x_TD.shape, device=x_TD.device).uniform_(1 - eps, 1 + eps)


def capacity(tokens: int, num_experts: int, top_k: int, factor: float, least: int) -> int:
    """How many pairs an expert takes (Switch eq 3, rounded down): at factor 1 exactly an even
    load's."""
    return max(int(factor * tokens * top_k / num_experts), min(least, tokens))


def kept(
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    num_experts: int,
    limits: TrainingRouting,
    training: bool,
) -> Tensor | None:
    """Which choices stay (T, K) bool; None for all of them.

    The policy for choices after the first comes before the capacity, which it leaves to others, and
    only in training: in evaluation, as in serving, all choices stay that there is room for.
    """
    tokens, top_k = expert_ids_TK.shape
    kept_TK = None
    if training and limits.second_policy != "all" and top_k > 1:
        share_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        noise_TK: Tensor | float = (
            torch.rand_like(share_TK) if limits.second_policy == "random" else 1.0
        )
        kept_TK = share_TK > noise_TK * limits.second_threshold
        kept_TK[:, 0] = True
    factor = limits.capacity_factor if training else limits.eval_capacity_factor
    if factor is None:
        return kept_TK
    room = capacity(tokens, num_experts, top_k, factor, limits.min_capacity)
    fits_TK = arrival(expert_ids_TK, num_experts, kept_TK) < room
    return fits_TK if kept_TK is None else fits_TK & kept_TK


def arrival(expert_ids_TK: Tensor, num_experts: int, counted_TK: Tensor | None = None) -> Tensor:
    """The place of each pair in its expert's queue, from 0 (T, K): all first choices from left to
    right, then all second ones. Pairs that are not counted do not queue; their own place means
    nothing."""
    ids_TK = (
        expert_ids_TK if counted_TK is None else expert_ids_TK.masked_fill(~counted_TK, num_experts)
    )
    ids_P = ids_TK.t().reshape(-1)
    order = torch.argsort(ids_P, stable=True)
    sorted_P = ids_P[order]
    first_P = torch.searchsorted(sorted_P, sorted_P)
    place_P = torch.empty_like(order)
    place_P[order] = torch.arange(len(order), device=order.device) - first_P
    return place_P.view(expert_ids_TK.t().shape).t()
