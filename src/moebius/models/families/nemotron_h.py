"""Nemotron-H and Nemotron 3: one part a layer, which is a Mamba 2 layer, attention without
positions, experts or a dense feed-forward; squared ReLU without gates, and experts that may be
narrower than the model."""

from moebius.models import gguf_mamba, layout, mamba_parts
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.family import Family
from moebius.models.layout import Layout, Names, Stacked
from moebius.models.nemotron_parts import MLP, MOE, WITHOUT_EFFECT, experts, kinds, mamba
from moebius.models.parts import FULL, LINEAR, ROPES, activation, attention, decoder
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig


def read(reader: ConfigReader) -> ModelConfig:
    types = kinds(reader)
    reader.computed |= WITHOUT_EFFECT | ROPES
    act = activation(reader, "mlp_hidden_act")
    biased = reader.flag("mlp_bias")
    if biased and MOE in types:
        raise reader.error("mlp_bias is true; it is not supported beside experts")
    width = reader.integer("intermediate_size")
    layers = {
        FULL: LayerSpec(attention(reader, rope=None)),
        LINEAR: LayerSpec(mamba(reader)),
        MOE: LayerSpec(feed_forward=experts(reader)),
        MLP: LayerSpec(
            feed_forward=FeedForwardConfig(width, activation=act, bias=biased, gated=False)
        ),
    }
    return decoder(
        reader,
        [layers[kind] for kind in types],
        norm="float32",
        norm_eps=reader.number("layer_norm_epsilon"),
    )


UP_DOWN = ("up_proj", "up_proj", "down_proj")
ROLES = (*mamba_parts.ROLES, *(f"{x}_proj.weight" for x in "qkvo"))
NAMES: Names = {
    "input_layernorm.weight": "norm.weight",
    "post_attention_layernorm.weight": "norm.weight",
    **{f"self_attn.{role}": f"mixer.{role}" for role in ROLES},
    **layout.dense("mixer.{p}", UP_DOWN),
    **layout.experts("mixer.experts.{e}.{p}", projections=UP_DOWN),
    **layout.shared("mixer.shared_experts.{p}", UP_DOWN),
    "mlp.router.weight": "mixer.gate.weight",
    "mlp.router.selection_bias": "mixer.gate.e_score_correction_bias",
    "mlp.dispatch.down.weight": "mixer.fc1_latent_proj.weight",
    "mlp.dispatch.up.weight": "mixer.fc2_latent_proj.weight",
}
STACKED: Names = {
    f"mlp.experts.{ours}": Stacked(f"mixer.experts.{theirs}")
    for ours, theirs in (("gate_proj", "up_proj"), ("down_proj", "down_proj"))
}
LAYOUTS = tuple(
    Layout(
        {**NAMES, **names},
        layer=f"{before}layers.{{i}}.",
        embedding=f"{before}embeddings.weight",
        norm=f"{before}norm_f.weight",
    )
    for before in ("backbone.", "model.")
    for names in ({}, STACKED)
)
FAMILY = Family(read, LAYOUTS, ("mtp.*",), gguf=(gguf_mamba.NEMOTRON, gguf_mamba.DENSE_NEMOTRON))
