"""Qwen1.5-MoE and Qwen2-MoE: fine-grained experts, raw softmax weights, and a shared expert behind
a sigmoid gate."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.families.qwen2 import slides, windows
from moebius.models.family import Family
from moebius.models.gguf_architecture import USUAL_KEYS, GgufArchitecture, Key, expert_keys
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import (
    FULL,
    SLIDING,
    attention,
    decoder,
    experts,
    feed_forward,
    layers,
)
from moebius.models.reading import ConfigReader


def sparse_layers(reader: ConfigReader) -> list[bool]:
    """Which layers have experts in the Qwen family: every decoder_sparse_step-th, but for
    mlp_only_layers."""
    step = reader.integer("decoder_sparse_step")
    dense = reader.indices("mlp_only_layers")
    return [i not in dense and (i + 1) % step == 0 for i in range(reader.num_layers)]


def lower_windows(reader: ConfigReader) -> list[int | None]:
    """transformers alternates windows below max_window_layers here, unlike in the dense models."""
    last = reader.integer("max_window_layers", low=0)
    on = slides(reader)
    usual = [SLIDING if on and i % 2 == 0 and i < last else FULL for i in range(reader.num_layers)]
    return windows(reader, usual)


def read(reader: ConfigReader) -> ModelConfig:
    sparse = replace(
        experts(reader, "num_experts", "moe_intermediate_size"),
        shared_width=reader.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    dense = feed_forward(reader)
    parts = [sparse if routed else dense for routed in sparse_layers(reader)]
    mixer = attention(reader, qkv_bias=reader.flag("qkv_bias"))
    return decoder(reader, layers(reader, mixer, parts, lower_windows(reader)))


# llama.cpp takes these for granted of all of Qwen's models with experts.
DENSE_NOWHERE = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GGUF = GgufArchitecture(
    "qwen2moe",
    (
        *USUAL_KEYS,
        *expert_keys("num_experts", "moe_intermediate_size"),
        Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ),
    sparse=True,
    fixed={**DENSE_NOWHERE, "norm_topk_prob": False},
    values={"expert_gating_func": 1, "expert_weights_norm": False},
    present={"qkv_bias": "blk.0.attn_q.bias"},
)
FAMILY = Family(read, (Layout(), Layout(FUSED)), gguf=(GGUF,))
