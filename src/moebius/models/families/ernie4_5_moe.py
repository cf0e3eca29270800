"""ERNIE 4.5 MoE: softmax scores with a selection bias, shared experts, and heads whose neighbouring
values turn together."""

from dataclasses import replace

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import (
    SHARED_WIDTH,
    USUAL_KEYS,
    GgufArchitecture,
    Key,
    expert_keys,
    meaning,
)
from moebius.models.layout import FUSED, Layout, Names, Stacked
from moebius.models.parts import attention, decoder, experts, feed_forward, layers, rope
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig


def sparse(reader: ConfigReader) -> FeedForwardConfig:
    plain = experts(
        reader, "moe_num_experts", "moe_intermediate_size", weight="renorm", chosen="moe_k"
    )
    assert plain.router is not None
    least = reader.number("moe_norm_min")
    router = replace(plain.router, selection_bias=True, renorm_least=least, float32=True)
    shared_width = plain.width * reader.integer("moe_num_shared_experts", low=0)
    return replace(plain, router=router, shared_width=shared_width)


def sparse_layers(reader: ConfigReader) -> list[bool]:
    """Every moe_layer_interval-th, of those from moe_layer_start_index to moe_layer_end_index."""
    step = reader.integer("moe_layer_interval")
    first = reader.integer("moe_layer_start_index", low=0)
    last = reader.integer("moe_layer_end_index", low=-1)
    last = reader.num_layers - 1 if last == -1 else last
    return [first <= i <= last and (i + 1) % step == 0 for i in range(reader.num_layers)]


def read(reader: ConfigReader) -> ModelConfig:
    routed = sparse(reader)
    dense = feed_forward(reader)
    parts = [routed if has_experts else dense for has_experts in sparse_layers(reader)]
    mixer = attention(reader, rope=replace(rope(reader), interleaved=True))
    return decoder(reader, layers(reader, mixer, parts))


SHARED = layout.shared("mlp.shared_experts.{p}")
BIAS = "moe_statics.e_score_correction_bias"
PUBLISHED: Names = {**SHARED, "mlp.router.selection_bias": Stacked(f"mlp.{BIAS}")}
CONVERTED: Names = {**SHARED, **FUSED, "mlp.router.selection_bias": Stacked(f"mlp.gate.{BIAS}")}
GGUF = GgufArchitecture(
    "ernie4_5-moe",
    (
        *USUAL_KEYS,
        *expert_keys("moe_num_experts", "moe_intermediate_size", "moe_k"),
        Key("moe_num_shared_experts", "expert_shared_count", absent=meaning(0)),
        Key("moe_layer_start_index", "leading_dense_block_count", absent=meaning(0)),
        Key("moe_layer_interval", "interleave_moe_layer_step", absent=meaning(1)),
        SHARED_WIDTH,
    ),
    sparse=True,
    fixed={"hidden_act": "silu", "use_bias": False},
    values={"expert_gating_func": 1},
)
FAMILY = Family(read, (Layout(PUBLISHED), Layout(CONVERTED)), ("model.mtp_*",), gguf=(GGUF,))
