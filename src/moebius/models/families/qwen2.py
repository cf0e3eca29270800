"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values; windows, where used, in the
upper layers."""

from collections.abc import Sequence

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import GgufArchitecture
from moebius.models.parts import (
    FULL,
    SLIDING,
    attention,
    decoder,
    feed_forward,
    layer_types,
    layers,
)
from moebius.models.reading import ConfigReader


def slides(reader: ConfigReader) -> bool:
    """Whether the Qwen family's sliding window is on."""
    window = reader.get("sliding_window")
    return reader.flag("use_sliding_window") and window is not None


def windows(reader: ConfigReader, default_types: Sequence[str]) -> list[int | None]:
    """On with use_sliding_window, in the layers that layer_types (or its default) name."""
    types = layer_types(reader) or default_types
    if not slides(reader):
        if SLIDING in types:
            raise reader.error(f"layer_types has {SLIDING}, but use_sliding_window is off")
        return [None] * len(types)
    window = reader.integer("sliding_window")
    return [window if kind == SLIDING else None for kind in types]


def upper_windows(reader: ConfigReader) -> list[int | None]:
    """Of the dense models: without layer_types, layers from max_window_layers on have a window."""
    first = reader.integer("max_window_layers", low=0)
    on = slides(reader)
    usual = [SLIDING if on and i >= first else FULL for i in range(reader.num_layers)]
    return windows(reader, usual)


def read(reader: ConfigReader) -> ModelConfig:
    mixer = attention(reader, qkv_bias=True)
    part = feed_forward(reader)
    return decoder(reader, layers(reader, mixer, part, upper_windows(reader)))


GGUF = GgufArchitecture("qwen2", fixed={"hidden_act": "silu", "use_sliding_window": False})
FAMILY = Family(read, gguf=(GGUF,))
