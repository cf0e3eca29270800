"""Llama 1, 2 and 3: dense."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import GgufArchitecture
from moebius.models.parts import attention, decoder, feed_forward, layers
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    part = feed_forward(reader, bias=reader.flag("mlp_bias"))
    return decoder(reader, layers(reader, attention(reader, biases=True), part))


GGUF = GgufArchitecture(
    "llama",
    fixed={"hidden_act": "silu"},
    present={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    permuted=True,
)
FAMILY = Family(read, gguf=(GGUF,))
