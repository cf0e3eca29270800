"""dots.llm1: sigmoid scores with a selection bias; dense first layers; shared experts without a
gate."""

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import (
    ROUTER_KEYS,
    USUAL_KEYS,
    GgufArchitecture,
    Key,
    expert_keys,
    meaning,
)
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import (
    FULL,
    SLIDING,
    attention,
    decoder,
    first_dense,
    grouped_experts,
    layer_types,
    layers,
    sliding_window,
)
from moebius.models.reading import ConfigReader


def windows(reader: ConfigReader) -> list[int | None]:
    """In the layers that layer_types names; without it, from max_window_layers on."""
    window = sliding_window(reader)
    first = reader.integer("max_window_layers", reader.num_layers, low=0)
    usual = [SLIDING if window and i >= first else FULL for i in range(reader.num_layers)]
    return [window if kind == SLIDING else None for kind in layer_types(reader) or usual]


def read(reader: ConfigReader) -> ModelConfig:
    first = reader.integer("first_k_dense_replace", low=0)
    parts = first_dense(reader, grouped_experts(reader), first)
    mixer = attention(reader, qk_norm="head", biases=True)
    return decoder(reader, layers(reader, mixer, parts, windows(reader)))


SHARED = layout.shared("mlp.shared_experts.{p}")
GGUF = GgufArchitecture(
    "dots1",
    (
        *USUAL_KEYS,
        *expert_keys("n_routed_experts", "moe_intermediate_size"),
        Key("n_shared_experts", "expert_shared_count"),
        Key("first_k_dense_replace", "leading_dense_block_count", absent=meaning(0)),
        *ROUTER_KEYS,
    ),
    sparse=True,
    fixed={"hidden_act": "silu", "sliding_window": None},
    values={"expert_gating_func": 2},
    present={"attention_bias": "blk.0.attn_q.bias"},
)
FAMILY = Family(read, (Layout(SHARED), Layout({**SHARED, **FUSED})), gguf=(GGUF,))
