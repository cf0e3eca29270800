"""How GGUF files have T5: an encoder's blocks and a decoder's beside each other.

The version is told by the feed-forward parts: those of the first have no gates, and its logits are
divided by the root of the model's size; those of version 1.1 (Flan-T5, mT5) have, and its logits
are not. So it is of all that were published, and files say no more. llama.cpp itself divides none,
which changes no greedy token. Facts as its converter has them: conversion/t5.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import FileKeys, GgufArchitecture, Key, Shapes, meaning
from moebius.models.layout import Layout, Names, dense
from moebius.models.reading import ConfigReader
from moebius.models.t5_parts import CONTEXT, block_of

_EPS = "attention.layer_norm_epsilon"
_RMS = "attention.layer_norm_rms_epsilon"
_GATES = "enc.blk.0.ffn_gate.weight"
_KEYS = (
    Key("num_layers", "block_count"),
    Key(
        "num_decoder_layers",
        "decoder_block_count",
        absent=lambda config: config["num_layers"],
        optional=True,
    ),
    Key("d_model", "embedding_length"),
    Key("d_ff", "feed_forward_length"),
    Key("num_heads", "attention.head_count"),
    Key("d_kv", "attention.key_length"),
    Key("layer_norm_epsilon", _RMS, "number"),
    Key("relative_attention_num_buckets", "attention.relative_buckets_count"),
    Key("decoder_start_token_id", "decoder_start_token_id", absent=meaning(None), optional=True),
)


def _read(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing more; but what is said twice must be one thing."""
    for key, ours in ((_EPS, "layer_norm_epsilon"), ("attention.head_count_kv", "num_heads")):
        value = keys.get(key, config[ours])
        if value != config[ours]:
            raise keys.wrong(key, f"is {value!r}, where {ours} is {config[ours]!r}")
    # Of positions that the model was trained on, and distances have no end.
    keys.get("context_length", 0)
    return {}


def _told(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """The version, by its gates."""
    gated = _GATES in shapes
    named = "gated-gelu" if gated else "relu"
    return {"feed_forward_proj": named, "scale_decoder_outputs": not gated}


def _write(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    """What `_read` reads. Raises ConfigError for what is neither of the two versions."""
    part = config.feed_forward[0]
    divided = config.logits_divisor != 1
    if (part.activation, divided) != (("gelu_tanh", False) if part.gated else ("relu", True)):
        raise ConfigError(
            f"feed-forward parts {'with' if part.gated else 'without'} gates whose activation is "
            f"{part.activation!r} and logits that are {'' if divided else 'not '}divided are none "
            "of the two versions that GGUF files of t5 hold (relu without gates, divided; "
            "gelu_tanh with gates, not divided); load the model with --quantization instead"
        )
    return {
        _EPS: config.norm_eps,
        "attention.value_length": reader.integer("d_kv"),
        "context_length": CONTEXT,
        "decoder_start_token_id": config.start_id,
        "decoder_block_count": (config.num_layers - config.encoder_layers) // 2,
    }


def _attention(before: str = "") -> Names:
    projections = {f"self_attn.{x}_proj.weight": f"{before}attn_{x}.weight" for x in "qkvo"}
    return {
        **projections,
        "input_layernorm.weight": f"{before}attn_norm.weight",
        "self_attn.relative_attention_bias.weight": f"{before}attn_rel_b.weight",
    }


@dataclass(frozen=True, slots=True)
class GgufStackLayout(Layout):
    """The names of both stacks."""

    embedding: str = "token_embd.weight"
    norm: str = "dec.output_norm.weight"
    encoder_norm: str = "enc.output_norm.weight"
    head: str = "output.weight"
    layer: str = "dec.blk.{i}."

    def of_layer(self, config: ModelConfig, number: int) -> Layout:
        """See Layout: an encoder's block is one layer, a decoder's two."""
        block = block_of(config, number)
        names = _attention("cross_" if block.crosses else "")
        if block.feeds:
            gated = config.feed_forward[0].gated
            projections = ("gate", "up", "down") if gated else ("up", "gate", "down")
            names = {**names, **dense("ffn_{p}", projections)}
        norms = {"post_attention_layernorm.weight": "ffn_norm.weight"}
        return Layout({**names, **norms}, f"{block.stack[:3]}.blk.{block.number}.")


T5 = GgufArchitecture(
    "t5",
    _KEYS,
    fixed={"relative_attention_max_distance": 128},
    layouts=(GgufStackLayout(),),
    # Which T5's first releases have, and nothing reads.
    unused=("dec.blk.*.cross_attn_rel_b.weight",),
    ropes="none",
    told=_told,
    read=_read,
    write=_write,
)
