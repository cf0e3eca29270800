"""Llama 1, 2 and 3: dense."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.parts import attention, decoder, feed_forward, layers
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    part = feed_forward(reader, bias=reader.flag("mlp_bias"))
    return decoder(reader, layers(reader, attention(reader, biases=True), part))


FAMILY = Family(read)
