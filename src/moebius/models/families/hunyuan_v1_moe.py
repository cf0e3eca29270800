"""Hunyuan A13B: queries and keys are normed once they are turned, by frequencies whose base alpha
stretches; each layer may choose another number of experts."""

from dataclasses import replace

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_architecture import (
    SHARED_WIDTH,
    USUAL_KEYS,
    GgufArchitecture,
    expert_keys,
)
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import attention, decoder, feed_forward, layers, rope, rope_of
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.rope import RopeConfig
from moebius.ops.config import RouterConfig


def stretched_rope(reader: ConfigReader) -> RopeConfig:
    """Files call it dynamic, but with an alpha it is one for all lengths."""
    given = reader.get("rope_scaling") or reader.get("rope_parameters")
    if not isinstance(given, dict) or not given.get("alpha"):
        return rope(reader)
    if given.get("rope_type", given.get("type")) != "dynamic":
        return rope(reader)
    alpha = given["alpha"]
    if not isinstance(alpha, (int, float)) or not 0 < alpha < 2**32:
        raise reader.error(f"rope alpha is {alpha!r}; it must be a positive number")
    size = reader.integer("head_dim")
    own = {key: value for key, value in given.items() if key == "rope_theta"}
    plain = rope_of(reader, "rope_parameters", own)
    if size < 3:
        raise reader.error(f"head_dim is {size}, which rope alpha cannot stretch")
    return replace(plain, theta=plain.theta * alpha ** (size / (size - 2)))


def sparse(reader: ConfigReader) -> list[FeedForwardConfig]:
    """Of each layer."""
    chosen = reader.get("moe_topk")
    each = chosen if isinstance(chosen, list) else [chosen] * reader.num_layers
    if len(each) != reader.num_layers or not all(type(k) is int for k in each):
        raise reader.error(f"moe_topk is {chosen!r}; it must be an integer, or one for each layer")
    count = reader.integer("num_experts")
    shared = feed_forward(reader)
    routers = [RouterConfig(count, k, weight="renorm", float32=True) for k in each]
    return [replace(shared, router=router, shared_width=shared.width) for router in routers]


def read(reader: ConfigReader) -> ModelConfig:
    mixer = attention(reader, rope=stretched_rope(reader), qk_norm="turned", biases=True)
    return decoder(reader, layers(reader, mixer, sparse(reader)))


NAMES = {
    "mlp.router.weight": "mlp.gate.wg.weight",
    "self_attn.q_norm.weight": "self_attn.query_layernorm.weight",
    "self_attn.k_norm.weight": "self_attn.key_layernorm.weight",
    **layout.shared("mlp.shared_mlp.{p}"),
}
GGUF = GgufArchitecture(
    "hunyuan-moe",
    (*USUAL_KEYS, *expert_keys("num_experts", "intermediate_size", "moe_topk"), SHARED_WIDTH),
    sparse=True,
    fixed={"hidden_act": "silu", "attention_bias": False},
    values={"expert_gating_func": 1, "expert_shared_count": 1},
)
FAMILY = Family(read, (Layout(NAMES), Layout({**NAMES, **FUSED})), gguf=(GGUF,))
