"""Router health: pure functions of counts, probabilities and expert ids.

Each has its source, unit and range. Counts are of (token, choice) pairs before any capacity, one
layer each: pooled layers hide what cancels out between them. Leading dimensions (layers, steps)
pass through, so (..., E) gives (...); results are float64 unless told otherwise. Shape legend: T
tokens, E experts, K experts a token, X classes of token (kinds of file, vocabulary ids).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from moebius.ops.config import RouterConfig
from moebius.ops.reference.routing import route


def load_share(counts_E: Tensor) -> Tensor:
    """q_e = c_e / sum c, the part of a layer's work that each expert does (..., E).

    0 to 1; 1/E when even.
    """
    return counts_E.double() / counts_E.sum(-1, keepdim=True).clamp(min=1)


def coefficient_of_variation(counts_E: Tensor) -> Tensor:
    """std(c) / mean(c), the deviation over all E (Shazeer et al., arXiv 1701.06538).

    0 even, sqrt(E - 1) for one expert that serves all.
    """
    return load_share(counts_E).std(-1, correction=0) * counts_E.shape[-1]


def max_over_mean(counts_E: Tensor) -> Tensor:
    """max c / mean c, by how much the busiest expert exceeds an even share (...).

    1 even, E for one expert that serves all.
    """
    return load_share(counts_E).amax(-1) * counts_E.shape[-1]


def max_violation(counts_E: Tensor) -> Tensor:
    """MaxVio = (max c - mean c) / mean c (arXiv 2408.15664 eq 4).

    0 even, E - 1 for one expert that serves all.
    """
    return max_over_mean(counts_E) - 1


def max_violation_floor(num_tokens: int, num_experts: int, top_k: int) -> float:
    """The MaxVio that random routing of so many independent tokens is expected to give: never 0.

    Counts of even random routing vary by N (k/E)(1 - k/E) each and sum to N k. In the normal limit
    their greatest exceeds the mean by m_E standard deviations of E independent normals, relative to
    it m_E sqrt(E (E - k) / (E - 1) / (N k)), where m_E <= sqrt(2 ln E) is the expected greatest of
    E standard normals.
    """
    if num_experts == top_k:
        return 0.0
    x = torch.linspace(0, 12, 2401, dtype=torch.float64)
    above = 1 - torch.special.ndtr(x) ** num_experts
    below = torch.special.ndtr(-x) ** num_experts
    greatest = float(torch.trapezoid(above - below, x))
    spread = num_experts * (num_experts - top_k) / (num_experts - 1)
    return greatest * math.sqrt(spread / (num_tokens * top_k))


def load_entropy(counts_E: Tensor) -> Tensor:
    """-sum q ln q / ln E: 1 even, 0 for one expert that serves all.

    E to this power is how many experts it is worth.
    """
    experts = counts_E.shape[-1]
    if experts == 1:
        return torch.ones(counts_E.shape[:-1])
    return entropy(load_share(counts_E)) / math.log(experts)


def dead_experts(counts_E: Tensor, tau: float = 0.1) -> Tensor:
    """Which experts get less than tau of an even share, q_e < tau / E: bool (..., E)."""
    return load_share(counts_E) < tau / counts_E.shape[-1]


def entropy(p_E: Tensor) -> Tensor:
    """-sum p ln p in nats, 0 to ln E.

    Of a token's router probabilities it is small where the router is sure.
    """
    nats: Tensor = torch.special.entr(p_E.double()).sum(-1)
    return nats


def mutual_information(mean_E: Tensor, mean_entropy: Tensor) -> Tensor:
    """H(mean p) - mean H(p) in nats, 0 to ln E.

    What the choice of expert tells of the token, or of its class.
    """
    return entropy(mean_E) - mean_entropy


def margin(p_TE: Tensor) -> Tensor:
    """Probability of a token's likeliest expert less that of the next (T,).

    0 is a tie, 1 certain; E >= 2.
    """
    best, second = p_TE.double().topk(2, dim=-1).values.unbind(-1)
    return best - second


def routed_in_bfloat16(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    config: RouterConfig,
    selection_bias_E: Tensor | None,
) -> Tensor:
    """Expert ids (T, K) if the router's input, weights and logits were rounded to bfloat16.

    (Switch section 2.4.) Rounding merges close logits, and ties go to the lowest id. `overlap` with
    the ids as they are below 1 is a change.
    """
    bias = None if bias_E is None else bias_E.bfloat16()
    logits_TE = torch.nn.functional.linear(x_TD.bfloat16(), weight_ED.bfloat16(), bias)
    return route(logits_TE.float(), config, selection_bias_E)[1]


def overlap(ids_TK: Tensor, other_TK: Tensor) -> Tensor:
    """|A and B| / K of each token's experts in two routings, in whatever order (T,).

    1 the same, 0 all others. The mean over tokens, for a checkpoint and the final model, is router
    saturation (OLMoE, arXiv 2409.02060, 5.1).
    """
    same_TKK = ids_TK.unsqueeze(2) == other_TK.unsqueeze(1)
    return same_TKK.double().sum((1, 2)) / ids_TK.shape[1]


def coactivation(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """N_ij, how many tokens chose both i and j, N_ii = c_i: (E, E) int64."""
    zeros_TE = torch.zeros(len(expert_ids_TK), num_experts, device=expert_ids_TK.device)
    chosen_TE = zeros_TE.scatter_(1, expert_ids_TK, 1.0)
    return (chosen_TE.T @ chosen_TE).long()  # float32 counts exactly to 2^24 tokens


def coactivation_share(together_EE: Tensor) -> Tensor:
    """P(j given i) = N_ij / N_i, 0 on the diagonal (..., E, E).

    Rows sum to K - 1; even is (K - 1) / (E - 1).
    """
    counts_E = together_EE.diagonal(dim1=-2, dim2=-1)
    share = together_EE.double() / counts_E.clamp(min=1).unsqueeze(-1)
    return share - torch.diag_embed(share.diagonal(dim1=-2, dim2=-1))


def coactivation_lift(together_EE: Tensor, tokens: int, top_k: int) -> Tensor:
    """How much oftener i and j meet than two experts of their loads do by chance (..., E, E).

    1 is chance, 0 never. N_ij N / (N_i N_j), times K (E - 1) / ((K - 1) E), since a token chooses
    no expert twice: under even random routing N_ij = N K (K - 1) / (E (E - 1)). K >= 2; the
    diagonal means nothing and is 1.
    """
    counts_E = together_EE.diagonal(dim1=-2, dim2=-1).double().clamp(min=1)
    experts = together_EE.shape[-1]
    even = top_k * (experts - 1) / ((top_k - 1) * experts)
    lift = together_EE * tokens / counts_E.unsqueeze(-1) / counts_E.unsqueeze(-2) * even
    eye = torch.eye(experts, dtype=torch.double, device=lift.device)
    return lift * (1 - eye) + eye


def preference(counts_EX: Tensor, tokens_X: Tensor) -> Tensor:
    """How much more of class x an expert gets than of all tokens (..., E, X).

    [N(e, x) / N(x)] / [N(e) / N]: 1 is no preference, 0 never, at most N / N(e). N(e, x) counts
    class x's tokens that chose e (OLMoE section 5.3 compares N(e, x) / N(x) with K / E; dividing by
    the expert's own load keeps busy experts apart).
    """
    all_E1 = counts_EX.sum(-1, keepdim=True) / tokens_X.sum()
    return counts_EX.double() / tokens_X.clamp(min=1) / all_E1.clamp(min=1e-12)


def vocabulary_specialisation(counts_EX: Tensor, tokens_X: Tensor, least: int = 10) -> Tensor:
    """Mean over vocabulary ids seen `least` times of max_e N(e, x) / N(x) (...).

    K/E to 1 (OLMoE section 5.4).
    """
    often = tokens_X >= least
    return (counts_EX[..., often].double() / tokens_X[often]).amax(-2).mean(-1)


def total_variation(p_E: Tensor, q_E: Tensor) -> Tensor:
    """Half the sum of |p - q|: how much probability has to move to make one the other, 0 to 1."""
    return 0.5 * (p_E.double() - q_E.double()).abs().sum(-1)


def dropped_share(counts_E: Tensor, capacity_factor: float) -> Tensor:
    """Share of a step's pairs beyond each expert's capacity: 0 to 1 - 1/E.

    The capacity is int(factor * pairs / E) (Switch eq 3).
    """
    pairs = counts_E.sum(-1, keepdim=True)
    capacity = (capacity_factor * pairs.double() / counts_E.shape[-1]).floor().clamp(min=1)
    return (counts_E - capacity).clamp(min=0).sum(-1) / pairs.squeeze(-1).clamp(min=1)


def distinct_experts(hit_E: Tensor, batch: int) -> Tensor:
    """Expected experts that B independent tokens touch, K to E.

    sum_e 1 - (1 - hit_e)^B, where hit_e = c_e / N. An even load, hit = K/E, touches the most: E (1
    - (1 - K/E)^B).
    """
    return (1 - (1 - hit_E.double()) ** batch).sum(-1)


def distinct_in_windows(expert_ids_TK: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Pairs of a width, 1, 2, 4, ... tokens, and the distinct experts of each run of that width.

    Runs are of consecutive tokens; the last width is the last of which there is a whole run.
    """
    shape = (len(expert_ids_TK), num_experts)
    chosen = torch.zeros(shape, dtype=torch.bool, device=expert_ids_TK.device)
    chosen.scatter_(1, expert_ids_TK, True)
    width = 1
    while len(chosen):
        yield width, chosen.sum(-1)
        even = len(chosen) // 2 * 2
        chosen = chosen[0:even:2] | chosen[1:even:2]
        width *= 2


def imbalance(loads_R: Tensor) -> Tensor:
    """max / mean of the loads of ranks, by which a step is longer than with even ones: 1 to R.

    (arXiv 2412.19437.)
    """
    return loads_R.double().amax(-1) / loads_R.double().mean(-1)
