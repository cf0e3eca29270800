"""dots.llm1: sigmoid scores with a selection bias; dense first layers; shared experts without a
gate."""

from dataclasses import replace

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import USUAL_KEYS, GgufArchitecture, Key, expert_keys, meaning
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import (
    FULL,
    SLIDING,
    attention,
    decoder,
    experts,
    feed_forward,
    layer_types,
    layers,
    sliding_window,
)
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig


def sparse(reader: ConfigReader) -> FeedForwardConfig:
    """The experts of DeepSeek-V3 (arXiv 2412.19437), all shared ones as a single wide one."""
    plain = experts(reader, "n_routed_experts", "moe_intermediate_size", score="sigmoid")
    assert plain.router is not None
    router = replace(
        plain.router,
        selection_bias=True,
        num_groups=reader.integer("n_group"),
        groups_kept=reader.integer("topk_group"),
        group_score="top2",
        group_fill="never",
        renorm_eps=1e-20,
        scale=reader.number("routed_scaling_factor"),
    )
    shared_width = plain.width * reader.integer("n_shared_experts")
    return replace(plain, router=router, shared_width=shared_width)


def windows(reader: ConfigReader) -> list[int | None]:
    """In the layers that layer_types names; without it, from max_window_layers on."""
    window = sliding_window(reader)
    first = reader.integer("max_window_layers", reader.num_layers, low=0)
    usual = [SLIDING if window and i >= first else FULL for i in range(reader.num_layers)]
    return [window if kind == SLIDING else None for kind in layer_types(reader) or usual]


def read(reader: ConfigReader) -> ModelConfig:
    routed = sparse(reader)
    first = reader.integer("first_k_dense_replace", low=0)
    dense = feed_forward(reader)
    parts = [dense if i < first else routed for i in range(reader.num_layers)]
    mixer = attention(reader, qk_norm="head", biases=True)
    return decoder(reader, layers(reader, mixer, parts, windows(reader)))


SHARED = layout.shared("mlp.shared_experts.{p}")
GGUF = GgufArchitecture(
    "dots1",
    (
        *USUAL_KEYS,
        *expert_keys("n_routed_experts", "moe_intermediate_size"),
        Key("n_shared_experts", "expert_shared_count"),
        Key("first_k_dense_replace", "leading_dense_block_count"),
        Key("routed_scaling_factor", "expert_weights_scale", "number"),
        Key("norm_topk_prob", "expert_weights_norm", "flag", meaning(False)),
        Key("n_group", "expert_group_count", absent=meaning(1)),
        Key("topk_group", "expert_group_used_count", absent=meaning(1)),
    ),
    sparse=True,
    fixed={"hidden_act": "silu", "sliding_window": None},
    values={"expert_gating_func": 2},
    present={"attention_bias": "blk.0.attn_q.bias"},
)
FAMILY = Family(read, (Layout(SHARED), Layout({**SHARED, **FUSED})), gguf=GGUF)
