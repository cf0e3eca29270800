"""GLM-4.5 as a family would be written: dots.llm1's experts, and a part of each head turns."""

from moebius.models.config import ModelConfig
from moebius.models.families import dots1
from moebius.models.family import Family
from moebius.models.parts import attention, decoder, feed_forward, layers, rope
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    routed = dots1.sparse(reader)
    dense = feed_forward(reader)
    first = reader.integer("first_k_dense_replace", low=0)
    parts = [dense if i < first else routed for i in range(reader.num_layers)]
    mixer = attention(
        reader,
        rope=rope(reader, partial=0.5),
        qk_norm="head" if reader.flag("use_qk_norm") else "none",
        qkv_bias=reader.flag("attention_bias"),
    )
    return decoder(reader, layers(reader, mixer, parts))


FAMILY = Family(read, dots1.FAMILY.layouts)
