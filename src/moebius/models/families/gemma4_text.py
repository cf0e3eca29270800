"""Gemma 4, dense or with experts beside a dense part: layers with a window have other heads than
those without, whose values may be their keys; every layer ends with a learned scale."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gemma_parts import feed_forwards, mixers
from moebius.models.gguf_gemma4 import GGUF
from moebius.models.layout import Layout, Names, experts, shared, stacked
from moebius.models.parts import decoder, layers
from moebius.models.reading import ConfigReader

UNUSED = (
    "*vision_tower.*",
    "*vision_embedder.*",
    "*audio_tower.*",
    "*embed_vision.*",
    "*embed_audio.*",
)
"""What sees and hears."""


def read(reader: ConfigReader) -> ModelConfig:
    if reader.get("use_bidirectional_attention") not in (None, "vision"):
        raise reader.error(
            f"use_bidirectional_attention is {reader.raw['use_bidirectional_attention']!r}: tokens "
            "would see those behind them, which is not supported"
        )
    own = reader.get("hidden_size_per_layer_input")
    if own:
        raise reader.error(
            f"hidden_size_per_layer_input is {own}: embeddings of each layer's own (E2B, E4B) are "
            "not supported"
        )
    reader.computed.add("vocab_size_per_layer_input")
    each = layers(reader, mixers(reader), feed_forwards(reader), norms="sandwich", scaled=True)
    return decoder(
        reader,
        each,
        norm="float32",
        embedding_multiplier=reader.integer("hidden_size") ** 0.5,
        multiplier_rounded=True,
        logits_softcap=reader.optional_number("final_logit_softcapping"),
    )


NAMES: Names = {
    "mixer_output_norm.weight": "post_attention_layernorm.weight",
    "post_attention_layernorm.weight": "pre_feedforward_layernorm.weight",
    "mlp_output_norm.weight": "post_feedforward_layernorm.weight",
    "mlp.shared_output_norm.weight": "post_feedforward_layernorm_1.weight",
    "mlp.experts_norm.weight": "pre_feedforward_layernorm_2.weight",
    "mlp.experts_output_norm.weight": "post_feedforward_layernorm_2.weight",
    "mlp.router.weight": "router.proj.weight",
    "mlp.router.norm.weight": "router.scale",
    "mlp.router.expert_scale": "router.per_expert_scale",
    "scale": "layer_scalar",
    **shared("mlp.{p}"),
}
# All experts in two tensors, or each one's in its own, as they are quantised.
EXPERTS = (stacked("experts.gate_up_proj", "experts.down_proj"), experts("experts.{e}.{p}"))
# Of text alone, and of files with images.
PREFIXES = ("model.", "model.language_model.")
LAYOUTS = tuple(
    Layout({**NAMES, **each}, f"{at}layers.{{i}}.", f"{at}embed_tokens.weight", f"{at}norm.weight")
    for at in PREFIXES
    for each in EXPERTS
)
FAMILY = Family(read, LAYOUTS, UNUSED, gguf=(GGUF,))
