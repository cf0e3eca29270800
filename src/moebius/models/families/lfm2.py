"""LFM2: short convolutions, attention in some layers, and dense feed-forwards."""

from moebius.models import gguf_hybrid, layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.layout import Layout, Names
from moebius.models.parts import CONV, FULL
from moebius.models.reading import ConfigReader
from moebius.models.short_parts import mixers, model, width
from moebius.moe.config import FeedForwardConfig


def read(reader: ConfigReader) -> ModelConfig:
    numbers = range(reader.num_layers)
    given = reader.get("full_attn_idxs")
    full = numbers if given is None else reader.indices("full_attn_idxs")
    usual = [FULL if i in full else CONV for i in numbers]
    return model(reader, mixers(reader, usual), FeedForwardConfig(width(reader)))


W = ("w1", "w3", "w2")
"""Gate, up and down."""
SHORT = [f"{name}.{x}" for name in ("in_proj", "conv", "out_proj") for x in ("weight", "bias")]
NAMES: Names = {
    "input_layernorm.weight": "operator_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"self_attn.{role}": f"conv.{role}" for role in SHORT},
    "self_attn.o_proj.weight": "self_attn.out_proj.weight",
    "self_attn.q_norm.weight": "self_attn.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attn.k_layernorm.weight",
    **layout.dense("feed_forward.{p}", W),
}
FINAL = "model.embedding_norm.weight"
FAMILY = Family(read, (Layout(NAMES, norm=FINAL),), gguf=(gguf_hybrid.LFM2,))
