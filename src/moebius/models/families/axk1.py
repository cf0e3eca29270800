"""A.X K1: DeepSeek-V3, with a norm behind experts."""

from collections.abc import Collection
from dataclasses import replace

from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.family import Family
from moebius.models.latent_parts import (
    LAYOUTS,
    latent_attention,
    latent_decoder,
    turning_in_pairs,
)
from moebius.models.layout import Layout
from moebius.models.parts import DENSE, SPARSE, feed_forward, grouped_experts, layer_types, rope
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    types = layer_types(reader, (DENSE, SPARSE), "mlp_layer_types")
    first = reader.integer("first_k_dense_replace", 1, low=0)
    every = reader.integer("moe_layer_freq", 1)
    if types is None:
        chosen = (i >= first and i % every == 0 for i in range(reader.num_layers))
        types = [SPARSE if each else DENSE for each in chosen]
    kinds = {SPARSE: grouped_experts(reader), DENSE: feed_forward(reader)}
    mixer = latent_attention(reader, rope=turning_in_pairs(reader, rope(reader)))
    plain = latent_decoder(reader, mixer, [kinds[kind] for kind in types])
    layers = (
        LayerSpec(mixer, kinds[kind], "behind-mlp" if kind == SPARSE else "pre") for kind in types
    )
    return replace(plain, layers=tuple(layers))


def told(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Published files have no selection bias, which then is none."""
    if any(name.endswith(".e_score_correction_bias") for name in names):
        return config
    layers = []
    for layer in config.layers:
        part = layer.feed_forward
        if part is not None and part.router is not None:
            router = replace(part.router, selection_bias=False)
            layer = replace(layer, feed_forward=replace(part, router=router))
        layers.append(layer)
    return replace(config, layers=tuple(layers))


NORM = "mlp_output_norm.weight"
FAMILY = Family(
    read,
    tuple(
        Layout({**each.names, NORM: name})
        for name in ("post_mlp_layernorm.weight", "mlp.post_mlp_layernorm.weight")
        for each in LAYOUTS
    ),
    told=told,
    # Published files have one in dense layers too, where nothing reads it.
    spare=("*.post_mlp_layernorm.weight",),
)
