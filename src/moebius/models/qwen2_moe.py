"""Qwen1.5-MoE and Qwen2-MoE: fine-grained experts, raw softmax weights, and a shared expert behind a sigmoid gate."""

from __future__ import annotations

from moebius.config import FeedForwardConfig, ModelConfig, RouterConfig
from moebius.models.layout import FUSED, Layout
from moebius.models.reading import ConfigReader, decoder_fields, sliding_windows, sparse_layers

LAYOUTS = (Layout(), FUSED)


def config(reader: ConfigReader) -> ModelConfig:
    fields = decoder_fields(reader, theta=10_000.0, eps=1e-6)
    layers, activation = fields["num_layers"], reader.activation()
    router = RouterConfig(
        reader.num_experts(),
        reader.integer("num_experts_per_tok", 4),
        weight="renorm" if reader.flag("norm_topk_prob", False) else "raw",
    )
    moe = FeedForwardConfig(
        reader.integer("moe_intermediate_size"),
        router,
        activation,
        shared_width=reader.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    dense = FeedForwardConfig(reader.integer("intermediate_size"), activation=activation)
    # transformers alternates windows below max_window_layers here, unlike in the dense models.
    lower = reader.integer("max_window_layers", 28, low=0)
    slides = reader.flag("use_sliding_window", False)
    types = ["sliding_attention" if slides and i % 2 == 0 and i < lower else "full_attention" for i in range(layers)]
    return ModelConfig(
        **fields,
        feed_forward=tuple(moe if sparse else dense for sparse in sparse_layers(reader, layers)),
        windows=sliding_windows(reader, layers, types),
        qkv_bias=reader.flag("qkv_bias", True),
    )
