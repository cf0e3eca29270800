"""From a tally to the report's figures: plain lists and numbers, as report.json holds them.

Shape legend: S steps, M layers with a router, E experts, X tracked vocabulary, C kinds of text, R
ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moebius.errors import NumericalError
from moebius.inspect.collect import Tally
from moebius.moe import health
from moebius.moe.placement import place, rank_loads
from moebius.text import Tokenizer

# A class of tokens counts as liked from these multiples of an expert's share on.
_LIKED_TOKEN = 1.5
_LIKED_KIND = 1.2
_TOKENS_SHOWN = 8
_PAIRS = 5
_BATCHES = [2**i for i in range(10)]


def rounded(values: Tensor, digits: int = 4) -> Any:
    """Nested lists of a tensor's values."""

    def each(value: Any) -> Any:
        return [each(v) for v in value] if isinstance(value, list) else round(value, digits)

    return each(values.tolist())


def check_finite(tally: Tally, layers: Sequence[int]) -> None:
    """Raises NumericalError naming the first layer whose router gave what is no number."""
    for layer, value in zip(layers, tally.mean("z").tolist(), strict=True):
        if not math.isfinite(value):
            raise NumericalError(
                f"layer {layer}: the router's logits are not finite; this checkpoint is broken"
            )


def layer_figures(
    tally: Tally, layers: Sequence[int], capacity_factors: Sequence[float]
) -> list[dict[str, Any]]:
    """Each layer's figures, under the names of moebius.moe.health."""
    counts_ME = tally.counts_ME
    steps_SME = torch.stack(tally.counts_SME)
    dead_ME = health.dead_experts(counts_ME)
    entropy_M = tally.mean("entropy")
    mean_p_ME = tally.p_ME.cpu() / tally.seen
    load_entropy_M = health.load_entropy(counts_ME)
    dropped = [health.dropped_share(steps_SME, factor).mean(0) for factor in capacity_factors]
    columns: dict[str, Tensor] = {
        "counts": counts_ME,
        "load": health.load_share(counts_ME),
        "coefficient_of_variation": health.coefficient_of_variation(counts_ME),
        "max_violation": health.max_violation(counts_ME),
        "max_violation_step": health.max_violation(steps_SME).mean(0),
        "load_entropy": load_entropy_M,
        "effective_experts": tally.router.num_experts**load_entropy_M,
        "router_entropy": entropy_M,
        "mutual_information": health.mutual_information(mean_p_ME, entropy_M),
        "confidence": tally.mean("confidence"),
        "margin": tally.mean("margin"),
        "z": tally.mean("z"),
        "largest_logit": tally.largest_M.cpu(),
        "bfloat16_changed": tally.mean("bfloat16_changed"),
        "dropped": torch.stack(dropped, 1),
    }
    lists = {name: rounded(values) for name, values in columns.items()}
    # Shown as multiples of the even share: hundreds of times as much.
    lists["load"] = rounded(columns["load"], 7)
    found = []
    for m, layer in enumerate(layers):
        dead = dead_ME[m].nonzero().flatten().tolist()
        figures = {name: values[m] for name, values in lists.items()}
        found.append({"layer": layer, "dead": dead, **figures})
    return found


def together(tally: Tally) -> list[dict[str, Any]] | None:
    """Co-activation of each layer, and the pairs that meet oftenest; None for top-1 routers."""
    if tally.router.top_k == 1:
        return None
    share_MEE = health.coactivation_share(tally.together_MEE.cpu())
    lift_MEE = health.coactivation_lift(tally.together_MEE.cpu(), tally.seen, tally.router.top_k)
    found: list[dict[str, Any]] = []
    for share_EE, lift_EE in zip(share_MEE, lift_MEE, strict=True):
        upper = torch.triu_indices(len(lift_EE), len(lift_EE), offset=1)
        lifts = lift_EE[upper[0], upper[1]]
        best = upper.T[lifts.argsort(descending=True)[:_PAIRS]].tolist()
        pairs = [
            {"experts": [i, j], "lift": rounded(lift_EE[i, j]), "share": rounded(share_EE[i, j])}
            for i, j in best
        ]
        layer = {
            "share": rounded(share_EE),
            "lift": rounded(lift_EE, 3),
            "pairs": pairs,
            "spread": float((lifts - 1).abs().mean()),
        }
        found.append(layer)
    return found


def tastes(tally: Tally, tokenizer: Tokenizer, m: int) -> dict[str, Any]:
    """What each expert of a layer gets far more of than its share: vocabulary ids and kinds."""
    tokens_EX = tally.tokens_MEX[m].cpu()
    lift_EX = health.preference(tokens_EX, tally.tracked_tokens_X)
    # How far the tokens are from chance in all: common ones count for more than rare ones of the
    # same lift.
    weight_EX = torch.where(lift_EX >= _LIKED_TOKEN, tokens_EX * lift_EX.clamp(min=1).log(), 0.0)
    kind_tokens_C = torch.bincount(tally.rows.kind_N, minlength=len(tally.rows.kinds))
    kinds_EC = tally.kinds_MEC[m].cpu()
    kind_lift_EC = health.preference(kinds_EC, kind_tokens_C)
    experts = []
    for e in range(len(tokens_EX)):
        expert = {
            "expert": e,
            "strength": float(weight_EX[e].sum()),
            "tokens": _liked_tokens(tally, tokenizer, m, e, lift_EX[e], weight_EX[e]),
            "kinds": _liked_kinds(tally.rows.kinds, rounded(kind_lift_EC[e], 2)),
        }
        experts.append(expert)
    specialisation = None
    if lift_EX.numel():
        found = health.vocabulary_specialisation(tokens_EX, tally.tracked_tokens_X)
        specialisation = rounded(found)
    share_C = kind_tokens_C / kind_tokens_C.sum()
    mean_entropy = (share_C * health.entropy(health.load_share(kinds_EC.T))).sum()
    load_E = health.load_share(kinds_EC.sum(1))
    return {
        "vocabulary_specialisation": specialisation,
        "kind_information": rounded(health.mutual_information(load_E, mean_entropy)),
        "kind_lift": rounded(kind_lift_EC, 3),
        "experts": experts,
    }


