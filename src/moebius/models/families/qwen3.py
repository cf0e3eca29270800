"""Qwen3, dense: Llama with a norm over each head of queries and keys; windows as in Qwen2."""

from moebius.models.config import ModelConfig
from moebius.models.families.qwen2 import upper_windows
from moebius.models.family import Family
from moebius.models.gguf_architecture import GgufArchitecture
from moebius.models.parts import attention, decoder, feed_forward, layers
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    mixer = attention(reader, qk_norm="head", biases=True)
    part = feed_forward(reader)
    return decoder(reader, layers(reader, mixer, part, upper_windows(reader)))


GGUF = GgufArchitecture(
    "qwen3",
    fixed={"hidden_act": "silu", "use_sliding_window": False},
    present={"attention_bias": "blk.0.attn_q.bias"},
)
FAMILY = Family(read, gguf=(GGUF,))
