"""Losses that keep a router balanced and its logits small, and balance without a loss.

One normalisation: the balance loss is 1 when the load is even, worked out per layer and averaged
over the layers that have a router. Others differ. GShard's and DeepSpeed's is ours with first
choices only; Megatron's is ours summed over the layers; transformers' `load_balancing_loss_func`
pools all layers' tokens, so that the imbalances of two layers cancel out, and is K at balance.
tests/moe/test_losses.py has their formulas.

Shape legend: T tokens in S sequences of equal length, E experts, K experts a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.moe.router import Routing
from moebius.ops.config import RouterConfig
from moebius.ops.reference.routing import router_probabilities


def present(routings: Sequence[Routing | None]) -> list[Routing]:
    """Those of the layers that have a router."""
    return [routing for routing in routings if routing is not None]


def chosen_counts(routing: Routing, *, sequences: int = 1, first_only: bool = False) -> Tensor:
    """How many pairs of token and choice each expert got, before any capacity: (S, E) float32."""
    ids_TK = routing.expert_ids_TK[:, :1] if first_only else routing.expert_ids_TK
    ids_SP = ids_TK.reshape(sequences, -1)
    counts_SE = torch.zeros(sequences, routing.logits_TE.shape[1], device=ids_TK.device)
    return counts_SE.scatter_add_(1, ids_SP, torch.ones(ids_SP.shape, device=ids_TK.device))


def load_balance_loss(
    routings: Sequence[Routing | None],
    config: RouterConfig,
    *,
    sequences: int = 1,
    counts: Sequence[Tensor] | None = None,
    first_only: bool = False,
) -> Tensor:
    """E * sum_i f_i P_i, the mean over layers: 1 at balance, at most E.

    Switch Transformers eq 4-6 (arXiv 2101.03961).
    f_i is expert i's share of all K choices (of the first ones with first_only: GShard, ST-MoE),
    P_i its mean router probability; sigmoid scores are divided by their sum first (DeepSeek-V3 eq
    17-20). With `sequences` the loss is worked out in each of them and averaged (DeepSeek-V3's
    sequence-wise loss). `counts`, one (E,) a layer with a router, are those of a larger batch that
    this one is a part of (global balance, arXiv 2501.11873): with f of the whole and P of the part,
    the mean of the parts' losses is the loss of the whole. Gradients flow through P alone.
    """
    losses = []
    for layer, routing in enumerate(present(routings)):
        probability_TE = router_probabilities(routing.logits_TE, config)
        probability_SE = probability_TE.view(sequences, -1, config.num_experts).mean(1)
        if counts is not None:
            counts_SE = counts[layer].float().unsqueeze(0)
        else:
            counts_SE = chosen_counts(routing, sequences=sequences, first_only=first_only)
        share_SE = counts_SE / counts_SE.sum(-1, keepdim=True).clamp(min=1)
        losses.append(config.num_experts * (share_SE * probability_SE).sum(-1).mean())
    return torch.stack(losses).mean()


def router_z_loss(routings: Sequence[Routing | None]) -> Tensor:
    """The mean over tokens and layers of logsumexp(logits)^2, in nats^2.

    ST-MoE eq 5 (arXiv 2202.08906). Equal logits of 0 give (ln E)^2, not 0.
    """
    losses = []
    for routing in present(routings):
        log_sum_T = torch.logsumexp(routing.logits_TE.float(), dim=-1)
        losses.append(log_sum_T.square().mean())
    return torch.stack(losses).mean()


def updated_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The next batch's selection bias: b_i + rate * sign(mean(c) - c_i).

    Balance without a loss (arXiv 2408.15664, algorithm 1).
    """
    counts_E = counts_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(counts_E.mean() - counts_E)
