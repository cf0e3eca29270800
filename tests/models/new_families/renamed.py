"""Llama under other names, as a family would be written whose checkpoints have little in common
with those of others."""

from moebius.models.families import llama
from moebius.models.family import Family
from moebius.models.layout import Layout, Names, dense

NAMES: Names = {
    "input_layernorm.weight": "operator_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "self_attn.out_proj.weight",
    **dense("ff.{p}", ("w1", "w3", "w2")),
}
LAYOUT = Layout(
    NAMES,
    layer="backbone.blocks.{i}.",
    embedding="backbone.embeddings.weight",
    norm="backbone.norm_f.weight",
    head="output.weight",
)
FAMILY = Family(llama.read, (LAYOUT,))
