"""What keys with biases are held less in an int8 cache: what lasts of a bias at any position; and how
much closer a model with large ones comes to what it computes with keys as they are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moebius.engine.kv_cache import KVCache
from moebius.engine.workspace import forward
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.decoder import Decoder
from moebius.models.key_offsets import key_offsets
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA, Attention
from moebius.nn.rope import RopeConfig, frequencies
from moebius.ops import Ops
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.steps import StepInputs

CONTEXT = 4096
HEAD_DIM = 16
ROPE = RopeConfig(theta=1e6)
BIASED = GQA(4, 2, HEAD_DIM, rope=ROPE, qkv_bias=True)


def model(mixer: GQA = BIASED) -> ModelConfig:
    return ModelConfig(
        model_type="qwen2",
        hidden_size=32,
        vocab_size=50,
        context=CONTEXT,
        layers=(LayerSpec(mixer, FeedForwardConfig(48)),) * 2,
    )


def decoder_of(config: ModelConfig, ops: Ops) -> Decoder:
    """Random weights, the same for all ops; key biases of 50 to 100 in three slow pairs."""
    decoder = Decoder(config, ops)
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.25 * drawn + float(parameter.ndim == 1))
    for layer in decoder.layers:
        bias = layer.self_attn.k_proj.bias  # type: ignore[union-attr]
        if bias is not None:
            slow = bias.data.view(2, 2, HEAD_DIM // 2)[:, :, -3:]
            slow += 50 + 50 * torch.rand(slow.shape, generator=generator)
    return decoder.requires_grad_(False)


def by_hand(bias_N: Tensor, rope: RopeConfig | None) -> Tensor:
    """The bias as it lies at many positions, of which those from 1 to 10 count as those from 1,000
    to 10,000, averaged one after the other."""
    if rope is None:
        return bias_N
    inverse, factor = frequencies(rope, HEAD_DIM)
    half = len(inverse)
    total = torch.zeros(HEAD_DIM, dtype=torch.float64)
    steps = 1024
    for i in range(steps):
        position = math.exp(math.log(CONTEXT) * i / (steps - 1)) - 1
        for n in range(HEAD_DIM):
            if n >= 2 * half:
                total[n] += bias_N[n]
                continue
            angle = position * float(inverse[n % half])
            partner = float(bias_N[n + half]) if n < half else float(bias_N[n - half])
            turned = (-partner if n < half else partner) * math.sin(angle)
            total[n] += factor * (float(bias_N[n]) * math.cos(angle) + turned)
    return total / steps


@pytest.mark.parametrize("rope", [ROPE, replace(ROPE, partial=0.5), None], ids=repr)
def test_an_offset_is_what_lasts_of_the_bias(rope: RopeConfig | None) -> None:
    decoder = decoder_of(model(replace(BIASED, rope=rope)), ReferenceOps())
    for layer, offset in zip(decoder.layers, key_offsets(decoder), strict=True):
        attention = layer.self_attn
        assert isinstance(attention, Attention) and offset is not None
        assert offset.dtype == torch.float32 and offset.shape == (2, HEAD_DIM)
        assert attention.k_proj.bias is not None
        for bias, found in zip(attention.k_proj.bias.view(2, -1), offset, strict=True):
            torch.testing.assert_close(
                found.double(), by_hand(bias, rope).double(), rtol=0, atol=0.05
            )


@pytest.mark.parametrize(
    "mixer", [replace(BIASED, qkv_bias=False), replace(BIASED, qk_norm="head")]
)
def test_keys_without_biases_or_normed_behind_them_are_held_as_they_are(mixer: GQA) -> None:
    assert key_offsets(decoder_of(model(mixer), ReferenceOps())) == [None, None]


def test_it_is_the_same_for_every_backend() -> None:
    found = [key_offsets(decoder_of(model(), ops)) for ops in (ReferenceOps(), CpuOps(1))]
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


@torch.inference_mode()
def log_probabilities(
    decoder: Decoder, kv_dtype: torch.dtype, offsets: list[Tensor | None]
) -> Tensor:
    """Of 200 tokens, through a cache."""
    specs = decoder.config.caches(decoder.dtype, kv_dtype)
    device = torch.device("cpu")
    cache = KVCache(
        specs, decoder.ops, num_blocks=13, block_size=16, device=device, key_offsets=offsets
    )
    ids = torch.randint(0, 50, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    step = StepInputs.build([ids], [0], [list(range(13))], 16)
    return torch.log_softmax(decoder.logits(forward(decoder, cache, step)).double(), dim=-1)


@pytest.mark.parametrize("ops", [ReferenceOps(), CpuOps(1)], ids=lambda ops: str(ops.name))
@pytest.mark.parametrize("change", [{}, {"sinks": True}, {"softcap": 200.0}], ids=repr)
def test_a_model_with_large_biases_comes_closer_by_far(ops: Ops, change: dict[str, float]) -> None:
    """Mean divergence from what it says with keys and values as they are."""
    decoder = decoder_of(model(replace(BIASED, **change)), ops)  # type: ignore[arg-type]
    plain = log_probabilities(decoder, torch.float32, [])

    def divergence(offsets: list[Tensor | None]) -> float:
        found = log_probabilities(decoder, torch.int8, offsets)
        return (plain.exp() * (plain - found)).sum(-1).mean().item()

    less = divergence(key_offsets(decoder))
    assert less < 0.05 * divergence([]) and less < 1e-3
