"""How GGUF files have Gemma 3's models. Facts as llama.cpp has them: conversion/gemma.py and
src/models/gemma3.cpp."""

from collections.abc import Mapping
from typing import Any

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import (
    SLIDING_WINDOW,
    USUAL_KEYS,
    FileKeys,
    GgufArchitecture,
    Key,
    layouts,
    meaning,
    sliding_layers,
)
from moebius.models.reading import ConfigReader

_SCALE = "query_pre_attn_scalar"
# The layers of the one model whose scores are scaled by its width, and not by the size of heads.
_BY_WIDTH = 62


def _scaled_by(config: Mapping[str, Any]) -> int:
    """What llama.cpp takes for granted as query_pre_attn_scalar."""
    if config["num_hidden_layers"] == _BY_WIDTH:
        return int(config["hidden_size"] // max(config["num_attention_heads"], 1))
    return int(config["head_dim"])


def _read(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    return {_SCALE: _scaled_by(config)}


def _write(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    """Nothing. Raises ConfigError for a scale that llama.cpp does not take for granted."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
    usual = _scaled_by({name: reader.integer(name) for name in names})
    found = reader.number(_SCALE)
    if found != usual:
        raise ConfigError(
            f"{_SCALE} is {found}, but llama.cpp takes {usual} for granted; load the model with "
            "--quantization instead"
        )
    return {}


GGUF = GgufArchitecture(
    "gemma3",
    (
        *USUAL_KEYS,
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
    fixed={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    },
    layouts=layouts(
        {
            "mixer_output_norm.weight": "post_attention_norm.weight",
            "mlp_output_norm.weight": "post_ffw_norm.weight",
        }
    ),
    ropes="each",
    sliding_theta=10_000.0,
    read=_read,
    write=_write,
)