def _liked_tokens(
    tally: Tally, tokenizer: Tokenizer, m: int, e: int, lift_X: Tensor, weight_X: Tensor
) -> list[dict[str, Any]]:
    """The ids of most weight that expert e of layer m likes, with an example of each."""
    tokens_X = tally.tokens_MEX[m, e].cpu()
    example_X = tally.example_MEX[m, e].cpu()
    liked = []
    for x in weight_X.argsort(descending=True)[:_TOKENS_SHOWN].tolist():
        if weight_X[x] <= 0:
            continue
        token_id = int(tally.tracked_X[x])
        at = int(tally.shuffled_N[example_X[x]])
        token = {
            "id": token_id,
            "text": tokenizer.token_text(token_id),
            "lift": rounded(lift_X[x], 2),
            "share": rounded(tokens_X[x] / tally.tracked_tokens_X[x], 3),
            "count": int(tokens_X[x]),
            "example": tally.rows.context(at, tokenizer),
            "document": tally.rows.documents[int(tally.rows.document_N[at])][0],
        }
        liked.append(token)
    return liked


def _liked_kinds(kinds: Sequence[str], lifts: Sequence[float]) -> list[dict[str, Any]]:
    pairs = zip(kinds, lifts, strict=True)
    liked = [{"kind": kind, "lift": lift} for kind, lift in pairs if lift >= _LIKED_KIND]
    return sorted(liked, key=lambda each: -float(each["lift"]))


def distinct(tally: Tally) -> list[dict[str, Any]]:
    """Experts of a layer that a step touches, by its number of tokens.

    The mean over layers, and layer by layer.
    """
    router = tally.router
    length = tally.rows.length
    even_E = torch.full((router.num_experts,), router.top_k / router.num_experts)
    number = len(tally.rows.tokens_N) // length
    found = []
    for batch in _BATCHES:
        one_text = None
        if batch <= length:
            windows = number * (length // batch)
            one_text = rounded(tally.sums[f"distinct_{batch}"].mean() / windows)
        loaded_M = health.distinct_experts(tally.counts_ME / tally.seen, batch)
        row = {
            "batch": batch,
            "uniform": rounded(health.distinct_experts(even_E, batch)),
            "one_text": one_text,
            "load": rounded(loaded_M.mean()),
            "load_by_layer": rounded(loaded_M),
        }
        found.append(row)
    return found


def placement(tally: Tally, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """The busiest rank's load over the mean, for three ways to place the experts.

    In order, balanced, and balanced with a replica a rank more. Placements are made from every
    other step and judged on the steps between, one by one, as a step waits for its busiest rank;
    with a single step there is but one to do both.
    """
    steps_SME = torch.stack(tally.counts_SME)
    known_ME = steps_SME[::2].sum(0).tolist()
    judged_SME = steps_SME[1::2] if len(steps_SME) > 1 else steps_SME
    experts = tally.router.num_experts
    found = []
    for count in ranks:
        room = math.ceil(experts / count)
        slots = (room + 1) * count
        plain = [list(range(rank * room, min((rank + 1) * room, experts))) for rank in range(count)]
        ways = {
            "plain": [plain] * len(known_ME),
            "balanced": [place(loads, count) for loads in known_ME],
            "replicated": [place(loads, count, slots) for loads in known_ME],
        }
        row: dict[str, Any] = {"ranks": count, "slots": slots}
        for name, held in ways.items():
            means = []
            for m, layer in enumerate(held):
                means.append(health.imbalance(rank_loads(judged_SME[:, m], layer)).mean())
            row[name] = rounded(torch.stack(means))
            row[f"{name}_experts"] = held
        found.append(row)
    return found


def drift(tally: Tally, change_M: Tensor) -> dict[str, Any]:
    """How far another checkpoint routes the same tokens otherwise, layer by layer."""
    theirs_ME = tally.other_counts_ME.cpu()
    columns = {
        "saturation": tally.mean("overlap"),
        "saturation_first": tally.mean("overlap_first"),
        "variation": tally.mean("variation"),
        "load_variation": health.total_variation(
            health.load_share(tally.counts_ME), health.load_share(theirs_ME)
        ),
        "max_violation": health.max_violation(theirs_ME),
        "router_change": change_M,
    }
    chance = round(tally.router.top_k / tally.router.num_experts, 4)
    return {"chance": chance} | {name: rounded(values) for name, values in columns.items()}
