"""Room for so many tokens an expert, which training may give and serving never does.

Shape legend: T tokens, K experts a token, P = T * K pairs of token and choice.
"""

import torch
from torch import Tensor

from moebius.moe.training import TrainingRouting


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
