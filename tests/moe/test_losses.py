"""The router's losses: hand-worked values, the normalisations of others, and where gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from moebius.moe.losses import chosen_counts, load_balance_loss, router_z_loss, updated_bias
from moebius.moe.router import Routing
from moebius.ops.config import RouterConfig


def routing(logits: Tensor, k: int = 1) -> Routing:
    weights, ids = torch.softmax(logits, -1).topk(k, -1)
    return Routing(weights, ids, logits)


def balance(*routings: Routing | None, **options: object) -> Tensor:
    experts = next(r for r in routings if r is not None).logits_TE.shape[1]
    return load_balance_loss(routings, RouterConfig(experts, 1), **options)  # type: ignore[arg-type]


def test_balance_is_one_when_even_and_the_number_of_experts_when_collapsed() -> None:
    assert balance(routing(torch.full((8, 8), -20.0).fill_diagonal_(20.0))).item() == pytest.approx(
        1.0
    )
    logits = torch.full((5, 8), -30.0)
    logits[:, 3] = 30.0
    assert balance(routing(logits)).item() == pytest.approx(8.0)


def test_balance_hand_worked() -> None:
    """Three tokens, two experts, p = (.8,.2), (.6,.4), (.3,.7): f = (2/3, 1/3), P = (17/30,
    13/30)."""
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    expected = 2 * (2 / 3 * 17 / 30 + 1 / 3 * 13 / 30)
    assert balance(routing(p.log())).item() == pytest.approx(expected)
    # With both experts chosen the load is even whatever the probabilities; but first choices are as
    # above.
    assert balance(routing(p.log(), 2)).item() == pytest.approx(1.0)
    assert balance(routing(p.log(), 2), first_only=True).item() == pytest.approx(expected)


def test_balance_of_sequences_hand_worked() -> None:
    """DeepSeek-V3's: the first two tokens, f = (1, 0), P = (.7, .3), give 1.4; the others, f = (.5,
    .5), give 1."""
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    assert balance(routing(p.log()), sequences=2).item() == pytest.approx((1.4 + 1.0) / 2)
    assert balance(routing(p.log())).item() == pytest.approx(2 * (0.75 * 0.65 + 0.25 * 0.35))


def test_sigmoid_scores_are_divided_by_their_sum() -> None:
    """Logits 0 and ln 3 have scores 1/2 and 3/4, so p = (.4, .6); the second is chosen: 2 * .6."""
    logits = torch.tensor([[0.0, math.log(3.0)]])
    loss = load_balance_loss([routing(logits)], RouterConfig(2, 1, "sigmoid"))
    assert loss.item() == pytest.approx(1.2)


def test_the_parts_of_a_global_batch_make_its_loss_and_its_gradient() -> None:
    """f of the whole with P of each part: two skewed halves, one balanced whole."""
    halves = [torch.tensor([[3.0, 0.0]] * 4), torch.tensor([[0.0, 3.0]] * 4)]
    parts, whole = [h.clone().requires_grad_() for h in halves], torch.cat(halves).requires_grad_()
    counts = [chosen_counts(routing(whole)).view(-1)]
    assert counts[0].tolist() == [4.0, 4.0]
    losses = [balance(routing(part), counts=counts) for part in parts]
    (sum(losses) / 2).backward()  # type: ignore[union-attr]
    balance(routing(whole)).backward()
    assert (
        sum(x.item() for x in losses) / 2
        == pytest.approx(balance(routing(whole)).item())
        == pytest.approx(1.0)
    )
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), whole.grad)
    assert balance(routing(halves[0])).item() > 1.9


def test_mean_over_layers_skips_dense_ones() -> None:
    one, two = routing(torch.randn(9, 4), 2), routing(torch.randn(9, 4), 2)
    torch.testing.assert_close(balance(None, one, None, two), (balance(one) + balance(two)) / 2)
    torch.testing.assert_close(
        router_z_loss([one, None, two]), (router_z_loss([one]) + router_z_loss([two])) / 2
    )


@pytest.mark.parametrize("k", [1, 3])
def test_transformers_normalisation(k: int) -> None:
    """Mixtral's function: K at balance, and all layers in one pool, where opposite imbalances
    cancel out."""
    logits = torch.randn(50, 8)
    theirs = torch.as_tensor(load_balancing_loss_func((logits,), 8, k))
    torch.testing.assert_close(balance(routing(logits, k)) * k, theirs)
    layers = [torch.tensor([[30.0, -30.0]] * 4), torch.tensor([[-30.0, 30.0]] * 4)]
    assert float(load_balancing_loss_func(tuple(layers), 2, 1)) == pytest.approx(1.0)
    assert balance(*map(routing, layers)).item() == pytest.approx(2.0)


def test_switch_transformers_of_transformers() -> None:
    logits = torch.randn(3, 20, 6)
    p = torch.softmax(logits, -1)
    theirs = switch.load_balancing_loss_func(p, p.argmax(-1))
    torch.testing.assert_close(
        balance(routing(logits.flatten(0, 1)), sequences=3), torch.as_tensor(theirs)
    )
    torch.testing.assert_close(
        router_z_loss([routing(logits.flatten(0, 1))]), switch.router_z_loss_func(logits)
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_deepspeed_and_megatron_normalisations(k: int) -> None:
    """DeepSpeed's top1gating and top2gating: me = mean of gates, ce = mean of the first choices'
    mask, l_aux = sum(me * ce) * E. Its topkgating: ce over all choices' masks, divided by k.
    Megatron's switch_load_balancing_loss_func, coefficient 1: sum(sum_t p * counts) * E / (k T^2),
    summed over layers.
    """
    tokens, experts = 40, 8
    layers = [torch.randn(tokens, experts) for _ in range(2)]
    routings = [routing(logits, k) for logits in layers]
    first, every, megatron = [], [], torch.tensor(0.0)
    for r in routings:
        gates = torch.softmax(r.logits_TE, 1)
        mask1 = torch.nn.functional.one_hot(gates.argmax(1), experts).float()
        masks = torch.nn.functional.one_hot(r.expert_ids_TK, experts).float().sum(1)
        first.append((gates.mean(0) * mask1.mean(0)).sum() * experts)
        every.append((gates.mean(0) * masks.mean(0)).mean() * experts * experts / k)
        megatron = megatron + (gates.sum(0) * masks.sum(0)).sum() * (
            experts / (tokens * tokens * k)
        )
    torch.testing.assert_close(balance(*routings, first_only=True), torch.stack(first).mean())
    torch.testing.assert_close(balance(*routings), torch.stack(every).mean())
    torch.testing.assert_close(balance(*routings) * len(layers), megatron)


def test_z_loss_hand_worked() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0, 0.0]])
    expected = (math.log(4.0) ** 2 + math.log(5.0) ** 2) / 2
    assert router_z_loss([routing(logits)]).item() == pytest.approx(expected)


def test_bias_hand_worked() -> None:
    """Counts 4, 2, 0 around a mean of 2: the first falls, the last rises."""
    bias = updated_bias(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([4, 2, 0]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([0.4, 0.5, 0.6]))


def test_gradient_moves_load_away_from_the_crowded_expert() -> None:
    logits = torch.zeros(6, 3)
    logits[:, 1] = 1.0
    logits.requires_grad_(True)
    balance(routing(logits)).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 1] > 0).all() and (logits.grad[:, [0, 2]] < 0).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_against_finite_differences_in_float64(score: str) -> None:
    config = RouterConfig(5, 2, score)  # type: ignore[arg-type]
    logits = torch.randn(4, 5, dtype=torch.float32, requires_grad=True)
    ids = logits.detach().topk(2).indices

    def total(x: Tensor) -> Tensor:
        r = Routing(x, ids, x)
        return load_balance_loss([r], config) + router_z_loss([r])

    total(logits).backward()
    assert logits.grad is not None
    for t, e in ((0, 0), (2, 3), (3, 4)):
        x = logits.detach().double()
        p = [x.clone(), x.clone()]
        p[0][t, e] += 1e-5
        p[1][t, e] -= 1e-5
        values = []
        for y in p:
            scores = torch.sigmoid(y) if score == "sigmoid" else torch.exp(y)
            share = torch.nn.functional.one_hot(ids, 5).double().mean((0, 1))
            mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
            values.append(5 * (share * mean).sum() + y.exp().sum(-1).log().square().mean())
        slope = ((values[0] - values[1]) / 2e-5).item()
        assert logits.grad[t, e].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)
