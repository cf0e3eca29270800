"""Mixtral (arXiv 2401.04088): softmax over the experts, the top k renormalised; w1, w3, w2 are gate, up, down."""

from __future__ import annotations

from moebius.config import FeedForwardConfig, ModelConfig, RouterConfig
from moebius.models.layout import FUSED, Layout
from moebius.models.reading import ConfigReader, decoder_fields

LAYOUTS = (
    Layout(
        router="block_sparse_moe.gate.weight",
        expert="block_sparse_moe.experts.{e}.{p}.weight",
        projections=("w1", "w3", "w2"),
    ),
    FUSED,
)


def config(reader: ConfigReader) -> ModelConfig:
    fields = decoder_fields(reader, theta=1_000_000.0, eps=1e-5)
    layers = fields["num_layers"]
    window = None if reader.get("sliding_window") is None else reader.integer("sliding_window")
    router = RouterConfig(reader.num_experts(), reader.integer("num_experts_per_tok", 2), weight="renorm")
    moe = FeedForwardConfig(reader.integer("intermediate_size"), router, reader.activation())
    return ModelConfig(**fields, feed_forward=(moe,) * layers, windows=(window,) * layers)
