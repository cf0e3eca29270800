"""How GGUF files have Gemma 4's models. Facts as llama.cpp has them: conversion/gemma.py and
src/models/gemma4.cpp."""

from collections.abc import Mapping
from typing import Any

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.gemma_parts import PER_LAYER
from moebius.models.gguf_architecture import (
    GATE_UP_DOWN,
    SLIDING_SIZE,
    SLIDING_WINDOW,
    USUAL_KEYS,
    FileKeys,
    GgufArchitecture,
    Key,
    Shapes,
    expert_keys,
    layouts,
    meaning,
    sliding_layers,
)
from moebius.models.parts import FULL
from moebius.models.reading import ConfigReader
from moebius.nn.attention import GQA

_KV_HEADS = "attention.head_count_kv"
_WIDTHS = "feed_forward_length"
_OWN_EMBEDDINGS = "embedding_length_per_layer_input"
_SLIDING_VALUE = "attention.value_length_swa"
_SHARING = "num_kv_shared_layers"


def _one_of(keys: FileKeys, key: str, values: list[int]) -> int:
    if len(set(values)) > 1:
        raise keys.wrong(key, f"is {values} among layers of one kind, which is not supported")
    return values[0]


def _read(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    heads = keys.each(_KV_HEADS, layers)
    full = [i for i, kind in enumerate(config["layer_types"]) if kind == FULL]
    others = [count for i, count in enumerate(heads) if i not in full]
    size = config["head_dim"]
    value_size = keys.get(_SLIDING_VALUE, size)
    if value_size != size:
        raise keys.wrong(_SLIDING_VALUE, f"is {value_size!r}; only {size!r} is supported")
    widths = keys.each(_WIDTHS, layers)
    taking = config[_SHARING]
    narrow = _one_of(keys, _WIDTHS, widths[: layers - taking] or widths)
    wide = _one_of(keys, _WIDTHS, widths[layers - taking :] or widths)
    if wide not in (narrow, 2 * narrow):
        raise keys.wrong(_WIDTHS, f"is {narrow}, then {wide}; only twice that is supported")
    return {
        "intermediate_size": narrow,
        "use_double_wide_mlp": wide != narrow,
        "num_key_value_heads": _one_of(keys, _KV_HEADS, others or heads),
        "enable_moe_block": bool(config["num_experts"]),
        "hidden_size_per_layer_input": keys.get(_OWN_EMBEDDINGS, 0),
        PER_LAYER: {
            str(i): {"head_dim": config["global_head_dim"], "num_key_value_heads": heads[i]}
            for i in full
        },
    }


def _told(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Whether values are keys where a layer sees everything."""
    keeping = config["num_hidden_layers"] - config[_SHARING]
    kinds = config["layer_types"][:keeping]
    full = [f"blk.{i}.attn_v.weight" for i, kind in enumerate(kinds) if kind == FULL]
    return {"attention_k_eq_v": bool(full) and not any(name in shapes for name in full)}


def _write(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    if not config.experts and reader.get("num_experts"):
        raise ConfigError("num_experts is given, but enable_moe_block is off; leave it out")
    heads = [mixer.num_kv_heads for mixer in config.mixers if isinstance(mixer, GQA)]
    widths = [part.shared_width or part.width for part in config.feed_forward]
    sizes = {mixer.head_dim for mixer in config.mixers if isinstance(mixer, GQA) and mixer.window}
    return {
        _KV_HEADS: heads if len(set(heads)) > 1 else heads[0],
        _WIDTHS: widths if len(set(widths)) > 1 else widths[0],
        _OWN_EMBEDDINGS: 0,
        _SLIDING_VALUE: max(sizes, default=reader.integer("head_dim")),
    }


_OTHERWISE = (_KV_HEADS, _WIDTHS, "attention.key_length")
GGUF = GgufArchitecture(
    "gemma4",
    (
        *(key for key in USUAL_KEYS if key.gguf not in _OTHERWISE),
        Key("global_head_dim", "attention.key_length"),
        Key("head_dim", SLIDING_SIZE),
        Key(_SHARING, "attention.shared_kv_layers", absent=meaning(0)),
        *(
            Key(key.config, key.gguf, absent=meaning(None), optional=True)
            for key in expert_keys("num_experts", "moe_intermediate_size", "top_k_experts")
        ),
        Key(
            "final_logit_softcapping",
            "final_logit_softcapping",
            "number",
            meaning(None),
            optional=True,
        ),
        SLIDING_WINDOW,
        sliding_layers(6),
    ),
    sparse=None,
    fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    layouts=layouts(
        {
            "mixer_output_norm.weight": "post_attention_norm.weight",
            "mlp_output_norm.weight": "post_ffw_norm.weight",
            "mlp.shared_output_norm.weight": "post_ffw_norm_1.weight",
            "mlp.experts_norm.weight": "pre_ffw_norm_2.weight",
            "mlp.experts_output_norm.weight": "post_ffw_norm_2.weight",
            "mlp.router.norm.weight": "ffn_gate_inp.scale",
            "mlp.router.expert_scale": "ffn_down_exps.scale",
            "scale": "layer_output_scale.weight",
            **layout.shared("ffn_{p}", GATE_UP_DOWN),
        }
    ),
    ropes="each",
    sliding_theta=10_000.0,
    proportional=True,
    told=_told,
    read=_read,
    write=_write,
)
