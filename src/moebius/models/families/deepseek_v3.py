"""DeepSeek-V3 and R1: latent attention, and experts with sigmoid scores and a selection bias."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_latent import DEEPSEEK_V3
from moebius.models.latent_parts import (
    LAYOUTS,
    latent_attention,
    latent_decoder,
    turning_in_pairs,
)
from moebius.models.parts import first_dense, grouped_experts, rope
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    first = reader.integer("first_k_dense_replace", low=0)
    parts = first_dense(reader, grouped_experts(reader), first)
    mixer = latent_attention(reader, rope=turning_in_pairs(reader, rope(reader)))
    return latent_decoder(reader, mixer, parts)


FAMILY = Family(read, LAYOUTS, gguf=(DEEPSEEK_V3,))
