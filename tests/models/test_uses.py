"""What is promised of a model follows from the operations that it really uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from covering import each_value
from moebius.engine.workspace import StepRows, plan_workspace
from moebius.errors import ConfigError
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.family import model_config
from moebius.models.uses import check_served, uses
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.mixers.latent import MLA
from moebius.nn.rope import RopeConfig
from moebius.ops import Feature, Operation, Ops, Use
from moebius.ops.config import RouterConfig
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from oracle import FAMILY, tiny_model

PLAIN = GQA(4, 2, 16, rope=RopeConfig())


def model(*layers: FeedForwardConfig, attention: GQA = PLAIN) -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        hidden_size=64,
        vocab_size=100,
        context=64,
        layers=tuple(LayerSpec(attention, layer) for layer in layers),
    )


def test_experts_of_two_matrices_and_with_a_capacity_ask_for_what_they_need() -> None:
    plain = FeedForwardConfig(16, RouterConfig(4, 1))
    two = replace(plain, router=RouterConfig(4, 1, capacity=3), gated=False)
    found = uses(model(two), torch.bfloat16) - uses(model(plain), torch.bfloat16)
    features = frozenset({Feature.TWO_MATRICES})
    assert found == {
        Use(Operation.EXPERTS, torch.bfloat16, features),
        Use(Operation.WITHIN_CAPACITY, torch.float32),
    }
    assert CpuOps(1).batch_invariant(found) and not ReferenceOps().batch_invariant(found)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"window": 8}, Feature.WINDOW),
        ({"softcap": 50.0}, Feature.SOFTCAP),
        ({"sinks": True}, Feature.SINKS),
        ({"value_dim": 8}, Feature.VALUE_SIZE),
    ],
)
def test_attention_asks_for_what_its_record_has(change: dict[str, Any], feature: Feature) -> None:
    plain = uses(model(FeedForwardConfig(16)), torch.bfloat16)
    config = model(FeedForwardConfig(16), attention=replace(PLAIN, **change))
    (more,) = uses(config, torch.bfloat16) - plain
    assert more == Use(Operation.PAGED_ATTENTION, torch.bfloat16, frozenset({feature}))


@pytest.mark.parametrize("ops", [CpuOps(1), ReferenceOps()], ids=lambda ops: ops.name)
def test_every_feature_of_attention_is_served(ops: Ops) -> None:
    every = replace(PLAIN, window=8, softcap=50.0, sinks=True, value_dim=8)
    check_served(model(FeedForwardConfig(16), attention=every), torch.float32, ops)


def test_what_a_backend_lacks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"operations lack .*: add_rms_norm in float16, .*linear"):
        check_served(model(FeedForwardConfig(16)), torch.float16, CpuOps(1))


EVERYTHING = ModelConfig(
    model_type="test",
    hidden_size=64,
    vocab_size=100,
    context=64,
    layers=(
        LayerSpec(
            replace(PLAIN, qk_norm="full", clip_qkv=1.0, softcap=5.0, sinks=True, window=8),
            FeedForwardConfig(16, RouterConfig(4, 2), shared_width=16, shared_gate=True),
            "sandwich",
        ),
    ),
    logits_divisor=2.0,
    logits_softcap=30.0,
)
OPTIONS = {"olmoe": {"clip_qkv": 0.5}, "mistral": {"sliding_window": 4}}


@pytest.mark.parametrize(
    ("model_type", "kv_dtype"), each_value([*FAMILY, "everything"], [torch.int8, None])
)
def test_what_a_step_calls_is_what_was_asked_for(
    model_type: str, kv_dtype: torch.dtype | None
) -> None:
    """What is left out would be refused in the middle of a step; what is too much, for nothing."""
    config = EVERYTHING
    if model_type != "everything":
        config = model_config(
            tiny_model(model_type, **OPTIONS.get(model_type, {})).config.to_dict()
        )
    decoder = Decoder(config, CpuOps(1), torch.bfloat16, device="meta")
    if kv_dtype is not None and any(isinstance(mixer, MLA) for mixer in config.mixers):
        with pytest.raises(ConfigError, match="latents are held as they are computed"):
            plan_workspace(decoder, 16, StepRows(8, 8), 64, kv_dtype)
        return
    followed = plan_workspace(decoder, 16, StepRows(8, 8), 64, kv_dtype)
    assert followed.reason == ""
    asked = {(use.operation, use.features) for use in uses(config, torch.bfloat16, kv_dtype)}
    cached = {use for use in followed.uses if Feature.INT8_CACHE in use.features}
    assert bool(cached) == (kv_dtype is not None)
    assert {(use.operation, use.features) for use in followed.uses} == asked
