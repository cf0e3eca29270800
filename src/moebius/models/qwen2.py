"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values; windows, where used, in the upper layers."""

from __future__ import annotations

from moebius.config import FeedForwardConfig, ModelConfig
from moebius.models.layout import Layout
from moebius.models.reading import ConfigReader, decoder_fields, sliding_windows, upper_layers_slide

LAYOUTS = (Layout(),)


def config(reader: ConfigReader) -> ModelConfig:
    fields = decoder_fields(reader, theta=10_000.0, eps=1e-6)
    layers = fields["num_layers"]
    dense = FeedForwardConfig(reader.integer("intermediate_size"), activation=reader.activation())
    windows = sliding_windows(reader, layers, upper_layers_slide(reader, layers))
    return ModelConfig(**fields, feed_forward=(dense,) * layers, windows=windows, qkv_bias=True)
