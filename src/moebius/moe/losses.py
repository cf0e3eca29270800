"""Losses that keep a router balanced and its logits small: pure functions of routings.

Normalisation: the balance loss is 1 when the load is even, worked out per layer and averaged over the layers that have
a router. Others differ: transformers' `load_balancing_loss_func` pools all layers' tokens and is top_k at balance (see
`pooled_balance_loss`), Megatron sums over layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moebius.moe.router import Routing


def _balance(logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    experts = logits_TE.shape[-1]
    # Switch eq 5: the share of (token, choice) pairs that go to each expert; no gradient passes through counts.
    share_E = torch.zeros(experts, device=logits_TE.device)
    share_E.index_add_(0, expert_ids_TK.reshape(-1), torch.ones(expert_ids_TK.numel(), device=logits_TE.device))
    share_E = share_E / max(expert_ids_TK.numel(), 1)
    # Switch eq 6: the mean router probability of each expert.
    probability_E = torch.softmax(logits_TE.float(), dim=-1).mean(0)
    # Switch eq 4 without alpha.
    return experts * torch.dot(share_E, probability_E)


def _layers(routings: Sequence[Routing | None]) -> list[Routing]:
    return [routing for routing in routings if routing is not None]


def load_balance_loss(routings: Sequence[Routing | None]) -> Tensor:
    """Switch Transformers eq 4-6 (arXiv 2101.03961), E * sum_i f_i P_i: 1 at balance, at most E; mean over layers.

    f counts all K choices of a token and divides by K. Layers without a router are None and skipped.
    """
    return torch.stack([_balance(r.logits_TE, r.expert_ids_TK) for r in _layers(routings)]).mean()


def pooled_balance_loss(routings: Sequence[Routing | None]) -> Tensor:
    """The same in transformers' normalisation: all layers' tokens pooled into one f and P, and top_k at balance.

    A comparison with published training logs needs it; training does not (imbalances of two layers cancel out).
    """
    layers = _layers(routings)
    logits = torch.cat([r.logits_TE for r in layers])
    expert_ids = torch.cat([r.expert_ids_TK for r in layers])
    return expert_ids.shape[-1] * _balance(logits, expert_ids)


def router_z_loss(routings: Sequence[Routing | None]) -> Tensor:
    """ST-MoE eq 5 (arXiv 2202.08906): the mean over tokens of logsumexp(logits)^2, in nats^2; mean over layers."""
    return torch.stack([torch.logsumexp(r.logits_TE.float(), dim=-1).square().mean() for r in _layers(routings)]).mean()
