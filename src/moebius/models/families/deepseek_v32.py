"""DeepSeek-V3.2 where it is DeepSeek-V3: as long as all tokens are among those that its indexer
picks."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.latent_parts import INDEXER, LAYOUTS, indexed_decoder, latent_attention
from moebius.models.parts import dense_or_sparse, grouped_experts, rope
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    first = reader.integer("first_k_dense_replace", low=0)
    parts = dense_or_sparse(reader, grouped_experts(reader), first)
    mixer = latent_attention(reader, rope=replace(rope(reader), interleaved=True))
    return indexed_decoder(reader, mixer, parts)


FAMILY = Family(read, LAYOUTS, INDEXER)
