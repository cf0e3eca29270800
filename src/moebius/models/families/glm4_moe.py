"""GLM-4.5 to GLM-4.7: the experts of dots.llm1, and a part of each head turns."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.families import dots1
from moebius.models.family import Family
from moebius.models.gguf_architecture import Key, layouts, meaning
from moebius.models.parts import (
    attention,
    decoder,
    first_dense,
    grouped_experts,
    layers,
    rope,
)
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    first = reader.integer("first_k_dense_replace", low=0)
    parts = first_dense(reader, grouped_experts(reader), first)
    mixer = attention(
        reader,
        rope=rope(reader, partial=0.5),
        qk_norm="head" if reader.flag("use_qk_norm") else "none",
        qkv_bias=reader.flag("attention_bias"),
    )
    return decoder(reader, layers(reader, mixer, parts))


# Where no layer is dense.
NO_WIDTH = Key("intermediate_size", "feed_forward_length", absent=meaning(1))
GGUF = replace(
    dots1.GGUF,
    name="glm4moe",
    keys=tuple(NO_WIDTH if key.config == NO_WIDTH.config else key for key in dots1.GGUF.keys),
    fixed={"hidden_act": "silu"},
    present={
        "attention_bias": "blk.0.attn_q.bias",
        "use_qk_norm": "blk.0.attn_q_norm.weight",
    },
    layouts=layouts({"post_attention_layernorm.weight": "post_attention_norm.weight"}),
    partial=True,
)
FAMILY = Family(read, dots1.FAMILY.layouts, gguf=(GGUF,))
