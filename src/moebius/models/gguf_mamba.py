"""How GGUF files have Mamba 2 layers: keys, names, and numbers that the converter changes. Facts as
llama.cpp has them: conversion/mamba.py, conversion/granite.py and conversion/nemotron.py."""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import filter as fnfilter
from typing import Any

from moebius.gguf import Value
from moebius.models import gguf_hybrid
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import (
    MULTIPLIER_KEYS,
    ROUTER_KEYS,
    SHARED_WIDTH,
    FileKeys,
    GgufArchitecture,
    Key,
    Moved,
    Shapes,
    expert_keys,
    layouts,
    meaning,
)
from moebius.models.gguf_hybrid import KV_HEADS
from moebius.models.layout import Names, Stacked, dense
from moebius.models.nemotron_parts import MLP, MOE
from moebius.models.parts import FULL, LINEAR
from moebius.models.reading import ConfigReader
from moebius.nn.attention import GQA
from moebius.nn.mixer import Mixer
from moebius.nn.mixers.mamba2 import Mamba2

_INNER = "ssm.inner_size"
_TURNS = "rope.scaling.finetuned"
_WIDTHS = "feed_forward_length"
_RMS = "attention.layer_norm_rms_epsilon"
_ATTENTION_BIAS = "blk.*.attn_q.bias"
_CONV_BIAS = "blk.*.ssm_conv1d.bias"
_NAMES: Names = {
    "self_attn.in_proj.weight": "ssm_in.weight",
    "self_attn.conv1d.weight": "ssm_conv1d.weight",
    "self_attn.conv1d.bias": "ssm_conv1d.bias",
    "self_attn.decay": "ssm_a",
    "self_attn.dt_bias": "ssm_dt.bias",
    "self_attn.D": "ssm_d",
    "self_attn.norm.weight": "ssm_norm.weight",
    "self_attn.out_proj.weight": "ssm_out.weight",
}
_GRANITE_KEYS = (
    *gguf_hybrid.hybrid_keys(),
    *(replace(key, absent=meaning(0)) for key in expert_keys("num_local_experts")),
    *MULTIPLIER_KEYS,
    Key(
        "shared_intermediate_size",
        SHARED_WIDTH.gguf,
        absent=lambda config: config["intermediate_size"],
    ),
    Key("mamba_d_conv", "ssm.conv_kernel"),
    Key("mamba_d_state", "ssm.state_size"),
    Key("mamba_n_groups", "ssm.group_count"),
    Key("mamba_n_heads", "ssm.time_step_rank"),
)


def _head_size(keys: FileKeys, heads: int) -> int:
    inner = keys.get(_INNER, 0)
    if type(inner) is not int or heads < 1 or inner < 1 or inner % heads:
        raise keys.wrong(_INNER, f"is {inner!r}; it must be a multiple of {heads} heads")
    return inner // heads


