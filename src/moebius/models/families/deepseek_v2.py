"""DeepSeek-V2: latent attention, and experts with softmax scores, which are weights as they are."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.gguf_latent import DEEPSEEK_V2
from moebius.models.latent_parts import LAYOUTS, latent_attention, latent_decoder
from moebius.models.parts import experts, first_dense, rope
from moebius.models.reading import ConfigReader
from moebius.moe.config import FeedForwardConfig

GREEDY = "greedy"
LIMITED = "group_limited_greedy"


def sparse(reader: ConfigReader) -> FeedForwardConfig:
    plain = experts(reader, "n_routed_experts", "moe_intermediate_size", weight="raw")
    assert plain.router is not None
    router = replace(plain.router, scale=reader.number("routed_scaling_factor"))
    if reader.word("topk_method", (GREEDY, LIMITED)) == LIMITED:
        groups = reader.integer("n_group")
        router = replace(router, num_groups=groups, groups_kept=reader.integer("topk_group"))
    # transformers' class reads neither: the greedy choice has no groups, and weights are as they
    # are.
    reader.computed |= {"n_group", "topk_group", "norm_topk_prob"}
    shared = plain.width * reader.integer("n_shared_experts")
    return replace(plain, router=router, shared_width=shared)


def read(reader: ConfigReader) -> ModelConfig:
    first = reader.integer("first_k_dense_replace", low=0)
    parts = first_dense(reader, sparse(reader), first)
    mixer = latent_attention(reader, rope=replace(rope(reader), interleaved=True))
    return latent_decoder(reader, mixer, parts)


FAMILY = Family(read, LAYOUTS, gguf=(DEEPSEEK_V2,))
