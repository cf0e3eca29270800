"""Gemma 2 as a family would be written, but for its norms: their weights are stored less one."""

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.layout import Layout
from moebius.models.parts import FULL, SLIDING, activation, attention, decoder, layer_types, layers
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig


def feed_forward(reader: ConfigReader) -> FeedForwardConfig:
    width = reader.integer("intermediate_size")
    return FeedForwardConfig(width, activation=activation(reader, "hidden_activation"))


def read(reader: ConfigReader) -> ModelConfig:
    mixer = attention(
        reader,
        scale=reader.number("query_pre_attn_scalar") ** -0.5,
        softcap=reader.optional_number("attn_logit_softcapping"),
        biases=True,
    )
    window = reader.integer("sliding_window")
    usual = [FULL if i % 2 else SLIDING for i in range(reader.num_layers)]
    windows = [window if kind == SLIDING else None for kind in layer_types(reader) or usual]
    return decoder(
        reader,
        layers(reader, mixer, feed_forward(reader), windows, norms="sandwich"),
        embedding_multiplier=reader.integer("hidden_size") ** 0.5,
        logits_softcap=reader.optional_number("final_logit_softcapping"),
    )


NAMES: layout.Names = {
    "mixer_output_norm.weight": "post_attention_layernorm.weight",
    "post_attention_layernorm.weight": "pre_feedforward_layernorm.weight",
    "mlp_output_norm.weight": "post_feedforward_layernorm.weight",
}
FAMILY = Family(read, (Layout(NAMES),))