def _read_granite(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have attention, and whether it turns."""
    heads = gguf_hybrid.kv_heads(keys, config)
    turns = keys.get(_TURNS, True)
    return {
        "layer_types": [FULL if count else LINEAR for count in heads],
        "num_key_value_heads": max(heads) or None,
        "mamba_d_head": _head_size(keys, config["mamba_n_heads"]),
        "position_embedding_type": "rope" if turns else None,
    }


def _write_granite(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    return {
        **gguf_hybrid.write(reader, config),
        SHARED_WIDTH.gguf: reader.integer("shared_intermediate_size"),
        _INNER: _mamba(config).sizes.out_size,
        _TURNS: reader.get("position_embedding_type") == "rope",
    }


def _mamba(config: ModelConfig) -> Mamba2:
    """One layer's; gguf_hybrid.write has seen that there is any."""
    return next(mixer for mixer in config.mixers if isinstance(mixer, Mamba2))


def _biases(shapes: Shapes, flags: Mapping[str, str]) -> dict[str, Any]:
    """Flags of config.json that are on where the file has any of the tensors that each names."""
    return {flag: bool(fnfilter(shapes, name)) for flag, name in flags.items()}


def _told_granite(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    return _biases(shapes, {"attention_bias": _ATTENTION_BIAS, "mamba_conv_bias": _CONV_BIAS})


def _held(mixer: Mixer) -> Mixer:
    """For GgufArchitecture.held: Mamba 2 layers as they lie in such files."""
    return replace(mixer, published=False) if isinstance(mixer, Mamba2) else mixer


def _moved(mixer: Mixer, name: str) -> Moved | None:
    """For GgufArchitecture.moved."""
    decays = isinstance(mixer, Mamba2) and name == "decay"
    return Moved("A_log", exponential=True) if decays else None


GRANITE = GgufArchitecture(
    "granitehybrid",
    _GRANITE_KEYS,
    sparse=None,
    fixed={"hidden_act": "silu", "mamba_expand": 2, "mamba_proj_bias": False},
    layouts=layouts(_NAMES),
    ropes="any",
    permuted=True,
    read=_read_granite,
    write=_write_granite,
    told=_told_granite,
    held=_held,
    moved=_moved,
)

_NOT_NEMOTRONS = (_RMS, _WIDTHS, "rope.freq_base")
_DENSE_NEMOTRON_KEYS = (
    *(key for key in gguf_hybrid.hybrid_keys() if key.gguf not in _NOT_NEMOTRONS),
    Key("layer_norm_epsilon", "attention.layer_norm_epsilon", "number"),
    Key("conv_kernel", "ssm.conv_kernel"),
    Key("ssm_state_size", "ssm.state_size"),
    Key("n_groups", "ssm.group_count"),
    Key("mamba_num_heads", "ssm.time_step_rank"),
)
_NEMOTRON_KEYS = (
    *_DENSE_NEMOTRON_KEYS,
    *expert_keys("n_routed_experts", "moe_intermediate_size"),
    Key("moe_shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    Key("n_shared_experts", "expert_shared_count", absent=meaning(1)),
    Key("moe_latent_size", "moe_latent_size", absent=meaning(None), optional=True),
    *ROUTER_KEYS,
)
_UP_DOWN: Names = {
    f"mlp.{part}{ours}": stored
    for ours, theirs in (("gate_proj", "up"), ("down_proj", "down"))
    for part, stored in (
        ("experts.", Stacked(f"ffn_{theirs}_exps.weight")),
        ("shared.", f"ffn_{theirs}_shexp.weight"),
    )
}
_NEMOTRON_NAMES: Names = {
    **_NAMES,
    **_UP_DOWN,
    **dense("ffn_{p}", ("up", "up", "down")),
    "post_attention_layernorm.weight": "attn_norm.weight",
    "mlp.dispatch.down.weight": "ffn_latent_down.weight",
    "mlp.dispatch.up.weight": "ffn_latent_up.weight",
}


def _read_nemotron(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """What each layer is, by its key/value heads and the width of its feed-forward."""
    return _nemotron_layers(keys, config, MOE)[1]


def _read_dense_nemotron(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """The same where feed-forwards have no experts, and all have one width."""
    widths, found = _nemotron_layers(keys, config, MLP)
    if len(widths) > 1:
        raise keys.wrong(_WIDTHS, f"has several widths, {sorted(widths)}")
    return {**found, "intermediate_size": max(widths, default=1)}


def _nemotron_layers(
    keys: FileKeys, config: Mapping[str, Any], feeding: str
) -> tuple[set[int], dict[str, Any]]:
    """The widths of feed-forwards, which are layers of the kind `feeding`, and what config.json
    would have of all layers."""
    heads = gguf_hybrid.kv_heads(keys, config)
    each = list(keys.listed(_WIDTHS) or [])[: len(heads)]
    widths = [width for width in each if type(width) is int]
    if len(widths) != len(heads):
        raise keys.wrong(_WIDTHS, f"must be a number for each of {len(heads)} layers, 0 for none")
    eps = keys.get(_RMS, config["layer_norm_epsilon"])
    if eps != config["layer_norm_epsilon"]:
        raise keys.wrong(_RMS, f"is {eps!r}, but layer_norm_epsilon another")
    kinds = [
        FULL if count else feeding if width else LINEAR
        for count, width in zip(heads, widths, strict=True)
    ]
    if any(count and width for count, width in zip(heads, widths, strict=True)):
        raise keys.wrong(_WIDTHS, f"is not 0 in layers that have attention by {KV_HEADS}")
    return set(widths) - {0}, {
        "layers_block_type": kinds,
        "num_key_value_heads": max(heads) or None,
        "mamba_head_dim": _head_size(keys, config["mamba_num_heads"]),
    }


def _write_nemotron(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    parts = [layer.feed_forward for layer in config.layers]
    return {
        **gguf_hybrid.write(reader, config),
        _WIDTHS: [0 if part is None else part.width for part in parts],
        _INNER: _mamba(config).sizes.out_size,
        _RMS: config.norm_eps,
        "attention.value_length": next(
            mixer.head_dim for mixer in config.mixers if isinstance(mixer, GQA)
        ),
    }


def _told_nemotron(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    return _biases(shapes, {"attention_bias": _ATTENTION_BIAS, "use_conv_bias": _CONV_BIAS})


def _told_dense_nemotron(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    return _told_nemotron(shapes, config) | _biases(shapes, {"mlp_bias": "blk.*.ffn_up.bias"})


DENSE_NEMOTRON = GgufArchitecture(
    "nemotron_h",
    _DENSE_NEMOTRON_KEYS,
    fixed={"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "use_bias": False},
    layouts=layouts(_NEMOTRON_NAMES)[:1],
    ropes="none",
    read=_read_dense_nemotron,
    write=_write_nemotron,
    told=_told_dense_nemotron,
    held=_held,
    moved=_moved,
)
NEMOTRON = replace(
    DENSE_NEMOTRON,
    name="nemotron_h_moe",
    keys=_NEMOTRON_KEYS,
    sparse=True,
    fixed={**DENSE_NEMOTRON.fixed, "mlp_bias": False},
    values={"expert_gating_func": 2},
    read=_read_nemotron,
    told=_told_nemotron,
)
