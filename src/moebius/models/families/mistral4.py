"""Mistral-Small-4: latent attention whose queries grow with their position, and softmax scores."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_latent import MISTRAL4
from moebius.models.latent_parts import (
    LAYOUTS,
    latent_attention,
    latent_decoder,
    turning_in_pairs,
)
from moebius.models.parts import experts, first_dense, rope_of
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig
from moebius.nn.mixers.latent import MLA
from moebius.ops.config import Temperature

USUAL_ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
# Beside what frequencies depend on: how queries grow, and what other keys say.
GROWTH = "llama_4_scaling_beta"
BESIDE = (GROWTH, "max_position_embeddings", "partial_rotary_factor")


def attention(reader: ConfigReader) -> MLA:
    old = reader.get("rope_scaling")
    given = old or reader.get("rope_parameters") or USUAL_ROPE
    name = "rope_scaling" if old else "rope_parameters"
    if not isinstance(given, Mapping):
        raise reader.error(f"{name} is {given!r}; it must be an object")
    entries = {key: value for key, value in given.items() if key not in BESIDE}
    turning = rope_of(reader, name, entries)
    beta = given.get(GROWTH)
    original = given.get("original_max_position_embeddings")
    if isinstance(beta, bool) or not isinstance(beta, int | float) or type(original) is not int:
        raise reader.error(
            f"{name} has {GROWTH} = {beta!r} and original_max_position_embeddings = {original!r}, "
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


def sparse(reader: ConfigReader) -> FeedForwardConfig:
    plain = experts(reader, "n_routed_experts", "moe_intermediate_size")
    assert plain.router is not None
    router = replace(
        plain.router,
        num_groups=reader.integer("n_group"),
        groups_kept=reader.integer("topk_group"),
        group_score="top2",
        renorm_eps=1e-20,
        scale=reader.number("routed_scaling_factor"),
    )
    shared = plain.width * reader.integer("n_shared_experts")
    return replace(plain, router=router, shared_width=shared)


def read(reader: ConfigReader) -> ModelConfig:
    first = reader.integer("first_k_dense_replace", low=0)
    return latent_decoder(reader, attention(reader), first_dense(reader, sparse(reader), first))


FAMILY = Family(read, LAYOUTS, gguf=MISTRAL4)
