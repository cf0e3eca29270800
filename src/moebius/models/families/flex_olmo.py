"""FlexOlmo (arXiv 2507.07024): OLMoE's layers, but only what they add to the stream is normed."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import attention, decoder, experts, layers
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    mixer = attention(reader, qk_norm="full", biases=True)
    part = experts(reader, "num_experts", "intermediate_size")
    return decoder(reader, layers(reader, mixer, part, norms="post"), norm="float32")


NAMES = {
    "mixer_output_norm.weight": "post_attention_layernorm.weight",
    "mlp_output_norm.weight": "post_feedforward_layernorm.weight",
}
FAMILY = Family(read, (Layout(NAMES), Layout({**NAMES, **FUSED})))
