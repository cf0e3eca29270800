"""dots.llm1: sigmoid scores with a selection bias, renormalised; dense first layers, then shared experts ungated."""

from __future__ import annotations

from dataclasses import replace

from moebius.config import FeedForwardConfig, ModelConfig, RouterConfig
from moebius.models.layout import FUSED, Layout
from moebius.models.reading import ConfigReader, decoder_fields

_SHARED = "mlp.shared_experts.{p}"
LAYOUTS = (Layout(shared=_SHARED), replace(FUSED, shared=_SHARED))


def config(reader: ConfigReader) -> ModelConfig:
    fields = decoder_fields(reader, theta=10_000.0, eps=1e-6)
    layers, activation = fields["num_layers"], reader.activation()
    bias, width = reader.flag("attention_bias", False), reader.integer("moe_intermediate_size", 1408)
    router = RouterConfig(
        reader.integer("n_routed_experts"),
        reader.integer("num_experts_per_tok"),
        score="sigmoid",
        weight="renorm" if reader.flag("norm_topk_prob", False) else "raw",
        selection_bias=True,
        num_groups=reader.integer("n_group", 1),
        groups_kept=reader.integer("topk_group", 1),
        group_score="top2",
        group_fill=float("-inf"),
        renorm_eps=1e-20,
        scale=reader.number("routed_scaling_factor", 1.0),
    )
    moe = FeedForwardConfig(width, router, activation, shared_width=width * reader.integer("n_shared_experts"))
    dense = FeedForwardConfig(reader.integer("intermediate_size", 10944), activation=activation)
    first = reader.integer("first_k_dense_replace", 0, low=0)
    window = None if reader.is_null("sliding_window") else reader.integer("sliding_window", 4096)
    slide_from = reader.integer("max_window_layers", 62, low=0)
    default = ["sliding_attention" if window and i >= slide_from else "full_attention" for i in range(layers)]
    types = reader.layer_types(layers) or default
    return ModelConfig(
        **fields,
        feed_forward=tuple(dense if i < first else moe for i in range(layers)),
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
    )
