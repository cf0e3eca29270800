"""Mistral-Small-4: latent attention whose queries grow with their position, and softmax scores."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_latent import MISTRAL4
from moebius.models.latent_parts import LAYOUTS, growing_attention, latent_decoder
from moebius.models.layout import Layout
from moebius.models.parts import experts, first_dense
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig

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
    parts = first_dense(reader, sparse(reader), first)
    return latent_decoder(reader, growing_attention(reader, USUAL_ROPE), parts)


# Of text alone, and of files with images, as transformers 5 saves them and as they were published.
PREFIXES = {
    "model.": "lm_head.weight",
    "model.language_model.": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
}
UNUSED = ("*vision_tower.*", "*multi_modal_projector.*")
FAMILY = Family(
    read,
    tuple(
        Layout(
            each.names, f"{at}layers.{{i}}.", f"{at}embed_tokens.weight", f"{at}norm.weight", head
        )
        for at, head in PREFIXES.items()
        for each in reversed(LAYOUTS)
    ),
    UNUSED,
    gguf=(MISTRAL4,),
)
