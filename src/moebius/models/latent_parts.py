"""What families with latent attention spell alike in config.json: DeepSeek-V2 and later ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moebius.models import layout
from moebius.models.config import ModelConfig
from moebius.models.layout import FUSED, Layout
from moebius.models.parts import decoder, layers, rope, rope_of
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.mixers.latent import MLA
from moebius.nn.rope import RopeConfig
from moebius.ops.config import Temperature

SHARED = layout.shared("mlp.shared_experts.{p}")
LAYOUTS = (Layout(SHARED), Layout({**SHARED, **FUSED}))
# What transformers works out of the other sizes, whatever a file says.
_WORKED_OUT = {"head_dim", "qk_head_dim"}
_PREDICTED = {"num_mtp_layers", "num_nextn_predict_layers"}
# What transformers writes of layers with an indexer; up to 5.17 the second.
_INDEXED = ({"indexed_attention"}, {"deepseek_sparse_attention"})
# Beside what frequencies depend on: how queries grow, and what other keys say.
_GROWTH = "llama_4_scaling_beta"
_BESIDE = (_GROWTH, "max_position_embeddings", "partial_rotary_factor")


def latent_attention(reader: ConfigReader, **different: Any) -> MLA:
    """Latent attention, and what is `different` about this one: fields of MLA."""
    reader.computed |= _WORKED_OUT
    heads = reader.integer("num_attention_heads")
    copies = reader.integer("num_key_value_heads", heads)
    if copies != heads:
        raise reader.error(
            f"num_key_value_heads is {copies}, but each of num_attention_heads = {heads} heads has "
            "keys of its own, all made of one latent"
        )
    turning = different.pop("rope", None) or rope(reader)
    plain = MLA(
        num_heads=heads,
        kv_rank=reader.integer("kv_lora_rank"),
        nope_dim=reader.integer("qk_nope_head_dim"),
        rope_dim=reader.integer("qk_rope_head_dim"),
        value_dim=reader.integer("v_head_dim"),
        q_rank=None if reader.get("q_lora_rank") is None else reader.integer("q_lora_rank"),
        rope=turning,
        bias=reader.flag("attention_bias"),
    )
    return replace(plain, scale=score_scale(plain, turning), **different)


def growing_attention(reader: ConfigReader, usual: Mapping[str, Any]) -> MLA:
    """The same, of queries that grow with their position, as an entry of rope's object says
    (Mistral 4); usual: that object where there is none."""
    old = reader.get("rope_scaling")
    given = old or reader.get("rope_parameters") or usual
    name = "rope_scaling" if old else "rope_parameters"
    if not isinstance(given, Mapping):
        raise reader.error(f"{name} is {given!r}; it must be an object")
    entries = {key: value for key, value in given.items() if key not in _BESIDE}
    turning = rope_of(reader, name, entries)
    beta = given.get(_GROWTH)
    original = given.get("original_max_position_embeddings")
    if isinstance(beta, bool) or not isinstance(beta, int | float) or type(original) is not int:
        raise reader.error(
            f"{name} has {_GROWTH} = {beta!r} and original_max_position_embeddings = {original!r}, "
            "by which queries grow; they must be a number and an integer"
        )
    mixer = latent_attention(reader, rope=turning_in_pairs(reader, turning))
    size = mixer.rope_dim / mixer.query_dim
    partial = given.get("partial_rotary_factor", size)
    if not isinstance(partial, int | float) or abs(partial - size) > 1e-6:
        raise reader.error(
            f"{name}.partial_rotary_factor is {partial!r}; of {mixer.query_dim} values "
            f"{mixer.rope_dim} turn, so it must be {size:.6g}"
        )
    return replace(mixer, temperature=Temperature(float(beta), original))


def turning_in_pairs(reader: ConfigReader, turning: RopeConfig) -> RopeConfig:
    """Neighbours turn together, unless rope_interleave says no."""
    return replace(turning, interleaved=reader.flag("rope_interleave"))


def score_scale(mixer: MLA, turning: RopeConfig) -> float | None:
    """Where positions are scaled, scores are too (DeepSeek's yarn, arXiv 2405.04434 section 3.1.4);
    None for the usual one."""
    weight = turning.mscale_all_dim
    if turning.scaling == "none" or not weight or turning.factor <= 1:
        return None
    more = 0.1 * weight * math.log(turning.factor) + 1.0
    return float(mixer.query_dim**-0.5 * more * more)


def latent_decoder(
    reader: ConfigReader,
    mixer: MLA,
    parts: Sequence[FeedForwardConfig],
    **different: Any,
) -> ModelConfig:
    """A model of one kind of attention, and what is `different` about it: fields of ModelConfig.
    Layers that predict further tokens are counted by a key, and left out."""
    reader.computed |= _PREDICTED
    mixers = [mixer] * reader.num_layers
    return decoder(reader, layers(reader, mixers, parts), **different)


def indexed_decoder(
    reader: ConfigReader, mixer: MLA, parts: Sequence[FeedForwardConfig]
) -> ModelConfig:
    """A model whose layers attend to the index_topk tokens that an indexer picks (DeepSeek-V3.2,
    arXiv 2512.02556): up to so many they attend to all, as any other does, and longer sequences
    are not computed here."""
    types = reader.get("layer_types")
    if types is not None and set(types) not in _INDEXED:
        raise reader.error(f"layer_types is {types!r}; all layers must have indexed_attention")
    reader.computed |= {"index_head_dim", "index_n_heads"}
    most = reader.integer("index_topk")
    whole = latent_decoder(reader, mixer, parts)
    if whole.context <= most:
        return whole
    capped = (
        f"layers attend to the index_topk = {most:,} tokens that an indexer picks, which is not "
        "computed here; up to so many they attend to all"
    )
    return replace(whole, context=most, capped=capped)


INDEXER = ("*.self_attn.indexer.*",)
"""Tensors of what picks tokens."""
