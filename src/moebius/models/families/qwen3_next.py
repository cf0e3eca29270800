"""Qwen3-Next: gated delta nets, and every few layers attention whose heads have gates; zero-centred
norms; many experts and a gated shared one."""

from dataclasses import replace

from moebius.models import gguf_delta
from moebius.models.config import ModelConfig
from moebius.models.delta_parts import linear_attention, mixers, sparse
from moebius.models.families.qwen2_moe import sparse_layers
from moebius.models.family import Family
from moebius.models.gguf_architecture import (
    USUAL_KEYS,
    GgufArchitecture,
    Key,
    expert_keys,
    layouts,
)
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import decoder, feed_forward, layers
from moebius.models.reading import ConfigReader

# What nothing reads where there are no experts.
OF_EXPERTS = {
    "num_experts_per_tok",
    "norm_topk_prob",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "decoder_sparse_step",
    "mlp_only_layers",
}


def read(reader: ConfigReader) -> ModelConfig:
    dense = feed_forward(reader)
    parts = [dense] * reader.num_layers
    if reader.integer("num_experts", low=0):
        routed = sparse(reader)
        parts = [routed if each else dense for each in sparse_layers(reader)]
    else:
        reader.computed |= OF_EXPERTS
    each = layers(reader, mixers(reader, "grouped"), parts)
    return decoder(reader, each, norm="zero-centred")


GGUF = GgufArchitecture(
    "qwen3next",
    (
        *USUAL_KEYS,
        *expert_keys("num_experts", "moe_intermediate_size"),
        Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
        *gguf_delta.KEYS,
    ),
    sparse=True,
    fixed={
        "hidden_act": "silu",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "attention_bias": False,
    },
    values={"expert_gating_func": 1, "expert_weights_norm": True},
    layouts=layouts(gguf_delta.NAMES),
    partial=True,
    read=gguf_delta.read,
    write=gguf_delta.write,
    held=gguf_delta.held("gates grouped", tiled=False),
    moved=gguf_delta.moved,
)
# Files of the first weeks have the queries, keys, values and gates of a key head together.
FIRST_GGUF = replace(
    GGUF,
    holding="blk.*.ssm_in.weight",
    layouts=layouts({**gguf_delta.NAMES, "self_attn.in_proj_qkvz.weight": "ssm_in.weight"}),
    held=gguf_delta.held("grouped", tiled=False),
)
NAMES = linear_attention("in_proj_qkvz", "in_proj_ba")
LAYOUTS = (Layout(NAMES), Layout({**NAMES, **FUSED}))
FAMILY = Family(read, LAYOUTS, ("mtp.*",), gguf=(GGUF, FIRST_GGUF))
