"""Mistral: Llama with a sliding window in all layers."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import GgufArchitecture
from moebius.models.parts import attention, decoder, feed_forward, layers, sliding_window
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    part = feed_forward(reader)
    return decoder(reader, layers(reader, attention(reader), part, sliding_window(reader)))


# A file does not tell it from Llama's, which has no window.
GGUF = GgufArchitecture(
    "llama", fixed={"hidden_act": "silu", "sliding_window": None}, permuted=True
)
FAMILY = Family(read, gguf=(GGUF,))
