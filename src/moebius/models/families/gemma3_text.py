"""Gemma 3, dense: zero-centred norms before and behind each part, layers of two kinds with rotary
embeddings of their own, and a scale of embeddings that is rounded as they are."""

from typing import Any

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_gemma import GGUF
from moebius.models.layout import Layout, Names
from moebius.models.parts import (
    FULL,
    SLIDING,
    attention_of_kinds,
    decoder,
    every_nth_full,
    feed_forward,
    layer_types,
    layers,
)
from moebius.models.reading import ConfigReader

UNUSED = ("*vision_tower.*", "*multi_modal_projector.*")


def ropes(reader: ConfigReader) -> dict[str, Any]:
    """An object for each kind of layer; in files of transformers 4, only full attention scales."""
    given = reader.get("rope_parameters")
    if given is not None and not isinstance(given, dict):
        raise reader.error(f"rope_parameters is {given!r}; it must be an object")
    reader.computed.add("rope_theta")
    full = {"rope_theta": reader.raw.get("rope_theta", 1_000_000.0)}
    slides = {"rope_theta": reader.number("rope_local_base_freq", 10_000.0)}
    given = given or {}
    scaling = reader.get("rope_scaling") or {}
    return {
        FULL: {**full, **(given.get(FULL) or {}), **scaling},
        SLIDING: {**slides, **(given.get(SLIDING) or {})},
    }


def read(reader: ConfigReader) -> ModelConfig:
    period = reader.integer("sliding_window_pattern", 6)
    types = layer_types(reader) or every_nth_full(reader.num_layers, period)
    mixers = attention_of_kinds(
        reader,
        types,
        ropes(reader),
        qk_norm="head",
        scale=reader.number("query_pre_attn_scalar") ** -0.5,
        biases=True,
    )
    # Looked up, and computed with by no Gemma 3.
    reader.computed.add("attn_logit_softcapping")
    part = feed_forward(reader, act="hidden_activation")
    return decoder(
        reader,
        layers(reader, mixers, part, norms="sandwich"),
        norm="zero-centred",
        embedding_multiplier=reader.integer("hidden_size") ** 0.5,
        multiplier_rounded=True,
        logits_softcap=reader.optional_number("final_logit_softcapping"),
    )


NAMES: Names = {
    "mixer_output_norm.weight": "post_attention_layernorm.weight",
    "post_attention_layernorm.weight": "pre_feedforward_layernorm.weight",
    "mlp_output_norm.weight": "post_feedforward_layernorm.weight",
}
# Of files with images, as they were published and as transformers 5 saves them, and of text alone.
PREFIXES = {
    "language_model.model.": "language_model.lm_head.weight",
    "model.language_model.": "lm_head.weight",
    "model.": "lm_head.weight",
}
LAYOUTS = tuple(
    Layout(NAMES, f"{at}layers.{{i}}.", f"{at}embed_tokens.weight", f"{at}norm.weight", head)
    for at, head in reversed(PREFIXES.items())
)
FAMILY = Family(read, LAYOUTS, UNUSED, gguf=(GGUF,))
