"""How GGUF files have Kimi delta attention beside latent attention: Kimi Linear's and Ling 3's.
Facts as llama.cpp has them: conversion/kimi_linear.py and conversion/bailingmoe3.py."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import (
    ROUTER_KEYS,
    SHARED_WIDTH,
    FileKeys,
    GgufArchitecture,
    Key,
    Moved,
    expert_keys,
    layouts,
    meaning,
)
from moebius.models.gguf_hybrid import KV_HEADS, hybrid_keys, kv_heads
from moebius.models.gguf_latent import NAMES, OLDER_NAMES
from moebius.models.layout import Names
from moebius.models.parts import FULL, LINEAR
from moebius.models.reading import ConfigReader
from moebius.nn.mixer import Mixer
from moebius.nn.mixers.kimi_delta import HeldDecay, KimiDelta
from moebius.nn.mixers.latent import MLA

_NAMES: Names = {
    **NAMES,
    **{f"self_attn.{x}_conv1d.weight": f"ssm_conv1d_{x}.weight" for x in "qkv"},
    **{f"self_attn.{x}_{y}_proj.weight": f"ssm_{x}_{y}.weight" for x in "fg" for y in "ab"},
    **{f"self_attn.{x}_proj.weight": f"ssm_{x}_a.weight" for x in "fg"},
    "self_attn.b_proj.weight": "ssm_beta.weight",
    "self_attn.decay": "ssm_a",
    "self_attn.dt_bias": "ssm_dt.bias",
    "self_attn.o_norm.weight": "ssm_norm.weight",
    "self_attn.gate_proj.weight": "attn_gate.weight",
}
_KEYS = (
    *(key for key in hybrid_keys() if key.config != "head_dim"),
    Key("kv_lora_rank", "attention.kv_lora_rank"),
    Key("qk_rope_head_dim", "rope.dimension_count"),
    *expert_keys("num_local_experts", "moe_intermediate_size"),
    Key("n_shared_experts", "expert_shared_count", absent=meaning(1)),
    Key("first_k_dense_replace", "leading_dense_block_count", absent=meaning(0)),
    *(replace(key, optional=True) for key in ROUTER_KEYS if key.config != "norm_topk_prob"),
)


def _integer(keys: FileKeys, key: str) -> int:
    value = keys.get(key, 0)
    return value if type(value) is int else 0


def _read(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have latent attention, and the sizes of its heads."""
    turning = config["qk_rope_head_dim"]
    heads = config["num_attention_heads"]
    size = _integer(keys, "attention.key_length_mla")
    value_size = _integer(keys, "attention.value_length_mla")
    if size <= turning or value_size < 1:
        raise keys.wrong("attention.key_length_mla", f"is {size}, of which {turning} turn")
    latent = keys.get("attention.key_length", 0)
    if latent not in (0, config["kv_lora_rank"] + turning):
        raise keys.wrong("attention.key_length", f"is {latent!r}, and no latent with its key")
    # Which of the sizes it is differs among converters, and nothing is told by it.
    keys.get("attention.value_length", 0)
    return {
        "layer_types": [FULL if count else LINEAR for count in kv_heads(keys, config)],
        "num_key_value_heads": heads,
        "qk_nope_head_dim": size - turning,
        "v_head_dim": value_size,
    }


def _read_kimi(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_read(keys, config), "linear_num_heads": config["num_attention_heads"]}


def _write(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    full = [mixer for mixer in config.mixers if isinstance(mixer, MLA)]
    deltas = [mixer for mixer in config.mixers if isinstance(mixer, KimiDelta)]
    heads = {mixer.num_heads for mixer in full} | {mixer.heads for mixer in deltas}
    if not full or not deltas or len(heads) > 1:
        raise ConfigError(
            f"GGUF files of {config.model_type} have layers of Kimi delta attention and of latent "
            "attention, with as many heads; load this model with --quantization instead"
        )
    mixer = full[0]
    return {
        KV_HEADS: [int(isinstance(each, MLA)) for each in config.mixers],
        "attention.key_length": mixer.latent_size,
        "attention.value_length": mixer.kv_rank,
        "attention.key_length_mla": mixer.query_dim,
        "attention.value_length_mla": mixer.value_dim,
    }


def _held(how: HeldDecay) -> Callable[[Mixer], Mixer]:
    def as_stored(mixer: Mixer) -> Mixer:
        return replace(mixer, held=how) if isinstance(mixer, KimiDelta) else mixer

    return as_stored


def _moved(*, positive: bool) -> Callable[[Mixer, str], Moved | None]:
    def moved(mixer: Mixer, name: str) -> Moved | None:
        decays = isinstance(mixer, KimiDelta) and name == "decay"
        return Moved("A_log", exponential=True, positive=positive) if decays else None

    return moved


KIMI = GgufArchitecture(
    "kimi-linear",
    (
        *_KEYS,
        Key("q_lora_rank", "attention.q_lora_rank", absent=meaning(None), optional=True),
        Key("linear_conv_kernel_dim", "ssm.conv_kernel"),
        Key("linear_head_dim", "kda.head_dim"),
    ),
    sparse=True,
    fixed={"hidden_act": "silu", "attention_bias": False, "norm_topk_prob": True},
    values={"expert_gating_func": 2, "expert_weights_norm": True},
    layouts=(*layouts(_NAMES), *layouts({**_NAMES, **OLDER_NAMES})),
    latent=True,
    ropes="any",
    read=_read_kimi,
    write=_write,
    held=_held("decay"),
    moved=_moved(positive=False),
)
BAILING = replace(
    KIMI,
    name="bailingmoe3",
    keys=(
        *_KEYS,
        Key("norm_topk_prob", "expert_weights_norm", "flag", meaning(False)),
        SHARED_WIDTH,
        Key("short_conv_kernel_size", "ssm.conv_kernel"),
        Key("head_dim", "kda.head_dim"),
        Key("kda_lower_bound", "kda.gate_lower_bound", "number"),
    ),
    fixed={"hidden_act": "silu", "attention_bias": False, "kda_safe_gate": True},
    values={"expert_gating_func": 2, "kda.safe_gate": True},
    ropes="one",
    read=_read,
    held=_held("rate"),
    moved=_moved(positive=True),
)
