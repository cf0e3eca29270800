"""The router's losses: hand-worked values, transformers' normalisation, and where gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moebius.moe.losses import load_balance_loss, pooled_balance_loss, router_z_loss
from moebius.moe.router import Routing


def routing(logits: Tensor, k: int = 1) -> Routing:
    weights, ids = torch.softmax(logits, -1).topk(k, -1)
    return Routing(weights, ids, logits)


def test_balance_is_one_when_even() -> None:
    logits = torch.full((8, 8), -20.0).fill_diagonal_(20.0)
    assert load_balance_loss([routing(logits)]).item() == pytest.approx(1.0)


def test_balance_is_the_number_of_experts_when_collapsed() -> None:
    logits = torch.full((5, 8), -30.0)
    logits[:, 3] = 30.0
    assert load_balance_loss([routing(logits)]).item() == pytest.approx(8.0)


def test_balance_hand_worked() -> None:
    """Three tokens, two experts, p = (.8,.2), (.6,.4), (.3,.7): f = (2/3, 1/3), P = (17/30, 13/30)."""
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    expected = 2 * (2 / 3 * 17 / 30 + 1 / 3 * 13 / 30)
    assert load_balance_loss([routing(p.log())]).item() == pytest.approx(expected)
    # With both experts chosen the load is even whatever the probabilities.
    assert load_balance_loss([routing(p.log(), 2)]).item() == pytest.approx(1.0)


def test_mean_over_layers_skips_dense_ones() -> None:
    one, two = routing(torch.randn(9, 4), 2), routing(torch.randn(9, 4), 2)
    mean = (load_balance_loss([one]) + load_balance_loss([two])) / 2
    torch.testing.assert_close(load_balance_loss([None, one, None, two]), mean)
    mean = (router_z_loss([one]) + router_z_loss([two])) / 2
    torch.testing.assert_close(router_z_loss([one, None, two]), mean)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pooled_equals_transformers(k: int) -> None:
    layers = tuple(torch.randn(33, 6) for _ in range(3))
    ours = pooled_balance_loss([routing(logits, k) for logits in layers])
    torch.testing.assert_close(ours, torch.as_tensor(load_balancing_loss_func(layers, 6, k)))


@pytest.mark.parametrize("k", [1, 3])
def test_one_layer_is_transformers_divided_by_k(k: int) -> None:
    logits = torch.randn(50, 8)
    theirs = torch.as_tensor(load_balancing_loss_func((logits,), 8, k))
    torch.testing.assert_close(load_balance_loss([routing(logits, k)]) * k, theirs)


def test_pooling_hides_what_the_mean_over_layers_sees() -> None:
    """Two layers, each collapsed onto another expert, look balanced when pooled."""
    first, second = torch.tensor([[30.0, -30.0]] * 4), torch.tensor([[-30.0, 30.0]] * 4)
    layers = [routing(first), routing(second)]
    assert pooled_balance_loss(layers).item() == pytest.approx(1.0)
    assert load_balance_loss(layers).item() == pytest.approx(2.0)


def test_z_loss_hand_worked() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0, 0.0]])
    expected = (math.log(4.0) ** 2 + math.log(5.0) ** 2) / 2
    assert router_z_loss([routing(logits)]).item() == pytest.approx(expected)


def test_gradient_moves_load_away_from_the_crowded_expert() -> None:
    logits = torch.zeros(6, 3)
    logits[:, 1] = 1.0
    logits.requires_grad_(True)
    load_balance_loss([routing(logits)]).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 1] > 0).all() and (logits.grad[:, [0, 2]] < 0).all()


def test_gradient_of_z_loss_equals_finite_difference() -> None:
    logits = torch.randn(4, 5, dtype=torch.float32, requires_grad=True)
    router_z_loss([routing(logits)]).backward()
    step = torch.zeros_like(logits)
    step[2, 3] = 1e-2
    with torch.no_grad():
        slope = (router_z_loss([routing(logits + step)]) - router_z_loss([routing(logits - step)])) / 2e-2
    assert logits.grad is not None and logits.grad[2, 3].item() == pytest.approx(slope.item(), rel=1e-2)
