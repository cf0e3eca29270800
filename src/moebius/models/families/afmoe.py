"""AFMoE (Trinity): norms before and behind each part, gates of attention's values, layers with a
window that turn and others without positions; sigmoid scores with a selection bias."""

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import (
    SLIDING_WINDOW,
    USUAL_KEYS,
    GgufArchitecture,
    Key,
    expert_keys,
    layouts,
)
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import (
    biased_experts,
    decoder,
    every_nth_full,
    first_dense,
    layer_types,
    layers,
    turning_windows,
)
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    period = reader.integer("global_attn_every_n_layers")
    types = layer_types(reader) or every_nth_full(reader.num_layers, period)
    mixers = turning_windows(reader, types, qk_norm="head", gated="values", biases=True)
    routed = biased_experts(
        reader,
        "num_experts",
        "moe_intermediate_size",
        "num_shared_experts",
        renorm_eps=1e-20,
        scale=reader.number("route_scale"),
    )
    parts = first_dense(reader, routed, reader.integer("num_dense_layers", low=0))
    scaled = reader.flag("mup_enabled")
    return decoder(
        reader,
        layers(reader, mixers, parts, norms="sandwich"),
        norm="float32",
        embedding_multiplier=reader.integer("hidden_size") ** 0.5 if scaled else 1.0,
    )


NAMES = {
    "mixer_output_norm.weight": "post_attention_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp_output_norm.weight": "post_mlp_layernorm.weight",
    "mlp.router.weight": "mlp.router.gate.weight",
    "mlp.router.selection_bias": "mlp.expert_bias",
    **layout.shared("mlp.shared_experts.{p}"),
}
IN_FILES = {
    "mixer_output_norm.weight": "post_attention_norm.weight",
    "mlp_output_norm.weight": "post_ffw_norm.weight",
}
GGUF = GgufArchitecture(
    "afmoe",
    (
        *USUAL_KEYS,
        *expert_keys("num_experts", "moe_intermediate_size"),
        Key("num_shared_experts", "expert_shared_count"),
        Key("num_dense_layers", "leading_dense_block_count"),
        Key("route_scale", "expert_weights_scale", "number"),
        SLIDING_WINDOW,
    ),
    sparse=True,
    fixed={"hidden_act": "silu", "mup_enabled": True, "attention_bias": False},
    values={"expert_gating_func": 2, "expert_weights_norm": True},
    layouts=layouts({**IN_FILES, "self_attn.gate_proj.weight": "attn_gate.weight"}),
    slides=lambda layer: (layer + 1) % 4 != 0,
    ropes="sliding",
)
FAMILY = Family(read, (Layout(NAMES), Layout({**NAMES, **FUSED})), gguf=(GGUF,))
