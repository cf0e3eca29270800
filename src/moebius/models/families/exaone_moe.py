"""K-EXAONE: the experts of DeepSeek-V3; layers with a window turn, those without have no
positions."""

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import (
    ROUTER_KEYS,
    SHARED_WIDTH,
    SLIDING_WINDOW,
    USUAL_KEYS,
    GgufArchitecture,
    Key,
    expert_keys,
    sliding_layers,
)
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import (
    decoder,
    dense_or_sparse,
    every_nth_full,
    grouped_experts,
    layer_types,
    layers,
    turning_windows,
)
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    routed = grouped_experts(reader, "num_experts", "num_shared_experts")
    parts = dense_or_sparse(reader, routed, reader.integer("first_k_dense_replace", low=0))
    types = layer_types(reader)
    # A word beside layer_types, which then count.
    reader.computed.add("sliding_window_pattern")
    if types is None:
        types = every_nth_full(reader.num_layers, reader.integer("sliding_window_pattern"))
    mixers = turning_windows(reader, types, qk_norm="head")
    return decoder(reader, layers(reader, mixers, parts))


SHARED = layout.shared("mlp.shared_experts.{p}")
PUBLISHED = {**SHARED, "mlp.router.selection_bias": "mlp.e_score_correction_bias"}
GGUF = GgufArchitecture(
    "exaone-moe",
    (
        *USUAL_KEYS,
        *expert_keys("num_experts", "moe_intermediate_size"),
        Key("num_shared_experts", "expert_shared_count"),
        Key("first_k_dense_replace", "leading_dense_block_count"),
        *ROUTER_KEYS,
        SHARED_WIDTH,
        SLIDING_WINDOW,
        sliding_layers(4),
    ),
    sparse=True,
    fixed={"hidden_act": "silu"},
    values={"expert_gating_func": 2},
    ropes="sliding",
)
FAMILY = Family(read, (Layout(PUBLISHED), Layout({**SHARED, **FUSED})), ("mtp.*",), gguf=(GGUF,))
