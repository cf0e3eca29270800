"""Training's faster operations against the reference backend and torch's own losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import Rotation
from moebius.train import ops
from moebius.train.ops import TrainingOps, cross_entropy
from moebius.train.tables import TrainingRecipe


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), inputs)


def test_norm_and_rotation_are_the_references() -> None:
    x_TD, weight_D = _random(9, 16), _random(16, seed=1)
    mine, theirs = (each.rms_norm(x_TD, weight_D, 1e-6) for each in (TrainingOps(), ReferenceOps()))
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(_gradients(mine, x_TD, weight_D), _gradients(theirs, x_TD, weight_D))
    x_THN, angles = _random(9, 2, 8).detach().bfloat16(), _random(9, 4, seed=2).detach()
    rotation = Rotation(angles.cos(), angles.sin())
    rotated = [each.rotary(x_THN, rotation) for each in (TrainingOps(), ReferenceOps())]
    assert torch.equal(*rotated)


@pytest.mark.parametrize("tokens", [1, 5, 12, 13])
def test_cross_entropy_and_its_gradients(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(ops, "LOSS_ROWS", 5)
    x_TD, weight_VD = _random(tokens, 6), _random(11, 6, seed=1)
    target_T = torch.arange(tokens) * 7 % 11
    loss = cross_entropy(x_TD, weight_VD, target_T)
    expected = F.cross_entropy(x_TD @ weight_VD.T, target_T)
    torch.testing.assert_close(loss, expected)
    mine = torch.autograd.grad(3 * loss, (x_TD, weight_VD))
    torch.testing.assert_close(mine, torch.autograd.grad(3 * expected, (x_TD, weight_VD)))


def test_the_learning_rate_by_hand() -> None:
    recipe = TrainingRecipe(
        steps=21, rows_per_step=1, row_length=1, learning_rate=2.0, warmup_steps=10, final_share=0.1
    )
    assert recipe.rate_at(0) == pytest.approx(0.2)
    assert recipe.rate_at(9) == pytest.approx(2.0)
    assert recipe.rate_at(10) == pytest.approx(2.0)
    assert recipe.rate_at(15) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert recipe.rate_at(20) == pytest.approx(0.2)
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.3))
    assert recipe.rate_at(13) == pytest.approx(2.0 * quarter)


def test_dropout_only_while_training_and_harder_within_experts() -> None:
    """Rates .1 and .4: what is kept is divided by .9 and .6, so that the mean stays."""
    torch.manual_seed(0)
    ops_, x = TrainingOps(0.1, 0.4), torch.ones(200, 8)
    assert ops_.dropout_mask(x, 200, routed=True) is None
    ops_.training = True
    for routed, rate in ((False, 0.1), (True, 0.4)):
        out = ops_.dropout_mask(x, 200, routed=routed)
        assert out is not None and out.shape == (200, 200)
        assert (out == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
        assert out.max().item() == pytest.approx(
            1 / (1 - rate)
        ) and out.mean().item() == pytest.approx(1, abs=0.02)
    stream, _ = ops_.add_rms_norm(torch.zeros(200, 8), torch.ones(200, 8), 1.0, torch.ones(8), 1e-6)
    assert (stream == 0).float().mean().item() == pytest.approx(0.1, abs=0.03)
