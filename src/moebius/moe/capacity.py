"""Room for so many tokens an expert, which training may give and serving never does.

Shape legend: T tokens, K experts a token, P = T * K pairs of token and choice.
"""

import torch
from torch import Tensor

from moebius.moe.share import WHOLE_BATCH, BatchShare
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
    share: BatchShare = WHOLE_BATCH,
) -> Tensor | None:
    """Which choices stay (T, K) bool; None for all of them.

    The policy for choices after the first comes before the capacity, which it leaves to others, and
    only in training: in evaluation, as in serving, all choices stay that there is room for. Room is
    for the tokens of the whole batch, of which these are a share.
    """
    tokens, top_k = expert_ids_TK.shape
    kept_TK = None
    if training and limits.second_policy != "all" and top_k > 1:
        share_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        noise_TK: Tensor | float = 1.0
        if limits.second_policy == "random":
            noise_TK = share.drawn(share_TK, torch.Tensor.uniform_)
        kept_TK = share_TK > noise_TK * limits.second_threshold
        kept_TK[:, 0].fill_(True)  # an assignment would bring it from the host
    factor = limits.capacity_factor if training else limits.eval_capacity_factor
    if factor is None:
        return kept_TK
    room = capacity(share.total(tokens), num_experts, top_k, factor, limits.min_capacity)
    fits_TK = arrival(expert_ids_TK, num_experts, kept_TK, share) < room
    return fits_TK if kept_TK is None else fits_TK & kept_TK


def arrival(
    expert_ids_TK: Tensor,
    num_experts: int,
    counted_TK: Tensor | None = None,
    share: BatchShare = WHOLE_BATCH,
) -> Tensor:
    """The place of each pair in its expert's queue, from 0 (T, K).

    All first choices queue from left to right, then all second ones. Pairs that are not counted do
    not queue; their own place means nothing.
    """
    top_k = expert_ids_TK.shape[1]
    ids_TK = expert_ids_TK
    if counted_TK is not None:
        ids_TK = ids_TK.masked_fill(~counted_TK, num_experts)
    # One queue for the first choices of an expert, another for its second ones; and for none.
    queues = num_experts + 1
    queue_TK = ids_TK + queues * torch.arange(top_k, device=ids_TK.device)
    queue_P = queue_TK.t().reshape(-1)
    counts_KE = queue_P.new_zeros(top_k, queues)
    counts_KE.view(-1).scatter_add_(0, queue_P, torch.ones_like(queue_P))
    order_P = torch.argsort(queue_P, stable=True)
    sorted_P = queue_P[order_P]
    place_P = torch.empty_like(order_P)
    places = torch.arange(len(order_P), device=order_P.device)
    place_P[order_P] = places - torch.searchsorted(sorted_P, sorted_P)
    place_P += share.ahead(counts_KE).flatten()[queue_P]
    return place_P.view(top_k, -1).t()
