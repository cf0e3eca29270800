"""How GGUF files have models some of whose layers have attention: by the number of their key/value
heads, which is 0 for the others. Facts as llama.cpp's converter has them: conversion/lfm2.py,
conversion/granite.py and conversion/nemotron.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import (
    USUAL_KEYS,
    FileKeys,
    GgufArchitecture,
    Key,
    Shapes,
    expert_keys,
    layouts,
    meaning,
    nothing_told,
)
from moebius.models.layout import Names
from moebius.models.parts import CONV, FULL
from moebius.models.reading import ConfigReader
from moebius.models.short_parts import width
from moebius.nn.attention import GQA

KV_HEADS = "attention.head_count_kv"
_SHORT: Names = {
    f"self_attn.{role}.weight": f"shortconv.{role}.weight"
    for role in ("in_proj", "conv", "out_proj")
}
# The last norm bears the name of another.
_SHORT_LAYOUTS = tuple(replace(layout, norm="token_embd_norm.weight") for layout in layouts(_SHORT))


def hybrid_keys(renamed: Mapping[str, str] | None = None) -> tuple[Key, ...]:
    """USUAL_KEYS, but for key/value heads. renamed: other names that config.json has for some."""
    names = renamed or {}
    return tuple(
        replace(key, config=names.get(key.config, key.config))
        for key in USUAL_KEYS
        if key.gguf != KV_HEADS
    )


def kv_heads(keys: FileKeys, config: Mapping[str, Any]) -> list[int]:
    """Of each layer. Raises ConfigError for what is no number for each."""
    layers = config["num_hidden_layers"]
    each = list(keys.listed(KV_HEADS) or [])[:layers]
    heads = [count for count in each if type(count) is int and count >= 0]
    if len(heads) != layers:
        raise keys.wrong(KV_HEADS, f"must be a number for each of {layers} layers, 0 for none")
    if len({count for count in heads if count}) > 1:
        raise keys.wrong(KV_HEADS, f"has several numbers of heads, {sorted(set(heads))}")
    return heads


def write(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    """The numbers of heads. Raises ConfigError for a model that llama.cpp has no such files of."""
    mixers = [layer.mixer for layer in config.layers]
    gqas = [mixer for mixer in mixers if isinstance(mixer, GQA)]
    if not gqas or len(gqas) == len(mixers):
        raise ConfigError(
            f"GGUF files of {config.model_type} have layers with attention, and others; this model "
            "has one of the two; load it with --quantization instead"
        )
    heads = [mixer.num_kv_heads if isinstance(mixer, GQA) else 0 for mixer in mixers]
    return {KV_HEADS: heads}


def _short(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """For GgufArchitecture.read: which layers have short convolutions."""
    heads = kv_heads(keys, config)
    return {
        "layer_types": [FULL if count else CONV for count in heads],
        "num_key_value_heads": max(heads) or None,
    }


def _told_short(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Files hold the width as it is."""
    return {"block_auto_adjust_ff_dim": False}


def _write_short(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    return {**write(reader, config), "feed_forward_length": width(reader)}


LFM2 = GgufArchitecture(
    "lfm2",
    (*hybrid_keys({"rms_norm_eps": "norm_eps"}), Key("conv_L_cache", "shortconv.l_cache")),
    fixed={"conv_bias": False},
    layouts=_SHORT_LAYOUTS,
    read=_short,
    write=_write_short,
    told=_told_short,
)
LFM2_MOE = replace(
    LFM2,
    name="lfm2moe",
    keys=(
        *LFM2.keys,
        *expert_keys("num_experts", "moe_intermediate_size"),
        Key("num_dense_layers", "leading_dense_block_count", absent=meaning(0)),
    ),
    sparse=True,
    fixed={
        "conv_bias": False,
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    values={"expert_gating_func": 2},
    write=write,
    told=nothing_told,
)
