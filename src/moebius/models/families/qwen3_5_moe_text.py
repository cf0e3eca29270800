"""Qwen3.5 with experts, whose weights always sum to one: the language model of qwen3_5_moe."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.delta_parts import mixers, sparse
from moebius.models.families import qwen3_5_text as dense
from moebius.models.family import Family
from moebius.models.gguf_architecture import Key, expert_keys, meaning
from moebius.models.layout import FUSED
from moebius.models.parts import decoder, layers
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    each = layers(reader, mixers(reader), sparse(reader, "renorm"))
    return decoder(reader, each, norm="zero-centred")


# The width of dense layers, of which there are none, stands in some files.
_WIDTH = Key("intermediate_size", "feed_forward_length", absent=meaning(None), optional=True)
GGUF = replace(
    dense.GGUF,
    name="qwen35moe",
    keys=(
        *(_WIDTH if key.config == _WIDTH.config else key for key in dense.GGUF.keys),
        *expert_keys("num_experts", "moe_intermediate_size"),
        Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ),
    sparse=True,
    values={"expert_gating_func": 1, "expert_weights_norm": True},
)
FAMILY = Family(read, dense.layouts_of({}, FUSED), dense.UNUSED, gguf=(GGUF,))
