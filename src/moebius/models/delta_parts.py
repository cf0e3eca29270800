"""What families of gated delta nets (Qwen3-Next, Qwen3.5) spell alike in config.json and in their
checkpoints: as moebius.models.parts, for them alone."""

from collections.abc import Sequence
from dataclasses import replace

from moebius.models.layout import Names
from moebius.models.parts import (
    FULL,
    LINEAR,
    activation,
    attention,
    experts,
    layer_types,
    rope,
)
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.mixer import Mixer
from moebius.nn.mixers.gated_delta import GatedDelta, Projections
from moebius.ops.config import DeltaSizes, Weight


def mixers(reader: ConfigReader, projections: Projections = "apart") -> Sequence[Mixer]:
    """Each layer's: attention in those that layer_types says, or in every so many-th.

    The heads of attention have gates, and a part of each turns.
    """
    interval = reader.integer("full_attention_interval", 4)
    usual = [LINEAR if (i + 1) % interval else FULL for i in range(reader.num_layers)]
    types = layer_types(reader, (FULL, LINEAR)) or usual
    if LINEAR in types and activation(reader) != "silu":
        raise reader.error(
            f"hidden_act is {reader.get('hidden_act')!r}; gated delta nets are supported with silu"
        )
    full = attention(reader, rope=rope(reader, 0.25), qk_norm="head", gated="queries", biases=True)
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


def linear_attention(*projections: str) -> Names:
    """A gated delta net's parameters, which checkpoints have beside self_attn, not in it."""
    others = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
    roles = (*(f"{name}.weight" for name in projections), *others)
    return {f"self_attn.{role}": f"linear_attn.{role}" for role in roles}
