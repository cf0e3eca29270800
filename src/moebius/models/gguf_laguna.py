"""How GGUF files have Laguna's models. Facts as llama.cpp has them: conversion/laguna.py and
src/models/laguna.cpp."""

from collections.abc import Mapping
from typing import Any

from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import (
    SLIDING_WINDOW,
    USUAL_KEYS,
    FileKeys,
    GgufArchitecture,
    Key,
    Shapes,
    expert_keys,
    layouts,
    sliding_layers,
    told_by_routers,
)
from moebius.models.reading import ConfigReader
from moebius.nn.attention import GQA

_HEADS = "attention.head_count"
_GATES = "attn_gate.weight"


def _read(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """How many heads each layer has."""
    layers = config["num_hidden_layers"]
    heads = (keys.listed(_HEADS) or [])[:layers]
    if len(heads) != layers or not all(type(count) is int for count in heads):
        raise keys.wrong(_HEADS, f"must be a number for each of {layers} layers")
    return {"num_attention_heads": heads[0], "num_attention_heads_per_layer": heads}


def _told(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have experts, and whether a head has one gate, or one for each value."""
    rows = shapes.get(f"blk.0.{_GATES}", (0,))[0]
    single = rows == config["num_attention_heads"]
    gating = "per-head" if single else "per-element"
    return {**told_by_routers(shapes, config), "gating": gating}


def _write(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    return {_HEADS: [mixer.num_heads for mixer in config.mixers if isinstance(mixer, GQA)]}


GGUF = GgufArchitecture(
    "laguna",
    (
        *(key for key in USUAL_KEYS if key.gguf != _HEADS),
        *expert_keys("num_experts", "moe_intermediate_size"),
        Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        Key("", "leading_dense_block_count"),
        Key("moe_routed_scaling_factor", "expert_weights_scale", "number"),
        SLIDING_WINDOW,
        sliding_layers(4, full_first=True),
    ),
    sparse=True,
    fixed={"hidden_act": "silu", "attention_bias": False, "moe_router_logit_softcapping": 0.0},
    values={"expert_gating_func": 2, "expert_weights_norm": True},
    layouts=layouts({"self_attn.gate_proj.weight": _GATES}),
    partial=True,
    ropes="each",
    read=_read,
    write=_write,
    told=_told,
)
