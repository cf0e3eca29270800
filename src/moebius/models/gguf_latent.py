"""How GGUF files have latent attention: keys, names, and matrices of heads.

What makes a head's keys of latents stands there as it is multiplied with queries, a row for each
number of a latent; what makes values, as in Hugging Face's files. Older files have both in one
tensor. Facts as llama.cpp's converter has them: conversion/deepseek.py, conversion/mistral3.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import (
    USUAL_KEYS,
    FileKeys,
    GgufArchitecture,
    Key,
    expert_keys,
    layouts,
    meaning,
)
from moebius.models.layout import KEYS_OF_LATENTS, VALUES_OF_LATENTS, Names, OfHeads
from moebius.models.reading import ConfigReader
from moebius.nn.mixers.latent import MLA
from moebius.nn.rope import frequencies

_SIGMOID = 2
# A file of GLM-4.7-Flash from before files said which function scores go through.
_FLASH_VOCABULARY = 154_880
_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
_GROWTH = "attention.temperature_scale"
_PERIOD = "attention.temperature_length"

_OF_EQUAL_HEADS = ("num_key_value_heads", "head_dim")
_LATENT_KEYS = (
    *(key for key in USUAL_KEYS if key.config not in _OF_EQUAL_HEADS),
    Key("q_lora_rank", "attention.q_lora_rank", absent=meaning(None), optional=True),
    Key("kv_lora_rank", "attention.kv_lora_rank"),
    Key("qk_rope_head_dim", "rope.dimension_count"),
    *expert_keys("n_routed_experts", "moe_intermediate_size"),
    Key("n_shared_experts", "expert_shared_count"),
    Key("first_k_dense_replace", "leading_dense_block_count", absent=meaning(0)),
)
_NORM = Key("norm_topk_prob", "expert_weights_norm", "flag", meaning(False), optional=True)
_ROUTED = (
    Key("routed_scaling_factor", "expert_weights_scale", "number", meaning(1.0)),
    Key("n_group", "expert_group_count", absent=meaning(1), optional=True),
    Key("topk_group", "expert_group_used_count", absent=meaning(1), optional=True),
)

NAMES: Names = {
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    KEYS_OF_LATENTS: OfHeads("attn_k_b.weight", keys=True, apart=True),
    VALUES_OF_LATENTS: OfHeads("attn_v_b.weight", apart=True),
}
OLDER_NAMES: Names = {
    KEYS_OF_LATENTS: OfHeads("attn_kv_b.weight", keys=True),
    VALUES_OF_LATENTS: OfHeads("attn_kv_b.weight"),
}


def read(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a head, and what else scales positions."""
    turning = config["qk_rope_head_dim"]
    latent = config["kv_lora_rank"]
    heads = config["num_attention_heads"]
    size = _integer(keys, "attention.key_length_mla")
    if size:
        # To llama.cpp there is one head of keys, which latents are.
        _expect(keys, "attention.key_length", latent + turning)
        _expect(keys, "attention.value_length", latent)
        value_size = _integer(keys, "attention.value_length_mla")
        _expect(keys, "attention.head_count_kv", 1)
    else:
        size = _integer(keys, "attention.key_length")
        value_size = _integer(keys, "attention.value_length")
        _expect(keys, "attention.head_count_kv", heads)
    if size <= turning or value_size < 1:
        raise keys.wrong("attention.key_length_mla", f"is {size}, of which {turning} turn")
    found = {
        "num_key_value_heads": heads,
        "qk_nope_head_dim": size - turning,
        "v_head_dim": value_size,
    }
    weight = keys.get(_LOG_MULTIPLIER, 0.0)
    if not isinstance(weight, float):
        raise keys.wrong(_LOG_MULTIPLIER, f"is {weight!r}; it must be a number")
    # The converter has cos and sin as they are, and scores take all of it.
    scaled = {"mscale": 10 * weight, "mscale_all_dim": 10 * weight, "attention_factor": 1.0}
    return {**found, "rope_scaling": scaled} if weight else found


def _integer(keys: FileKeys, key: str) -> int:
    value = keys.get(key, 0)
    if type(value) is not int:
        raise keys.wrong(key, f"is {value!r}; it must be an integer")
    return value


def _expect(keys: FileKeys, key: str, wanted: int) -> None:
    value = _integer(keys, key)
    if value not in (0, wanted):
        raise keys.wrong(key, f"is {value}, where the other sizes make it {wanted}")


def _read_v2(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    limited = (config["n_group"] or 1) > 1
    method = "group_limited_greedy" if limited else "greedy"
    return {**read(keys, config), "topk_method": method}


def _read_growing(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    found = read(keys, config)
    beta = keys.get(_GROWTH, 0.0)
    original = keys.get("rope.scaling.original_context_length", 0)
    period = keys.get(_PERIOD, original)
    if period not in (0, original):
        raise keys.wrong(_PERIOD, f"is {period!r}; only {original!r} is supported")
    return {
        **found,
        "rope_scaling": {**found.get("rope_scaling", {}), "llama_4_scaling_beta": beta},
    }


def write(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    """The keys that `read` reads. Raises ConfigError for what files cannot say."""
    mixer = next(each for each in config.mixers if isinstance(each, MLA))
    found: dict[str, Value] = {
        "attention.head_count_kv": 1,
        "attention.key_length": mixer.latent_size,
        "attention.value_length": mixer.kv_rank,
        "attention.key_length_mla": mixer.query_dim,
        "attention.value_length_mla": mixer.value_dim,
    }
    rope = mixer.rope
    if rope is not None and rope.scaling == "yarn" and rope.mscale_all_dim:
        _, factor = frequencies(rope, mixer.rope_dim)
        if abs(factor - 1) > 1e-6:
            raise ConfigError(
                f"rope mscale is {rope.mscale}, but files of deepseek2 have it equal to "
                f"mscale_all_dim = {rope.mscale_all_dim}; load the model with --quantization "
                "instead"
            )
        found[_LOG_MULTIPLIER] = 0.1 * rope.mscale_all_dim
    if mixer.temperature is not None:
        found[_GROWTH] = mixer.temperature.beta
        found[_PERIOD] = mixer.temperature.original
    return found


def _sigmoid(metadata: Mapping[str, object]) -> bool:
    """Whether scores go through a sigmoid, as DeepSeek-V3's do."""
    function = metadata.get("deepseek2.expert_gating_func", 0)
    tokens = metadata.get("tokenizer.ggml.tokens")
    known = isinstance(tokens, list) and len(tokens) == _FLASH_VOCABULARY
    return function == _SIGMOID or (not function and known)


DEEPSEEK_V2 = GgufArchitecture(
    "deepseek2",
    (*_LATENT_KEYS, *_ROUTED),
    sparse=True,
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    values={"expert_gating_func": 1, "expert_weights_norm": False},
    layouts=(*layouts(NAMES), *layouts({**NAMES, **OLDER_NAMES})),
    latent=True,
    read=_read_v2,
    write=write,
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    keys=(*_LATENT_KEYS, *_ROUTED, _NORM),
    fixed={"hidden_act": "silu", "attention_bias": False, "rope_interleave": True},
    values={"expert_gating_func": _SIGMOID},
    marks=_sigmoid,
    read=read,
)
# Of models that differ in what config.json calls things alone: files are read as of the one before.
LIKE_V3 = replace(DEEPSEEK_V3, marks=lambda _: False)
MISTRAL4 = replace(
    DEEPSEEK_V3,
    name="mistral4",
    values={"expert_gating_func": 1},
    marks=None,
    read=_read_growing,
)
