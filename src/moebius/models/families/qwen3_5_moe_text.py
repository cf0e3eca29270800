"""Qwen3.5 with experts, whose weights always sum to one: the language model of qwen3_5_moe."""

from moebius.models.config import ModelConfig
from moebius.models.families.qwen3_5_text import UNUSED, layouts
from moebius.models.families.qwen3_next import mixers, sparse
from moebius.models.family import Family
from moebius.models.layout import FUSED
from moebius.models.parts import decoder, layers
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    each = layers(reader, mixers(reader), sparse(reader, "renorm"))
    return decoder(reader, each, norm="zero-centred")


FAMILY = Family(read, tuple(layouts(FUSED, {})), UNUSED)
