"""Capacity, the second-expert policy and jitter against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moebius.moe.capacity import arrival, capacity, kept
from moebius.moe.config import FeedForwardConfig
from moebius.moe.dispatch import LocalDispatcher
from moebius.moe.layer import FeedForward
from moebius.moe.noise import jittered
from moebius.moe.training import TrainingRouting
from moebius.nn.spec import Place
from moebius.ops.config import RouterConfig
from moebius.ops.reference import ReferenceOps

E = 4


def queue(ids: Tensor, room: int, counted: Tensor) -> Tensor:
    """First choices of all tokens from left to right, then second ones: who still finds room."""
    taken, fits = [0] * E, torch.zeros_like(counted)
    for k in range(ids.shape[1]):
        for t in range(len(ids)):
            if counted[t, k]:
                fits[t, k] = taken[ids[t, k]] < room
                taken[ids[t, k]] += 1
    return fits


def chosen(tokens: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed)) + torch.tensor(
        [1.5, 0, 0, 0]
    )
    weights, ids = torch.softmax(logits, -1).topk(k)
    return weights, ids


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 100.0])
def test_first_choices_fill_first(k: int, factor: float) -> None:
    weights, ids = chosen(37, k, seed=k)
    limits = TrainingRouting(
        dropless=False, capacity_factor=factor, eval_capacity_factor=factor, min_capacity=0
    )
    expected = queue(ids, int(factor * 37 * k / E), torch.ones_like(ids, dtype=torch.bool))
    for training in (True, False):
        found = kept(weights, ids, E, limits, training)
        assert found is not None and torch.equal(found, expected)
    assert expected.all() == (factor == 100.0)


def test_capacity_hand_worked() -> None:
    """Switch eq 3: 1,024 tokens over 8 experts at 1.25 are 160; top-2 twice that; at least 4, if
    there are as many."""
    assert capacity(1024, 8, 1, 1.25, 4) == 160
    assert capacity(1024, 8, 2, 1.25, 4) == 320
    assert (capacity(10, 8, 1, 1.0, 4), capacity(3, 8, 1, 1.0, 4), capacity(10, 8, 1, 1.0, 0)) == (
        4,
        3,
        1,
    )
    assert arrival(torch.tensor([[0, 1], [0, 1], [1, 0]]), 2).tolist() == [[0, 1], [1, 2], [0, 2]]


def test_evaluation_has_a_factor_of_its_own_or_none() -> None:
    weights, ids = chosen(40, 2, seed=0)
    limits = TrainingRouting(dropless=False, capacity_factor=0.5)
    assert kept(weights, ids, E, limits, training=False) is None
    assert kept(weights, ids, E, TrainingRouting(), training=True) is None
    dropped = kept(weights, ids, E, limits, training=True)
    assert dropped is not None and not dropped.all()


def test_the_second_policy() -> None:
    """Shares of .9 and .1 of the weights: below the threshold of .2; at random half of them stay
    (.1 / .2)."""
    weights, ids = (
        torch.tensor([[0.45, 0.05], [0.3, 0.2]]).repeat(4000, 1),
        torch.tensor([[0, 1]] * 8000),
    )
    threshold = kept(weights, ids, E, TrainingRouting(second_policy="threshold"), True)
    assert threshold is not None and threshold[:2].tolist() == [[True, False], [True, True]]
    torch.manual_seed(0)
    random = kept(weights, ids, E, TrainingRouting(second_policy="random"), True)
    assert random is not None and random[:, 0].all() and random[1::2, 1].all()
    assert random[0::2, 1].float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert kept(weights, ids, E, TrainingRouting(second_policy="random"), False) is None
    limits = TrainingRouting(
        second_policy="threshold", dropless=False, capacity_factor=0.5, min_capacity=0
    )
    both = kept(weights, ids, E, limits, True)
    assert threshold is not None and both is not None
    assert torch.equal(both, queue(ids, 2000, threshold)), "who does not go takes no room"


def part(config: FeedForwardConfig, limits: TrainingRouting) -> FeedForward:
    ops = ReferenceOps()
    ops.drops = True
    built = FeedForward(config, Place(ops, 8, 1e-6, torch.float32), LocalDispatcher())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    assert built.router is not None
    built.router.limits = limits
    return built


@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("grad", [True, False])
def test_a_dropped_choice_adds_nothing_and_learns_nothing(width: int, grad: bool) -> None:
    limits = TrainingRouting(
        dropless=False, capacity_factor=0.5, eval_capacity_factor=0.25, min_capacity=0
    )
    layer = part(FeedForwardConfig(width, RouterConfig(E, 2, weight="renorm")), limits)
    x_TD = torch.randn(24, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out, routing = layer(x_TD)
    assert routing is not None and routing.kept_TK is not None and not routing.kept_TK.all()
    expected, experts = torch.zeros(24, 8), layer.experts
    for t in range(24):
        for k in range(2):
            if routing.kept_TK[t, k]:
                e, x = routing.expert_ids_TK[t, k], x_TD[t]
                hidden = torch.nn.functional.silu(experts.gate_proj[e] @ x) * (
                    experts.up_proj[e] @ x
                )
                expected[t] = expected[t] + routing.weights_TK[t, k] * (
                    experts.down_proj[e] @ hidden
                )
    torch.testing.assert_close(out, expected)
    if grad:
        mine = torch.autograd.grad(
            out.square().sum(), [x_TD, *layer.parameters()], retain_graph=True
        )
        naive = torch.autograd.grad(expected.square().sum(), [x_TD, *layer.parameters()])
        for a, b in zip(mine, naive, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_jitter_moves_the_routers_input_alone_and_only_in_training() -> None:
    torch.manual_seed(0)
    factors = jittered(torch.ones(1000, 8), 0.01)
    assert (
        factors.min() >= 0.99
        and factors.max() <= 1.01
        and factors.std().item() == pytest.approx(0.02 / 12**0.5, 0.1)
    )
    layer = part(FeedForwardConfig(8, RouterConfig(E, E)), TrainingRouting(jitter=0.5))
    x_TD = torch.randn(6, 8)
    noisy, clean = layer(x_TD)[1], layer.eval()(x_TD)[1]
    assert (
        noisy is not None
        and clean is not None
        and not torch.equal(noisy.logits_TE, clean.logits_TE)
    )
    layer.router.limits = None  # type: ignore[union-attr]
    assert torch.equal(layer.train()(x_TD)[1].logits_TE, clean.logits_TE)


def test_learned_noise_is_as_wide_as_its_layer_says_and_only_in_training() -> None:
    torch.manual_seed(0)
    layer = part(FeedForwardConfig(8, RouterConfig(E, 2, learned_noise=True)), TrainingRouting())
    router, x_TD = layer.router, torch.randn(5, 8)
    assert router is not None and router.noise_weight is not None
    clean_TE = torch.nn.functional.linear(x_TD, router.weight)
    drawn = torch.stack([router(x_TD).logits_TE for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(0), clean_TE, atol=0.1, rtol=0)
    wide_TE = torch.log1p(torch.exp(x_TD @ router.noise_weight.T))
    torch.testing.assert_close(drawn.std(0), wide_TE, atol=0, rtol=0.06)
    router(x_TD).weights_TK.sum().backward()
    assert router.noise_weight.grad is not None and router.noise_weight.grad.abs().sum() > 0
    torch.testing.assert_close(router.eval()(x_TD).logits_TE, clean_TE)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_experts_of_two_matrices(activation: str) -> None:
    config = FeedForwardConfig(8, RouterConfig(E, 2), activation, gated=False)  # type: ignore[arg-type]
    layer = part(config, TrainingRouting())
    x_TD = torch.randn(9, 8)
    function = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[activation]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out, routing = layer(x_TD)
        assert routing is not None and len(layer.experts.up_proj) == 0
        for t in range(9):
            row = sum(
                w * (layer.experts.down_proj[e] @ function(layer.experts.gate_proj[e] @ x_TD[t]))
                for w, e in zip(routing.weights_TK[t], routing.expert_ids_TK[t], strict=True)
            )
            torch.testing.assert_close(out[t], row)
