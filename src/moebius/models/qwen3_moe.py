"""Qwen3-MoE: Qwen3's attention over fine-grained experts without a shared one. Our own models are of this type."""

from __future__ import annotations

from moebius.config import FeedForwardConfig, ModelConfig, RouterConfig
from moebius.models.layout import FUSED, Layout
from moebius.models.reading import ConfigReader, decoder_fields, sliding_windows, sparse_layers

LAYOUTS = (Layout(), FUSED)


def config(reader: ConfigReader) -> ModelConfig:
    fields = decoder_fields(reader, theta=10_000.0, eps=1e-6)
    layers, activation = fields["num_layers"], reader.activation()
    bias = reader.flag("attention_bias", False)
    router = RouterConfig(
        reader.num_experts(),
        reader.integer("num_experts_per_tok", 8),
        weight="renorm" if reader.flag("norm_topk_prob", False) else "raw",
    )
    moe = FeedForwardConfig(reader.integer("moe_intermediate_size"), router, activation)
    dense = FeedForwardConfig(reader.integer("intermediate_size", 6144), activation=activation)
    # All layers slide, or none: published configurations carry max_window_layers, transformers does not read it.
    reader.get("max_window_layers")
    kind = "sliding_attention" if reader.flag("use_sliding_window", False) else "full_attention"
    return ModelConfig(
        **fields,
        feed_forward=tuple(moe if sparse else dense for sparse in sparse_layers(reader, layers)),
        windows=sliding_windows(reader, layers, [kind] * layers),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
    )
