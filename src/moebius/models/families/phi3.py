"""Phi-3 and Phi-4, dense: Llama's layers, with one matrix for queries, keys and values, and one for
gate and up. Those of a long context have other frequencies where sequences are long (longrope)."""

from dataclasses import replace

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import SLIDING_WINDOW, USUAL_KEYS, GgufArchitecture, layouts
from moebius.models.layout import Layout, Names, joined
from moebius.models.parts import (
    attention,
    decoder,
    feed_forward,
    layers,
    longrope,
    rope,
    sliding_window,
)
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    given = reader.get("rope_scaling") or reader.get("rope_parameters") or {}
    part = feed_forward(reader)
    window = sliding_window(reader)
    kind = given.get("rope_type", given.get("type")) if isinstance(given, dict) else None
    if kind not in ("longrope", "su"):
        mixer = attention(reader, rope=rope(reader, partial=1.0))
        return decoder(reader, layers(reader, mixer, part, window))
    short, long = longrope(reader, given)
    mixer = attention(reader, rope=short)
    config = decoder(reader, layers(reader, mixer, part, window))
    most = reader.integer("original_max_position_embeddings")
    return replace(config, longer=(most, layers(reader, replace(mixer, rope=long), part, window)))


def written(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    """Nothing. Raises ConfigError for longrope."""
    if config.longer is not None:
        raise ConfigError(
            "files of phi3 with longrope are read, but not written; use --quantization"
        )
    return {}


QKV = [f"self_attn.{x}_proj.weight" for x in "qkv"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]
NAMES: Names = {
    **joined("self_attn.qkv_proj.weight", *QKV),
    **joined("mlp.gate_up_proj.weight", *GATE_UP),
}
IN_FILES: Names = {**joined("attn_qkv.weight", *QKV), **joined("ffn_up.weight", *GATE_UP)}
GGUF = GgufArchitecture(
    "phi3",
    (*USUAL_KEYS, SLIDING_WINDOW),
    fixed={"hidden_act": "silu"},
    layouts=layouts(IN_FILES)[:1],
    partial=True,
    write=written,
)
FAMILY = Family(read, (Layout(NAMES),), gguf=(GGUF,))
