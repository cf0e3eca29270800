"""OLMoE (arXiv 2409.02060): norms over all of queries and keys, which may be clipped; raw softmax weights."""

from __future__ import annotations

from moebius.config import FeedForwardConfig, ModelConfig, RouterConfig
from moebius.models.layout import FUSED, Layout
from moebius.models.reading import ConfigReader, decoder_fields

LAYOUTS = (Layout(), FUSED)


def config(reader: ConfigReader) -> ModelConfig:
    fields = decoder_fields(reader, theta=10_000.0, eps=1e-5)
    layers, bias = fields["num_layers"], reader.flag("attention_bias", False)
    router = RouterConfig(
        reader.num_experts(),
        reader.integer("num_experts_per_tok", 8),
        weight="renorm" if reader.flag("norm_topk_prob", False) else "raw",
    )
    moe = FeedForwardConfig(reader.integer("intermediate_size"), router, reader.activation())
    return ModelConfig(
        **fields,
        feed_forward=(moe,) * layers,
        windows=(None,) * layers,
        qk_norm="full",
        qkv_bias=bias,
        output_bias=bias,
        clip_qkv=None if reader.get("clip_qkv") is None else reader.number("clip_qkv"),
    )
