"""Every metric against a value worked by hand, and against a count or a simulation that shares no
code with it."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch

from moebius.moe import health
from moebius.ops.config import RouterConfig
from moebius.ops.reference.routing import route, router_probabilities

EVEN, SKEWED, ONE = (
    torch.tensor([4, 4, 4, 4]),
    torch.tensor([8, 4, 4, 0]),
    torch.tensor([16, 0, 0, 0]),
)
IDS = torch.tensor([[0, 1], [0, 2], [1, 0], [3, 0]])


def test_load_by_hand() -> None:
    """Shares of (8, 4, 4, 0) are 1/2, 1/4, 1/4, 0: deviation sqrt(8) of mean 4, entropy 1.5 bits of
    2."""
    counts = torch.stack([EVEN, SKEWED, ONE])
    assert health.load_share(SKEWED).tolist() == [0.5, 0.25, 0.25, 0.0]
    assert health.coefficient_of_variation(counts).tolist() == pytest.approx(
        [0, math.sqrt(8) / 4, math.sqrt(3)]
    )
    assert health.max_violation(counts).tolist() == [0.0, 1.0, 3.0]
    assert health.load_entropy(counts).tolist() == pytest.approx([1, 0.75, 0])
    assert health.load_entropy(torch.tensor([7])).item() == 1.0
    assert health.load_share(torch.zeros(3, dtype=torch.long)).tolist() == [0, 0, 0]


def test_dead_is_below_a_share_of_the_even_load() -> None:
    counts = torch.tensor(
        [[0, 100, 100, 200], [9, 11, 180, 200]]
    )  # a tenth of the even share is 10
    assert health.dead_experts(counts).tolist() == [
        [True, False, False, False],
        [True, False, False, False],
    ]
    assert health.dead_experts(counts, tau=0.01).sum(1).tolist() == [1, 0]


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (64, 8)])
def test_floor_of_max_violation_is_what_random_routing_gives(experts: int, top_k: int) -> None:
    generator = np.random.default_rng(0)
    tokens, found = 2000, []
    for _ in range(60):
        chosen = np.argsort(generator.random((tokens, experts)), axis=1)[:, :top_k]
        counts = np.bincount(chosen.ravel(), minlength=experts)
        found.append(counts.max() / counts.mean() - 1)
    assert np.mean(found) == pytest.approx(
        health.max_violation_floor(tokens, experts, top_k), rel=0.1
    )


def test_floor_by_hand() -> None:
    """The greater of two normals is 1/sqrt(pi) above their mean; 100 tokens over two experts vary
    by 5 of 50."""
    assert health.max_violation_floor(100, 2, 1) == pytest.approx(
        math.sqrt(2) * 5 / 50 / math.sqrt(math.pi), rel=1e-6
    )
    assert health.max_violation_floor(100, 4, 4) == 0.0
    bound = math.sqrt(2 * math.log(64) / (1000 * 8 / 64))
    assert 0.7 * bound < health.max_violation_floor(1000, 64, 8) < bound


def test_confidence_and_mutual_information_by_hand() -> None:
    """Two sure tokens of different experts tell 1 bit; two unsure ones, or two of the same expert,
    nothing."""
    sure, unsure, same = (
        torch.tensor(rows) for rows in ([[1.0, 0], [0, 1]], [[0.5, 0.5]] * 2, [[1.0, 0]] * 2)
    )
    assert health.entropy(sure).tolist() == [0, 0]
    assert health.entropy(unsure).tolist() == pytest.approx([math.log(2)] * 2)
    for p, nats in ((sure, math.log(2)), (unsure, 0.0), (same, 0.0)):
        assert health.mutual_information(
            p.mean(0), health.entropy(p).mean()
        ).item() == pytest.approx(nats)
    p = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.2, 0.4]])
    assert health.margin(p).tolist() == pytest.approx([0.5, 0.0], abs=1e-6)


def test_probabilities_of_sigmoid_scores_are_their_shares() -> None:
    logits = torch.tensor([[0.0, math.log(3.0), -100.0]])
    softmax = router_probabilities(logits, RouterConfig(3, 1))
    assert softmax.tolist()[0] == pytest.approx([0.25, 0.75, 0])
    sigmoid = router_probabilities(logits, RouterConfig(3, 1, score="sigmoid"))  # 1/2 and 3/4
    assert sigmoid.tolist()[0] == pytest.approx([0.4, 0.6, 0])
    capped = router_probabilities(
        torch.tensor([[60.0, 0.0]]), RouterConfig(2, 1, logit_softcap=1.0)
    )
    assert capped[0, 0].item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_bfloat16_merges_close_logits() -> None:
    """bfloat16 has steps of 1 at 128: 128.25 and 128 become equal, and the tie goes to the lower id
    (ST-MoE fn 7)."""
    config, x_TD = RouterConfig(3, 1), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight_ED = torch.tensor([[128.0, 0.0], [128.25, 2.0], [0.0, 1.0]])
    full = route(x_TD @ weight_ED.T, config)[1]
    rounded = health.routed_in_bfloat16(x_TD, weight_ED, None, config, None)
    assert (full.tolist(), rounded.tolist()) == ([[1], [1]], [[0], [1]])
    assert (health.overlap(full, rounded) < 1).double().mean().item() == 0.5


def test_overlap_ignores_order() -> None:
    assert health.overlap(IDS, torch.tensor([[1, 0], [2, 3], [2, 3], [3, 0]])).tolist() == [
        1,
        0.5,
        0,
        1,
    ]


def test_coactivation_counts_all_pairs_not_neighbours() -> None:
    """Of (0, 1, 2) the pair (0, 2) counts too, though its ranks are no neighbours."""
    ids = torch.tensor([[0, 1, 2], [0, 3, 1]])
    expected = torch.zeros(4, 4, dtype=torch.long)
    for row in ids.tolist():
        for e in row:
            expected[e, e] += 1
        for i, j in permutations(row, 2):
            expected[i, j] += 1
    together = health.coactivation(ids, 4)
    assert torch.equal(together, expected)
    share = health.coactivation_share(together)
    assert share[0].tolist() == [0, 1, 0.5, 0.5] and share[2].tolist() == [1, 1, 0, 0]
    assert share.sum(1).tolist() == [2, 2, 2, 2]
    assert health.coactivation_share(torch.zeros(2, 2, dtype=torch.long)).tolist() == [
        [0, 0],
        [0, 0],
    ]


def test_lift_is_one_by_chance() -> None:
    """All three pairs of three experts once: chance. Then (0, 1) thrice, (2, 3) thrice, (0, 2)
    once: 3 * 7 / (4 * 3) times 2 * 3 / (1 * 4)."""
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    assert health.coactivation_lift(
        health.coactivation(pairs, 3), 3, 2
    ).flatten().tolist() == pytest.approx([1.0] * 9)
    pairs = torch.tensor([[0, 1]] * 3 + [[2, 3]] * 3 + [[0, 2]])
    lift = health.coactivation_lift(health.coactivation(pairs, 4), 7, 2)
    assert lift[0].tolist() == pytest.approx([1, 3 * 7 / 12 * 1.5, 1 * 7 / 16 * 1.5, 0])


def test_preference_by_hand() -> None:
    """Expert 0 gets 3 of 4 tokens of class 0, none of 2 of class 1: 3 of 6 in all, so 1.5 times its
    share and 0."""
    counts, tokens = torch.tensor([[3, 0, 0], [1, 2, 0]]), torch.tensor([4, 2, 0])
    assert health.preference(counts, tokens).tolist() == [[1.5, 0.0, 0.0], [0.5, 2.0, 0.0]]
    assert health.vocabulary_specialisation(counts, tokens, least=2).item() == (3 / 4 + 1) / 2
    assert health.vocabulary_specialisation(counts, tokens, least=3).item() == 3 / 4
    assert (
        health.total_variation(torch.tensor([0.75, 0.25]), torch.tensor([0.0, 1.0])).item() == 0.75
    )


def test_dropped_share_by_hand() -> None:
    """16 pairs, 4 experts: capacity 4 at factor 1, so (8, 4, 4, 0) drops 4; 5 at 1.25; 8 at 2."""
    assert [health.dropped_share(SKEWED, factor).item() for factor in (1.0, 1.25, 2.0)] == [
        4 / 16,
        3 / 16,
        0.0,
    ]
    assert health.dropped_share(torch.stack([EVEN, ONE]), 1.0).tolist() == [0.0, 0.75]


def test_distinct_experts_by_enumeration() -> None:
    """All 16 ways in which two tokens choose from IDS, counted."""
    sets = [set(row) for row in IDS.tolist()]
    mean = sum(len(a | b) for a in sets for b in sets) / 16
    hit = torch.tensor([4, 2, 1, 1]) / len(IDS)
    assert health.distinct_experts(hit, 2).item() == pytest.approx(mean)
    assert health.distinct_experts(hit, 1).item() == 2.0
    even = torch.full((8,), 2 / 8)
    assert health.distinct_experts(even, 3).item() == pytest.approx(8 * (1 - (1 - 2 / 8) ** 3))


def test_distinct_in_windows_by_hand() -> None:
    ids = torch.cat([IDS, torch.tensor([[2, 3]])])
    found = {width: counts.tolist() for width, counts in health.distinct_in_windows(ids, 4)}
    assert found == {1: [2] * 5, 2: [3, 3], 4: [4]}


def test_imbalance_is_the_busiest_rank_over_the_mean() -> None:
    assert health.imbalance(torch.tensor([[3, 1], [2, 2]])).tolist() == [1.5, 1.0]
