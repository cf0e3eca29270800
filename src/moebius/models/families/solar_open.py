"""Solar Open: GLM-4.5's layers, all of them with experts, and heads that turn as a whole."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.families import glm4_moe
from moebius.models.family import Family
from moebius.models.parts import attention, decoder, grouped_experts, layers, rope
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    turning = rope(reader, partial=1.0)
    if turning.partial != 1:
        raise reader.error(f"partial_rotary_factor is {turning.partial}; only 1 is supported")
    mixer = attention(reader, rope=turning, qkv_bias=reader.flag("attention_bias"))
    return decoder(reader, layers(reader, mixer, grouped_experts(reader)))


# Files do not tell it from GLM-4.5's, which may have all of this.
NO_KEYS = ("intermediate_size", "first_k_dense_replace")
GGUF = replace(
    glm4_moe.GGUF,
    keys=tuple(key for key in glm4_moe.GGUF.keys if key.config not in NO_KEYS),
    values={**glm4_moe.GGUF.values, "leading_dense_block_count": 0},
    present={"attention_bias": "blk.0.attn_q.bias"},
)
FAMILY = Family(read, glm4_moe.FAMILY.layouts, gguf=(GGUF,))
