"""What is promised of a model follows from the operations that it really uses."""

from __future__ import annotations

import torch

from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.uses import uses
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.rope import RopeConfig
from moebius.ops.config import RouterConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps


def model(*layers: FeedForwardConfig) -> ModelConfig:
    attention = GQA(4, 2, 16, rope=RopeConfig())
    return ModelConfig(
        model_type="llama",
        hidden_size=64,
        vocab_size=100,
        context=64,
        layers=tuple(LayerSpec(attention, layer) for layer in layers),
    )


def test_one_layer_of_experts_with_two_matrices_is_enough_for_a_no() -> None:
    kernels = CpuOps(1)
    router = RouterConfig(4, 2)
    for gated in (True, False):
        last = FeedForwardConfig(16, router, gated=gated)
        asked = uses(model(FeedForwardConfig(16), last), torch.bfloat16)
        assert kernels.batch_invariant(asked) == gated
        assert not ReferenceOps().batch_invariant(asked)
