"""Qwen3-Next: gated delta nets, and every few layers attention whose heads have gates; zero-centred
norms; many experts and a gated shared one. Qwen3.5 is made of the same."""

from collections.abc import Sequence
from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.families.qwen2_moe import sparse_layers
from moebius.models.family import Family
from moebius.models.layout import FUSED, Layout, Names
from moebius.models.parts import (
    FULL,
    LINEAR,
    activation,
    attention,
    decoder,
    experts,
    feed_forward,
    layer_types,
    layers,
    rope,
)
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.mixer import Mixer
from moebius.nn.mixers.gated_delta import GatedDelta, Projections
from moebius.ops.config import DeltaSizes, Weight


def mixers(reader: ConfigReader, projections: Projections = "apart") -> Sequence[Mixer]:
    """Each layer's: attention in those that layer_types says, or in every so many-th."""
    interval = reader.integer("full_attention_interval", 4)
    usual = [LINEAR if (i + 1) % interval else FULL for i in range(reader.num_layers)]
    types = layer_types(reader, (FULL, LINEAR)) or usual
    if LINEAR in types and activation(reader) != "silu":
        raise reader.error(
            f"hidden_act is {reader.get('hidden_act')!r}; gated delta nets are supported with silu"
        )
    full = attention(reader, rope=rope(reader, 0.25), qk_norm="head", output_gate=True, biases=True)
    sizes = DeltaSizes(
        key_heads=reader.integer("linear_num_key_heads"),
        value_heads=reader.integer("linear_num_value_heads"),
        key_dim=reader.integer("linear_key_head_dim"),
        value_dim=reader.integer("linear_value_head_dim"),
    )
    delta = GatedDelta(sizes, reader.integer("linear_conv_kernel_dim", low=2), projections)
    return [full if kind == FULL else delta for kind in types]


def sparse(reader: ConfigReader, weight: Weight | None = None) -> FeedForwardConfig:
    """Experts, and one that is always on behind a gate."""
    return replace(
        experts(reader, "num_experts", "moe_intermediate_size", weight=weight),
        shared_width=reader.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def read(reader: ConfigReader) -> ModelConfig:
    routed = sparse_layers(reader)
    if not reader.integer("num_experts", low=0):
        routed = [False] * reader.num_layers
    parts = [sparse(reader) if each else feed_forward(reader) for each in routed]
    each = layers(reader, mixers(reader, "grouped"), parts)
    return decoder(reader, each, norm="zero-centred")


def linear_attention(*roles: str) -> Names:
    """A gated delta net's parameters, which checkpoints have beside self_attn, not in it."""
    usual = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
    return {f"self_attn.{role}": f"linear_attn.{role}" for role in (*roles, *usual)}


NAMES = linear_attention("in_proj_qkvz.weight", "in_proj_ba.weight")
FAMILY = Family(read, (Layout(NAMES), Layout({**NAMES, **FUSED})), unused=("mtp.*",))
