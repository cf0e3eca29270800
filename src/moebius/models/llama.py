"""Llama 2 and 3: dense."""

from __future__ import annotations

from moebius.config import FeedForwardConfig, ModelConfig
from moebius.models.layout import Layout
from moebius.models.reading import ConfigReader, decoder_fields

LAYOUTS = (Layout(),)


def config(reader: ConfigReader) -> ModelConfig:
    fields = decoder_fields(reader, theta=10_000.0, eps=1e-6)
    layers, bias = fields["num_layers"], reader.flag("attention_bias", False)
    dense = FeedForwardConfig(
        reader.integer("intermediate_size"), activation=reader.activation(), bias=reader.flag("mlp_bias", False)
    )
    return ModelConfig(
        **fields, feed_forward=(dense,) * layers, windows=(None,) * layers, qkv_bias=bias, output_bias=bias
    )
