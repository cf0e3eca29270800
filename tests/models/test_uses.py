"""What is promised of a model follows from the operations that it really uses."""

from __future__ import annotations

import torch

from moebius.config import FeedForwardConfig, ModelConfig, RopeConfig, RouterConfig
from moebius.models.uses import uses
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps


def model(*layers: FeedForwardConfig) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        hidden_size=64,
        num_layers=len(layers),
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=100,
        max_position_embeddings=64,
        rope=RopeConfig(),
        feed_forward=layers,
        windows=(None,) * len(layers),
    )


def test_one_layer_of_experts_with_two_matrices_is_enough_for_a_no() -> None:
    kernels = CpuOps(1)
    router = RouterConfig(4, 2)
    for gated in (True, False):
        last = FeedForwardConfig(16, router, gated=gated)
        asked = uses(model(FeedForwardConfig(16), last), torch.bfloat16)
        assert kernels.batch_invariant(asked) == gated
        assert not ReferenceOps().batch_invariant(asked)
