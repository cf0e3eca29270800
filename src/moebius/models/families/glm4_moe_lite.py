"""GLM-4.7-Flash: latent attention, and the experts of DeepSeek-V3."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_latent import LIKE_V3
from moebius.models.latent_parts import (
    LAYOUTS,
    latent_attention,
    latent_decoder,
    turning_in_pairs,
)
from moebius.models.parts import dense_or_sparse, grouped_experts, rope
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    parts = dense_or_sparse(reader, grouped_experts(reader), 1)
    mixer = latent_attention(reader, rope=turning_in_pairs(reader, rope(reader)))
    return latent_decoder(reader, mixer, parts)


FAMILY = Family(read, LAYOUTS, gguf=(LIKE_V3,))
