"""A dense part beside experts, against a loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.errors import ConfigError
from moebius.moe.beside import DenseBeside, FeedForwardBeside, feed_forward
from moebius.moe.config import FeedForwardConfig
from moebius.moe.dispatch import LocalDispatcher
from moebius.moe.experts import Experts
from moebius.moe.layer import FeedForward
from moebius.nn.spec import Place
from moebius.ops import Operation, Ops, Use, select_ops
from moebius.ops.config import RouterConfig
from moebius.ops.reference import ReferenceOps

ROUTER = RouterConfig(5, 2, weight="renorm")
CONFIG = DenseBeside(8, ROUTER, "gelu_tanh", shared_width=10)
EPS = 1e-3


def place(ops: Ops) -> Place:
    return Place(ops, 12, EPS, torch.float32, norm="float32")


def expert(x_D: Tensor, experts: Experts, e: int) -> Tensor:
    gate = F.gelu(experts.gate_proj[e] @ x_D, approximate="tanh")
    return experts.down_proj[e] @ (gate * (experts.up_proj[e] @ x_D))


def normed(x_D: Tensor, weight_D: Tensor | float) -> Tensor:
    return x_D / torch.sqrt((x_D * x_D).mean() + EPS) * weight_D


def naive(part: FeedForwardBeside, x_D: Tensor, stream_D: Tensor) -> Tensor:
    assert part.shared is not None
    direction = normed(stream_D, part.router.norm.weight) / 12**0.5
    p = torch.softmax(part.router.weight @ direction, 0)
    chosen = sorted(range(5), key=lambda e: (-p[e].item(), e))[:2]
    whole = sum(p[e] for e in chosen)
    reads = normed(stream_D, part.experts_norm.weight)
    sparse = sum(
        p[e] / whole * part.router.expert_scale[e] * expert(reads, part.experts, e) for e in chosen
    )
    dense = expert(x_D, part.shared, 0)
    return normed(dense, part.shared_output_norm.weight) + normed(
        torch.as_tensor(sparse), part.experts_output_norm.weight
    )


@pytest.mark.parametrize(
    "ops", [ReferenceOps(), select_ops("cpu", torch.float32)], ids=lambda ops: ops.name
)
@torch.no_grad()
def test_each_row_against_a_loop(ops: Ops) -> None:
    part = feed_forward(CONFIG, place(ops), LocalDispatcher())
    assert isinstance(part, FeedForwardBeside)
    generator = torch.Generator().manual_seed(0)
    for parameter in part.parameters():
        parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    x_TD, stream_TD = (2 * torch.randn(9, 12, generator=generator) for _ in range(2))
    out_TD, routing = part(x_TD, stream_TD)
    wanted = torch.stack([naive(part, *rows) for rows in zip(x_TD, stream_TD, strict=True)])
    torch.testing.assert_close(out_TD, wanted, rtol=1e-4, atol=1e-5)
    assert routing is not None and routing.logits_TE.shape == (9, 5)


def test_parameters_are_those_of_the_module() -> None:
    part = feed_forward(CONFIG, place(ReferenceOps()), LocalDispatcher())
    shapes = {name: tuple(parameter.shape) for name, parameter in part.named_parameters()}
    assert {each.name: each.shape for each in CONFIG.parameters(12)} == shapes
    assert Use(Operation.DIVIDE, torch.float32) in set(CONFIG.uses(torch.bfloat16))


def test_other_configurations_have_the_usual_module() -> None:
    part = feed_forward(FeedForwardConfig(8, ROUTER), place(ReferenceOps()), LocalDispatcher())
    assert type(part) is FeedForward


@pytest.mark.parametrize(
    "changes",
    [{"router": None}, {"shared_width": 0}, {"shared_gate": True}],
)
def test_what_a_dense_part_stands_beside_is_asked_for(changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {"width": 8, "router": ROUTER, "shared_width": 10}
    with pytest.raises(ConfigError, match="shared"):
        DenseBeside(**{**given, **changes})
