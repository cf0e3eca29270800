"""How tokens choose experts: one function over RouterConfig serves the published softmax and
sigmoid top-k routers."""

import torch
from torch import Tensor

from moebius.ops.config import RouterConfig
from moebius.ops.steps import RouterTally


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """Indices (T, k) of the k highest float32 scores, highest first, ties to the lowest index.

    torch.topk leaves the order of ties open, and a stable sort is several times slower. So the
    scores' bits, made to order like integers, are joined with the index counted backwards: no two
    keys are equal.
    """
    count = scores_TE.shape[-1]
    # Adding 0 makes -0.0 equal to 0.0.
    bits = (scores_TE + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFF_FFFF)).long()
    keys = (ordered << 32) + torch.arange(count - 1, -1, -1, device=scores_TE.device)
    return torch.topk(keys, k, dim=-1).indices


def router_probabilities(logits_TE: Tensor, config: RouterConfig) -> Tensor:
    """What the router believes, as a distribution: softmax, or sigmoid scores over their sum
    (DeepSeek-V3)."""
    logits = logits_TE.float()
    if config.logit_softcap is not None:
        logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
    if config.score != "sigmoid":
        return torch.softmax(logits, dim=-1)
    scores = torch.sigmoid(logits)
    return scores / scores.sum(-1, keepdim=True)


def count(
    tally: RouterTally,
    logits_TE: Tensor,
    expert_ids_TK: Tensor,
    config: RouterConfig,
    real_T: Tensor | None = None,
) -> None:
    """Add a step's choices to a layer's tally. Waits for no device; a token whose numbers went
    wrong has no entropy. real_T: which rows count; None: all."""
    ones_TK = torch.ones_like(expert_ids_TK)
    if real_T is not None:
        ones_TK = ones_TK * real_T.unsqueeze(1)
    tally.pairs_E.index_add_(0, expert_ids_TK.reshape(-1), ones_TK.reshape(-1))
    nats_T = torch.special.entr(router_probabilities(logits_TE, config).double()).sum(-1)
    finite_T = torch.isfinite(nats_T)
    if real_T is not None:
        finite_T = finite_T & real_T
    tally.sums[0] += torch.where(finite_T, nats_T, 0.0).sum()
    tally.sums[1] += finite_T.sum()


def _keep_best_groups(choice_TE: Tensor, config: RouterConfig) -> Tensor:
    """Node-limited routing (DeepSeek-V2 and V3, arXiv 2412.19437 section 2.1.2): fill all but the
    best groups."""
    tokens = choice_TE.shape[0]
    size = config.num_experts // config.num_groups
    grouped = choice_TE.view(tokens, config.num_groups, size)
    if config.group_score == "top2":
        group_scores = grouped.topk(min(2, size), dim=-1).values.sum(-1)
    else:
        group_scores = grouped.amax(-1)
    keep = torch.zeros_like(group_scores, dtype=torch.bool)
    keep.scatter_(1, top_k(group_scores, config.groups_kept), True)
    return grouped.masked_fill(~keep.unsqueeze(-1), config.masked_score).view_as(choice_TE)


def route(
    logits_TE: Tensor,
    config: RouterConfig,
    selection_bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The experts of each token: (weights_TK float32, expert_ids_TK int64), best first.

    Differentiable in the logits. The selection bias moves the choice only, never a weight (arXiv
    2408.15664).
    """
    logits = logits_TE.float()
    if config.logit_softcap is not None:
        logits = config.logit_softcap * torch.tanh(logits / config.logit_softcap)
    if config.score == "softmax":
        scores = torch.softmax(logits, dim=-1)
    elif config.score == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        scores = logits

    choice = scores.detach()
    if config.selection_bias:
        assert selection_bias_E is not None
        choice = choice + selection_bias_E.float()
    if config.num_groups > 1:
        choice = _keep_best_groups(choice, config)
    expert_ids = top_k(choice, config.top_k)

    if config.weight in ("raw", "renorm"):
        weights = scores.gather(1, expert_ids)
        if config.weight == "renorm":
            divisor = weights.sum(-1, keepdim=True) + config.renorm_eps
            weights = weights / divisor.clamp(min=config.renorm_least)
    else:
        chosen = logits.gather(1, expert_ids)
        weights = (
            torch.softmax(chosen, dim=-1) if config.weight == "softmax" else torch.sigmoid(chosen)
        )
    weights = weights * config.scale
    return weights if expert_scale_E is None else weights * expert_scale_E[expert_ids], expert_ids
