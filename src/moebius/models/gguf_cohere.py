"""How GGUF files have Cohere's models of experts. Facts as llama.cpp has them:
conversion/command_r.py and src/models/cohere2moe.cpp."""

from collections.abc import Mapping
from typing import Any

from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import (
    SHARED_WIDTH,
    SLIDING_WINDOW,
    USUAL_KEYS,
    FileKeys,
    GgufArchitecture,
    Key,
    expert_keys,
    meaning,
    sliding_layers,
    told_by_routers,
)
from moebius.models.reading import ConfigReader

_RMS = "attention.layer_norm_rms_epsilon"
_SCORES = "expert_gating_func"
_WIDTH = "feed_forward_length"
_FUNCTIONS = {1: "softmax", 2: "sigmoid"}


def _read(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    number = keys.get(_SCORES, 2) or 2
    if not isinstance(number, int) or number not in _FUNCTIONS:
        raise keys.wrong(_SCORES, f"is {number!r}; softmax (1) and sigmoid (2) are supported")
    return {"rms_norm_eps": keys.get(_RMS, 0.0) or None, "expert_selection_fn": _FUNCTIONS[number]}


def _write(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    chosen = reader.get("expert_selection_fn")
    width = reader.integer("prefix_dense_intermediate_size", reader.integer("intermediate_size"))
    written: dict[str, Value] = {_SCORES: 1 if chosen == "softmax" else 2, _WIDTH: width}
    if config.norm == "rounded":
        written[_RMS] = config.norm_eps
    return written


_OTHERWISE = {_RMS, _WIDTH}
GGUF = GgufArchitecture(
    "cohere2moe",
    (
        *(key for key in USUAL_KEYS if key.gguf not in _OTHERWISE),
        *expert_keys("num_experts", "intermediate_size"),
        Key("prefix_dense_intermediate_size", _WIDTH, optional=True),
        Key("num_shared_experts", "expert_shared_count", absent=meaning(0)),
        Key("layer_norm_eps", "attention.layer_norm_epsilon", "number", meaning(1e-5)),
        Key("logit_scale", "logit_scale", "number"),
        Key("norm_topk_prob", "expert_weights_norm", "flag", meaning(False)),
        Key("", "leading_dense_block_count"),
        SHARED_WIDTH,
        SLIDING_WINDOW,
        sliding_layers(4),
    ),
    sparse=True,
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "shared_expert_combination_strategy": "average",
        "prefix_dense_sliding_window_pattern": 1,
    },
    ropes="some",
    read=_read,
    write=_write,
    told=told_by_routers,
)
