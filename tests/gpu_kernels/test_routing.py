"""Routers in Triton beside plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from moebius.ops import RouterTally
from moebius.ops.config import RouterConfig
from moebius.ops.reference import ReferenceOps
from moebius.ops.triton import TritonOps, routing
from moebius.ops.triton.kernels import routing as kernels

pytestmark = pytest.mark.usefixtures("seeded")

OPS = TritonOps()
REF = ReferenceOps()
ROUTERS = {
    "softmax": RouterConfig(8, 2),
    "one of one": RouterConfig(1, 1),
    "renorm": RouterConfig(7, 3, weight="renorm", renorm_eps=1e-20, scale=2.5),
    "least": RouterConfig(7, 2, score="sigmoid", weight="renorm", renorm_least=1.5),
    "softmax of chosen": RouterConfig(5, 4, score="logits", weight="softmax", logit_softcap=3.0),
    "sigmoid of chosen": RouterConfig(6, 1, score="logits", weight="sigmoid"),
    "bias": RouterConfig(9, 3, score="sigmoid", selection_bias=True),
    "groups by max": RouterConfig(12, 3, num_groups=3, groups_kept=2),
    "groups by two": RouterConfig(
        20,
        4,
        score="sigmoid",
        weight="renorm",
        selection_bias=True,
        num_groups=4,
        groups_kept=1,
        group_score="top2",
        group_fill="never",
    ),
    "groups of one": RouterConfig(3, 2, num_groups=3, groups_kept=2, group_score="top2"),
}


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
def test_choices_and_weights(config: RouterConfig) -> None:
    logits = torch.randn(6, config.num_experts, device=DEVICE) * 3
    # Ties, of zeros of both signs among others.
    logits[1] = 0.0
    logits[1, ::2] = -0.0
    logits[2] = logits[2].round()
    bias = torch.randn(config.num_experts, device=DEVICE)
    scale = torch.rand(config.num_experts, device=DEVICE)
    found = OPS.route(logits, config, bias, expert_scale_E=scale)
    wanted = REF.route(logits, config, bias, expert_scale_E=scale)
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-7)
    alone = OPS.route(logits[3:4], config, bias, expert_scale_E=scale)
    assert torch.equal(alone[0][0], found[0][3]) and torch.equal(alone[1][0], found[1][3])


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]], device=DEVICE)
    _, ids = OPS.route(logits, RouterConfig(5, 4))
    assert ids.tolist() == [[1, 2, 4, 0]]
    _, ids = OPS.route(
        torch.zeros(1, 8, device=DEVICE), RouterConfig(8, 3, num_groups=4, groups_kept=2)
    )
    assert ids.tolist() == [[0, 1, 2]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_numbers_that_went_wrong_still_name_experts() -> None:
    logits = torch.full((2, 5), float("nan"), device=DEVICE)
    logits[1, 1:] = float("-inf")
    _, ids = OPS.route(logits, RouterConfig(5, 3))
    assert all(len(set(row)) == 3 and set(row) <= set(range(5)) for row in ids.tolist())


def test_no_tokens_and_a_tally() -> None:
    config = RouterConfig(4, 2)
    tally = RouterTally(
        torch.zeros(4, dtype=torch.int64, device=DEVICE),
        torch.zeros(2, dtype=torch.float64, device=DEVICE),
    )
    weights, ids = OPS.route(torch.empty(0, 4, device=DEVICE), config, tally=tally)
    assert weights.shape == ids.shape == (0, 2) and not tally.pairs_E.any()
    _, ids = OPS.route(torch.zeros(3, 4, device=DEVICE), config, tally=tally)
    assert tally.pairs_E.tolist() == [3, 3, 0, 0]
    nats = 3 * torch.tensor(4.0, dtype=torch.float64).log()
    torch.testing.assert_close(tally.sums.cpu(), torch.tensor([nats, 3.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "config",
    [
        RouterConfig(5, 3, logit_softcap=2.0),
        RouterConfig(6, 1, score="sigmoid", weight="renorm"),
        RouterConfig(4, 2, score="logits", weight="softmax"),
    ],
    ids=str,
)
def test_a_tally_is_what_counting_one_by_one_finds(config: RouterConfig) -> None:
    """On top of what it held; a token whose numbers went wrong has choices, but no entropy."""
    logits = 3 * torch.randn(7, config.num_experts, device=DEVICE)
    logits[2] = 1e4
    logits[3, :-1] = -1e4
    logits[5, 1] = torch.nan
    tally = RouterTally(
        torch.arange(config.num_experts, device=DEVICE),
        torch.tensor([0.5, 2.0], dtype=torch.float64, device=DEVICE),
    )
    _, ids = OPS.route(logits, config, tally=tally)
    expected = list(range(config.num_experts))
    for id in ids.flatten().tolist():
        expected[id] += 1
    assert tally.pairs_E.tolist() == expected
    nats = 0.0
    for token in [0, 1, 2, 3, 4, 6]:
        x = logits[token].double()
        if config.logit_softcap is not None:
            x = config.logit_softcap * torch.tanh(x / config.logit_softcap)
        p = x.softmax(0) if config.score != "sigmoid" else x.sigmoid() / x.sigmoid().sum()
        nats -= sum(each * math.log(each) for each in p.tolist() if each > 1e-300)
    torch.testing.assert_close(
        tally.sums.cpu(), torch.tensor([0.5 + nats, 8.0], dtype=torch.float64), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_each_sequence_has_its_own_room(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a loop over choices; more of a sequence than are looked at in one step."""
    monkeypatch.setattr(routing, "_LOOKED_AT", 16)
    starts = [0, 3, 3, 20]
    weights = torch.rand(20, 2, device=DEVICE) + 0.1
    ids = torch.randint(0, 3, (20, 2), device=DEVICE)
    plan = OPS.plan_documents(starts, DEVICE)
    found = OPS.within_capacity(weights, ids, 3, capacity, plan).tolist()
    for start, stop in pairwise(starts):
        taken = [0, 0, 0]
        for token in range(start, stop):
            for k, id in enumerate(ids[token].tolist()):
                taken[id] += 1
                wanted = weights[token, k].item() if taken[id] <= capacity else 0.0
                assert found[token][k] == wanted
    none = OPS.plan_documents([0], DEVICE)
    assert OPS.within_capacity(weights[:0], ids[:0], 3, 1, none).shape == (0, 2)
    with pytest.raises(ValueError, match="and their experts"):
        OPS.within_capacity(weights, ids[:, :1], 3, 1, plan)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="a router of 4 experts has 5 logits"):
        OPS.route(torch.zeros(1, 5, device=DEVICE), RouterConfig(4, 2))
    with pytest.raises(ValueError, match="with a selection bias, and none is given"):
        OPS.route(torch.zeros(1, 4, device=DEVICE), RouterConfig(4, 2, selection_bias=True))
    with pytest.raises(ValueError, match="a scale of experts of 4 experts has the shape"):
        OPS.route(
            torch.zeros(1, 4, device=DEVICE),
            RouterConfig(4, 2),
            expert_scale_E=torch.zeros(3, device=DEVICE),
        )


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
def test_it_compiles() -> None:
    with launches() as seen:
        config = replace(ROUTERS["groups by two"], logit_softcap=3.0)
        of_experts = torch.zeros(config.num_experts)
        OPS.route(torch.zeros(5, config.num_experts), config, of_experts, None, of_experts)
        sums = torch.zeros(2, dtype=torch.float64)
        tally = RouterTally(torch.zeros(128, dtype=torch.int64), sums)
        for score in ("softmax", "sigmoid"):
            config = RouterConfig(128, 8, score=score)
            OPS.route(torch.zeros(5, 128), config, None, tally)
        ids = torch.zeros(5, 8, dtype=torch.int64)
        OPS.within_capacity(torch.zeros(5, 8), ids, 128, 3, OPS.plan_documents([0, 5]))
    assert_compile(seen, kernels)
