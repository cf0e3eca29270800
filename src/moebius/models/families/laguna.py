"""Laguna: layers of two kinds, each with a rotary embedding of its own and its number of heads,
whose output has gates behind softplus; sigmoid scores with a selection bias."""

from dataclasses import replace

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_laguna import GGUF
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import (
    FULL,
    SLIDING,
    attention_of_kinds,
    biased_experts,
    decoder,
    dense_or_sparse,
    given_ropes,
    layer_types,
    layers,
)
from moebius.models.reading import ConfigReader
from moebius.nn.attention import GQA

USUAL_ROPES = {
    FULL: {"rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
    SLIDING: {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
}
GATED = {True: "heads", "per-head": "heads", "per-element": "values"}


def mixers(reader: ConfigReader) -> list[GQA]:
    types = layer_types(reader) or [FULL] * reader.num_layers
    gating = reader.get("gating")
    if not isinstance(gating, (bool, str)) or gating not in GATED:
        raise reader.error(f"gating is {gating!r}; it must be true, per-head or per-element")
    each = attention_of_kinds(
        reader,
        types,
        given_ropes(reader, USUAL_ROPES),
        partial=1.0,
        qk_norm="head",
        gated=GATED[gating],
        gate_function="softplus",
        biases=True,
    )
    heads = reader.get("num_attention_heads_per_layer")
    if heads is None:
        return each
    if not isinstance(heads, list) or len(heads) != len(types) or set(map(type, heads)) != {int}:
        raise reader.error("num_attention_heads_per_layer must be a number for each layer")
    return [replace(mixer, num_heads=count) for mixer, count in zip(each, heads, strict=True)]


def read(reader: ConfigReader) -> ModelConfig:
    routed = biased_experts(
        reader,
        "num_experts",
        "moe_intermediate_size",
        scale=reader.number("moe_routed_scaling_factor"),
        logit_softcap=reader.number("moe_router_logit_softcapping") or None,
    )
    routed = replace(routed, shared_width=reader.integer("shared_expert_intermediate_size"))
    return decoder(reader, layers(reader, mixers(reader), dense_or_sparse(reader, routed, 1)))


NAMES: layout.Names = {"self_attn.gate_proj.weight": "self_attn.g_proj.weight"}
PUBLISHED = {**NAMES, "mlp.router.selection_bias": "mlp.experts.e_score_correction_bias"}
CONVERTED = {**NAMES, **FUSED, **layout.shared("mlp.shared_experts.{p}")}
FAMILY = Family(read, (Layout(PUBLISHED), Layout(CONVERTED)), ("mtp.*",), gguf=(GGUF,))
