"""Qwen3-MoE: Qwen3's attention over fine-grained experts without a shared one. Our own models are
of this type."""

from moebius.models.config import ModelConfig
from moebius.models.families.qwen2 import slides
from moebius.models.families.qwen2_moe import DENSE_NOWHERE, sparse_layers
from moebius.models.family import Family
from moebius.models.gguf_architecture import USUAL_KEYS, GgufArchitecture, expert_keys
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import attention, decoder, experts, feed_forward, layers
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    sparse = experts(reader, "num_experts", "moe_intermediate_size")
    dense = feed_forward(reader)
    parts = [sparse if routed else dense for routed in sparse_layers(reader)]
    # All layers slide, or none: published configurations carry max_window_layers, transformers does
    # not read it.
    window = reader.integer("sliding_window") if slides(reader) else None
    mixer = attention(reader, qk_norm="head", biases=True)
    return decoder(reader, layers(reader, mixer, parts, window))


GGUF = GgufArchitecture(
    "qwen3moe",
    (*USUAL_KEYS, *expert_keys("num_experts", "moe_intermediate_size")),
    sparse=True,
    fixed={**DENSE_NOWHERE, "norm_topk_prob": True},
    values={"expert_gating_func": 1, "expert_weights_norm": True},
    present={"attention_bias": "blk.0.attn_q.bias"},
)
FAMILY = Family(read, (Layout(), Layout(FUSED)), gguf=(GGUF,))
