"""Granite 3, dense: Llama's layers, and multipliers on four places of the network."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.families import granitemoe
from moebius.models.family import Family
from moebius.models.gguf_architecture import MULTIPLIER_KEYS, USUAL_KEYS
from moebius.models.layout import Layout
from moebius.models.parts import feed_forward
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    return granitemoe.model(reader, feed_forward(reader, bias=reader.flag("mlp_bias")))


GGUF = replace(
    granitemoe.GGUF,
    name="granite",
    keys=(*USUAL_KEYS, *MULTIPLIER_KEYS),
    sparse=False,
    values={granitemoe.TURNS: True},
    present={**granitemoe.GGUF.present, "mlp_bias": "blk.0.ffn_up.bias"},
)
FAMILY = Family(read, (Layout(),), gguf=(GGUF,))
