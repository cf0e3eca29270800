"""Qwen3, dense: Llama with a norm over each head of queries and keys; windows as in Qwen2."""

from __future__ import annotations

from moebius.config import FeedForwardConfig, ModelConfig
from moebius.models.layout import Layout
from moebius.models.reading import ConfigReader, decoder_fields, sliding_windows, upper_layers_slide

LAYOUTS = (Layout(),)


def config(reader: ConfigReader) -> ModelConfig:
    reader.default("head_dim", 128)
    fields = decoder_fields(reader, theta=10_000.0, eps=1e-6)
    layers, bias = fields["num_layers"], reader.flag("attention_bias", False)
    dense = FeedForwardConfig(reader.integer("intermediate_size"), activation=reader.activation())
    return ModelConfig(
        **fields,
        feed_forward=(dense,) * layers,
        windows=sliding_windows(reader, layers, upper_layers_slide(reader, layers)),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
    )
