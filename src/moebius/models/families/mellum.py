"""Mellum 2: Qwen3-MoE's layers, of which some have a window and a rotary embedding of their own."""

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import (
    SLIDING_WINDOW,
    USUAL_KEYS,
    GgufArchitecture,
    expert_keys,
    sliding_layers,
)
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import (
    FULL,
    SLIDING,
    attention_of_kinds,
    decoder,
    dense_or_sparse,
    experts,
    given_ropes,
    layer_types,
    layers,
)
from moebius.models.reading import ConfigReader

USUAL_ROPES = {FULL: {"rope_theta": 500_000.0}, SLIDING: {"rope_theta": 10_000.0}}
# Of layers that predict further tokens, which are left out.
PREDICTING = ("num_mtp_layers", "mtp_layer_types", "mtp_mlp_layer_types")


def read(reader: ConfigReader) -> ModelConfig:
    reader.computed.update(PREDICTING)
    types = layer_types(reader) or [FULL] * reader.num_layers
    ropes = given_ropes(reader, USUAL_ROPES)
    mixers = attention_of_kinds(reader, types, ropes, qk_norm="head", biases=True)
    sparse = experts(reader, "num_experts", "moe_intermediate_size")
    return decoder(reader, layers(reader, mixers, dense_or_sparse(reader, sparse, 0)))


GGUF = GgufArchitecture(
    "mellum",
    (
        *USUAL_KEYS,
        *expert_keys("num_experts", "moe_intermediate_size"),
        SLIDING_WINDOW,
        sliding_layers(4),
    ),
    sparse=True,
    fixed={"hidden_act": "silu", "norm_topk_prob": True, "attention_bias": False},
    values={"expert_gating_func": 1, "expert_weights_norm": True},
    ropes="each",
)
FAMILY = Family(read, (Layout(), Layout(FUSED)), ("mtp.*",), gguf=(GGUF,))
