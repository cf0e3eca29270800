"""Granite 3 MoE: stacked experts, softmax over the chosen logits, multipliers on four places of the
network."""

from collections.abc import Sequence
from typing import Any

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import (
    MULTIPLIER_KEYS,
    USUAL_KEYS,
    GgufArchitecture,
    expert_keys,
)
from moebius.models.layout import Layout, stacked
from moebius.models.parts import attention, decoder, experts, layers
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.attention import GQA
from moebius.nn.mixer import Mixer


def sparse(reader: ConfigReader) -> FeedForwardConfig:
    return experts(
        reader, "num_local_experts", "intermediate_size", score="logits", weight="softmax"
    )


def scaled_attention(reader: ConfigReader, **different: Any) -> GQA:
    scale = reader.number("attention_multiplier")
    return attention(reader, scale=scale, biases=True, **different)


def model(
    reader: ConfigReader, part: FeedForwardConfig, mixers: Sequence[Mixer] | None = None
) -> ModelConfig:
    """With this feed-forward part in each layer, and attention, unless there are other mixers."""
    residual = reader.number("residual_multiplier")
    every = mixers or scaled_attention(reader)
    return decoder(
        reader,
        layers(reader, every, part, residual_multiplier=residual),
        embedding_multiplier=reader.number("embedding_multiplier"),
        logits_divisor=reader.number("logits_scaling"),
    )


def read(reader: ConfigReader) -> ModelConfig:
    return model(reader, sparse(reader))


AT = "block_sparse_moe."
PUBLISHED = {
    "mlp.router.weight": AT + "router.layer.weight",
    **stacked(AT + "input_linear.weight", AT + "output_linear.weight"),
}
CONVERTED = {
    "mlp.router.weight": AT + "router.weight",
    **stacked(AT + "experts.gate_up_proj", AT + "experts.down_proj"),
}
# Whether positions turn heads: Granite 4 without Mamba layers may do without, and is not read.
TURNS = "rope.scaling.finetuned"
GGUF = GgufArchitecture(
    "granitemoe",
    (*USUAL_KEYS, *expert_keys("num_local_experts"), *MULTIPLIER_KEYS),
    sparse=True,
    fixed={"hidden_act": "silu"},
    values={"expert_gating_func": 1, TURNS: True},
    present={"attention_bias": "blk.0.attn_q.bias"},
    permuted=True,
)
FAMILY = Family(read, (Layout(PUBLISHED), Layout(CONVERTED)), gguf=(GGUF,))
