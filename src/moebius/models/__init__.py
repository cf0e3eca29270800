"""Supported architectures: one small module a model_type, holding what differs and its checkpoint's names.

Nothing here imports torch; moebius.models.decoder and moebius.models.weights do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from moebius.config import ModelConfig
from moebius.errors import ConfigError
from moebius.models import (
    dots1,
    granitemoe,
    llama,
    mistral,
    mixtral,
    moebius,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from moebius.models.layout import Layout
from moebius.models.reading import ConfigReader

_FAMILIES = (dots1, granitemoe, llama, mistral, mixtral, moebius, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe)
MODEL_TYPES: Mapping[str, ModuleType] = {module.__name__.rpartition(".")[2]: module for module in _FAMILIES}


def _family(config_json: Mapping[str, Any]) -> ModuleType:
    model_type = config_json.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}"
        )
    return MODEL_TYPES[model_type]


def model_config(config_json: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes. Raises ConfigError naming the key that is wrong or unknown."""
    family = _family(config_json)
    reader = ConfigReader(config_json)
    config: ModelConfig = family.config(reader)
    reader.finish()
    return config


def checkpoint_layouts(model_type: str) -> tuple[Layout, ...]:
    """The ways in which checkpoints of this type name their feed-forward tensors, the published one first."""
    layouts: tuple[Layout, ...] = MODEL_TYPES[model_type].LAYOUTS
    return layouts
