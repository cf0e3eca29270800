"""Mistral: Llama with a sliding window in all layers."""

from __future__ import annotations

from moebius.config import FeedForwardConfig, ModelConfig
from moebius.models.layout import Layout
from moebius.models.reading import ConfigReader, decoder_fields

LAYOUTS = (Layout(),)


def config(reader: ConfigReader) -> ModelConfig:
    fields = decoder_fields(reader, theta=10_000.0, eps=1e-6)
    layers = fields["num_layers"]
    window = None if reader.is_null("sliding_window") else reader.integer("sliding_window", 4096)
    dense = FeedForwardConfig(reader.integer("intermediate_size"), activation=reader.activation())
    return ModelConfig(**fields, feed_forward=(dense,) * layers, windows=(window,) * layers)
