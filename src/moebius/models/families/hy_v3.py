"""Hunyuan 3: sigmoid scores with a selection bias, dense first layers, shared experts."""

from collections.abc import Mapping
from typing import Any

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import (
    SHARED_WIDTH,
    USUAL_KEYS,
    FileKeys,
    GgufArchitecture,
    Key,
    expert_keys,
    layouts,
    told_by_routers,
)
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import attention, biased_experts, decoder, dense_or_sparse, layers
from moebius.models.reading import ConfigReader


def read(reader: ConfigReader) -> ModelConfig:
    # Routed and shared are joined in float32 here, which rounds as a sum of 16-bit numbers does.
    reader.flag("enable_moe_fp32_combine")
    routed = biased_experts(
        reader,
        "num_experts",
        "moe_intermediate_size",
        "num_shared_experts",
        renorm_eps=1e-20,
        scale=reader.number("router_scaling_factor"),
    )
    mixer = attention(reader, qk_norm="head", biases=True)
    return decoder(reader, layers(reader, mixer, dense_or_sparse(reader, routed, 1)))


def shared_count(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a GGUF file, which says how wide all shared experts are together."""
    length = keys.get(SHARED_WIDTH.gguf, 0)
    width = config["moe_intermediate_size"]
    if type(length) is not int or width < 1 or length % width:
        raise keys.wrong(SHARED_WIDTH.gguf, f"is {length!r}; it must be a multiple of {width}")
    return {"num_shared_experts": length // width}


PUBLISHED = {
    "mlp.router.weight": "mlp.router.gate.weight",
    "mlp.router.selection_bias": "mlp.expert_bias",
    **layout.shared("mlp.shared_mlp.{p}"),
}
CONVERTED = {
    "mlp.router.selection_bias": "mlp.e_score_correction_bias",
    **layout.shared("mlp.shared_experts.{p}"),
    **FUSED,
}
GGUF = GgufArchitecture(
    "hy_v3",
    (
        *USUAL_KEYS,
        *expert_keys("num_experts", "moe_intermediate_size"),
        Key("router_scaling_factor", "expert_weights_scale", "number"),
        SHARED_WIDTH,
    ),
    sparse=True,
    fixed={"hidden_act": "silu", "mlp_bias": False, "attention_bias": False},
    values={"expert_gating_func": 2, "expert_weights_norm": True},
    layouts=layouts({"mlp.router.selection_bias": "exp_probs_b"}),
    read=shared_count,
    told=told_by_routers,
)
FAMILY = Family(read, (Layout(PUBLISHED), Layout(CONVERTED)), gguf=(GGUF,))
