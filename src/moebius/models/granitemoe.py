"""Granite 3 MoE: stacked experts, softmax over the chosen logits, and multipliers on four places of the network."""

from __future__ import annotations

from moebius.config import FeedForwardConfig, ModelConfig, RouterConfig
from moebius.models.layout import Layout
from moebius.models.reading import ConfigReader, decoder_fields

LAYOUTS = (
    Layout(
        router="block_sparse_moe.router.layer.weight",
        expert=None,
        gate_up="block_sparse_moe.input_linear.weight",
        down="block_sparse_moe.output_linear.weight",
    ),
    Layout(
        router="block_sparse_moe.router.weight",
        expert=None,
        gate_up="block_sparse_moe.experts.gate_up_proj",
        down="block_sparse_moe.experts.down_proj",
    ),
)


def config(reader: ConfigReader) -> ModelConfig:
    fields = decoder_fields(reader, theta=10_000.0, eps=1e-6)
    layers, bias = fields["num_layers"], reader.flag("attention_bias", False)
    router = RouterConfig(
        reader.num_experts(), reader.integer("num_experts_per_tok", 2), score="logits", weight="softmax"
    )
    moe = FeedForwardConfig(reader.integer("intermediate_size"), router, reader.activation())
    return ModelConfig(
        **fields,
        feed_forward=(moe,) * layers,
        windows=(None,) * layers,
        qkv_bias=bias,
        output_bias=bias,
        attention_scale=reader.number("attention_multiplier", 1.0),
        embedding_multiplier=reader.number("embedding_multiplier", 1.0),
        residual_multiplier=reader.number("residual_multiplier", 1.0),
        logits_divisor=reader.number("logits_scaling", 1.0),
    )
