"""The mixture layer against a loop over tokens that is too simple to be wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.moe.config import FeedForwardConfig
from moebius.moe.dispatch import LocalDispatcher
from moebius.moe.layer import FeedForward
from moebius.nn.spec import Place
from moebius.ops import Ops, select_ops
from moebius.ops.config import RouterConfig
from moebius.ops.reference import ReferenceOps

D = 16


def layer(
    config: FeedForwardConfig, dtype: torch.dtype = torch.float32, ops: Ops | None = None
) -> FeedForward:
    place = Place(ops or select_ops("cpu", dtype), D, 1e-6, dtype)
    built = FeedForward(config, place, LocalDispatcher())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return built


def mlp(x_D: Tensor, part: FeedForward, e: int, shared: bool = False) -> Tensor:
    experts = part.shared if shared else part.experts
    assert experts is not None
    return experts.down_proj[e] @ (F.silu(experts.gate_proj[e] @ x_D) * (experts.up_proj[e] @ x_D))


def naive(part: FeedForward, x_TD: Tensor) -> Tensor:
    """Token by token, choice by choice."""
    assert part.router is not None
    k = part.router.config.top_k
    rows = []
    for x_D in x_TD:
        p = torch.softmax(part.router.weight @ x_D, 0)
        chosen = sorted(range(len(p)), key=lambda e: (-p[e].item(), e))[:k]
        out = sum(p[e] / sum(p[c] for c in chosen) * mlp(x_D, part, e) for e in chosen)
        if part.shared is not None:
            gate = (
                torch.sigmoid(part.shared_gate.weight[0] @ x_D)
                if part.shared_gate is not None
                else 1.0
            )
            out = out + gate * mlp(x_D, part, 0, shared=True)
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 1), (6, 2), (8, 8)])
@pytest.mark.parametrize("width", [8, 10])
@pytest.mark.parametrize("shared", [0, 6])
def test_equals_the_loop_with_and_without_gradients(
    experts: int, k: int, width: int, shared: int
) -> None:
    """Width 8 takes the grouped products when gradients are wanted, width 10 the loop over
    experts."""
    config = FeedForwardConfig(
        width,
        RouterConfig(experts, k, weight="renorm"),
        shared_width=shared,
        shared_gate=shared > 0,
    )
    part = layer(config, ops=ReferenceOps())
    x_TD = torch.randn(13, D, generator=torch.Generator().manual_seed(1))
    expected = naive(part, x_TD)
    part_grads = torch.autograd.grad(
        expected.square().sum(), list(part.parameters()), allow_unused=True
    )

    out, routing = part(x_TD)
    assert routing is not None and routing.expert_ids_TK.shape == (13, k)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(part(x_TD)[0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(config)(x_TD)[0], expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.square().sum(), list(part.parameters()), allow_unused=True)
    for ours, theirs in zip(grads, part_grads, strict=True):
        filled = torch.zeros_like(ours) if theirs is None and ours is not None else theirs
        if ours is not None:
            torch.testing.assert_close(ours, filled, rtol=1e-3, atol=1e-4)
        else:
            assert theirs is None or not theirs.any()


def test_no_tokens_and_one_token() -> None:
    config = FeedForwardConfig(8, RouterConfig(6, 2))
    for part, grad in ((layer(config), False), (layer(config, ops=ReferenceOps()), True)):
        with torch.set_grad_enabled(grad):
            assert part(torch.zeros(0, D))[0].shape == (0, D)
            assert part(torch.ones(1, D))[0].shape == (1, D)


@torch.inference_mode()
def test_dense_is_one_expert_without_a_router() -> None:
    part = layer(FeedForwardConfig(10))
    x_TD = torch.randn(3, D)
    out, routing = part(x_TD)
    assert routing is None and part.router is None
    torch.testing.assert_close(
        out, torch.stack([mlp(x, part, 0) for x in x_TD]), rtol=1e-4, atol=1e-5
    )


def test_expert_biases() -> None:
    part = layer(FeedForwardConfig(8, RouterConfig(4, 2), bias=True))
    x_TD = torch.randn(5, D)
    w = part.experts
    with torch.no_grad():
        out, routing = part(x_TD)
    assert routing is not None
    for t, x in enumerate(x_TD):
        row = torch.zeros(D)
        for weight, e in zip(routing.weights_TK[t], routing.expert_ids_TK[t].tolist(), strict=True):
            gated = F.silu(w.gate_proj[e] @ x + w.gate_bias[e]) * (w.up_proj[e] @ x + w.up_bias[e])
            row = row + weight * (w.down_proj[e] @ gated + w.down_bias[e])
        torch.testing.assert_close(out[t], row, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu_squared"])
def test_activations(activation: str) -> None:
    part = layer(FeedForwardConfig(8, activation=activation))  # type: ignore[arg-type]
    functions = {
        "silu": F.silu,
        "gelu": F.gelu,
        "relu": F.relu,
        "relu_squared": lambda x: F.relu(x) ** 2,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    x_TD, w = torch.randn(3, D), part.experts
    hidden = functions[activation](x_TD @ w.gate_proj[0].T) * (x_TD @ w.up_proj[0].T)
    torch.testing.assert_close(part(x_TD)[0], hidden @ w.down_proj[0].T)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    part = layer(FeedForwardConfig(8, RouterConfig(6, 2)))
    x_TD = torch.randn(40, D)
    with torch.inference_mode():
        together = part(x_TD)[0]
        alone = torch.cat([part(x.unsqueeze(0))[0] for x in x_TD])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_expert_outputs_are_rounded_before_the_weighted_sum() -> None:
    """In bfloat16 the sum runs in float32 over rounded outputs, in routing order: to the bit."""
    part = layer(FeedForwardConfig(8, RouterConfig(5, 3)), torch.bfloat16)
    x_TD = torch.randn(200, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    ones_T1 = torch.ones(len(x_TD), 1)
    with torch.inference_mode():
        out, routing = part(x_TD)
        assert routing is not None
        total_TD = torch.zeros(len(x_TD), D)
        for k in range(3):
            ids_T1 = routing.expert_ids_TK[:, k : k + 1].contiguous()
            alone_TD = part.experts(x_TD, ones_T1, ids_T1)
            naive_TD = torch.stack(
                [mlp(x, part, int(e)) for x, e in zip(x_TD, ids_T1, strict=True)]
            )
            torch.testing.assert_close(alone_TD, naive_TD, rtol=0.02, atol=0.06)
            total_TD = torch.addcmul(total_TD, alone_TD.float(), routing.weights_TK[:, k : k + 1])
    assert torch.equal(out, total_TD.bfloat16())


def test_autocast_keeps_float32_parameters() -> None:
    part = layer(FeedForwardConfig(8, RouterConfig(4, 2)), ops=ReferenceOps())
    x_TD = torch.randn(9, D)
    with torch.autocast("cpu", torch.bfloat16):
        out, routing = part(x_TD)
        loss = out.float().square().sum()
    loss.backward()
    assert routing is not None and routing.logits_TE.dtype == torch.float32
    torch.testing.assert_close(out.float(), part(x_TD)[0], rtol=0.05, atol=0.1)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in part.parameters())
