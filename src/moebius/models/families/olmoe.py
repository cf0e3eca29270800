"""OLMoE (arXiv 2409.02060): norms over all of queries and keys, which may be clipped; raw softmax
weights."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import USUAL_KEYS, GgufArchitecture, expert_keys
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import attention, decoder, experts, layers
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    clip = reader.optional_number("clip_qkv")
    mixer = attention(reader, qk_norm="full", clip_qkv=clip, biases=True)
    part = experts(reader, "num_experts", "intermediate_size")
    return decoder(reader, layers(reader, mixer, part))


GGUF = GgufArchitecture(
    "olmoe",
    (*USUAL_KEYS, *expert_keys("num_experts")),
    sparse=True,
    fixed={"hidden_act": "silu", "norm_topk_prob": False, "clip_qkv": None},
    values={"expert_gating_func": 1, "expert_weights_norm": False},
    present={"attention_bias": "blk.0.attn_q.bias"},
)
FAMILY = Family(read, (Layout(), Layout(FUSED)), gguf=(GGUF,))
