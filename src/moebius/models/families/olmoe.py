"""OLMoE (arXiv 2409.02060): norms over all of queries and keys, which may be clipped; raw softmax
weights."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import attention, decoder, experts, layers
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    clip = reader.optional_number("clip_qkv")
    mixer = attention(reader, qk_norm="full", clip_qkv=clip, biases=True)
    part = experts(reader, "num_experts", "intermediate_size")
    return decoder(reader, layers(reader, mixer, part))


FAMILY = Family(read, (Layout(), Layout(FUSED)))
