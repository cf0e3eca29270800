"""How GGUF files have gated delta nets: keys, names, and which head stands where.

A value head shares the key head of its neighbours in Hugging Face's files. In those of the
architectures qwen35 and qwen35moe value heads are tiled: those of the first rank of each key head,
then those of the second. Facts as llama.cpp's converter has them: conversion/qwen.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from moebius.errors import ConfigError
from moebius.gguf import Value
from moebius.models.config import ModelConfig
from moebius.models.gguf_architecture import FileKeys, Key, Moved
from moebius.models.layout import Names
from moebius.models.parts import FULL, LINEAR
from moebius.models.reading import ConfigReader
from moebius.nn.mixer import Mixer
from moebius.nn.mixers.gated_delta import GatedDelta, Projections

KEYS = (
    Key("linear_conv_kernel_dim", "ssm.conv_kernel"),
    Key("linear_key_head_dim", "ssm.state_size"),
    Key("linear_num_key_heads", "ssm.group_count"),
    Key("linear_num_value_heads", "ssm.time_step_rank"),
)
NAMES: Names = {
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "self_attn.in_proj_z.weight": "attn_gate.weight",
    "self_attn.in_proj_ba.weight": "ssm_ba.weight",
    "self_attn.in_proj_b.weight": "ssm_beta.weight",
    "self_attn.in_proj_a.weight": "ssm_alpha.weight",
    "self_attn.conv1d.weight": "ssm_conv1d.weight",
    "self_attn.decay": "ssm_a",
    "self_attn.dt_bias": "ssm_dt.bias",
    "self_attn.norm.weight": "ssm_norm.weight",
    "self_attn.out_proj.weight": "ssm_out.weight",
}
_EVERY = "full_attention_interval"
_RECURRENT = "attention.recurrent_layers"
_SECTIONS = "rope.dimension_sections"
# Of the positions of text, image rows and image columns; text has them all the same.
_USUAL_SECTIONS = [11, 11, 10]


def read(keys: FileKeys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers recur, and the size of value heads."""
    layers = config["num_hidden_layers"]
    interval = keys.get(_EVERY, 4)
    if type(interval) is not int or interval < 1:
        raise keys.wrong(_EVERY, f"is {interval!r}; it must be a positive integer")
    recurrent = keys.listed(_RECURRENT) or [bool((i + 1) % interval) for i in range(layers)]
    if len(recurrent) < layers or not all(isinstance(each, bool) for each in recurrent):
        raise keys.wrong(_RECURRENT, f"must be true or false for each of {layers} layers")
    keys.listed(_SECTIONS)
    inner = keys.get("ssm.inner_size", 0)
    heads = config["linear_num_value_heads"]
    if type(inner) is not int or heads < 1 or inner < 1 or inner % heads:
        raise keys.wrong("ssm.inner_size", f"is {inner!r}; it must be a multiple of {heads} heads")
    return {
        "layer_types": [LINEAR if each else FULL for each in recurrent[:layers]],
        "linear_value_head_dim": inner // heads,
    }


def write(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    """The keys that `read` reads. Raises ConfigError for what llama.cpp has no such nets of."""
    nets = [mixer for mixer in config.mixers if isinstance(mixer, GatedDelta)]
    if not nets:
        raise ConfigError("GGUF files of this architecture have gated delta nets; this model none")
    sizes = nets[0].sizes
    if sizes.value_dim != sizes.key_dim:
        raise ConfigError(
            f"linear_value_head_dim is {sizes.value_dim}, but llama.cpp takes "
            f"linear_key_head_dim = {sizes.key_dim} for granted of both; load the model with "
            "--quantization instead"
        )
    return {
        "ssm.inner_size": sizes.out_size,
        _RECURRENT: [isinstance(mixer, GatedDelta) for mixer in config.mixers],
        _EVERY: reader.integer(_EVERY, 4),
    }


def write_sectioned(reader: ConfigReader, config: ModelConfig) -> dict[str, Value]:
    """The same, and the sections of rotary embeddings, without which llama.cpp reads no qwen35."""
    rope = reader.raw.get("rope_parameters") or reader.raw.get("rope_scaling") or {}
    sections: list[int] = list(rope.get("mrope_section") or _USUAL_SECTIONS)
    return {**write(reader, config), _SECTIONS: [*sections, 0, 0, 0, 0][:4]}


def held(projections: Projections, *, tiled: bool) -> Callable[[Mixer], Mixer]:
    """For GgufArchitecture.held: gated delta nets as they lie in such files."""

    def as_stored(mixer: Mixer) -> Mixer:
        if not isinstance(mixer, GatedDelta):
            return mixer
        sizes = replace(mixer.sizes, tiled=tiled)
        return replace(mixer, sizes=sizes, projections=projections, logarithm=False)

    return as_stored


def moved(mixer: Mixer, name: str) -> Moved | None:
    """For GgufArchitecture.moved: what stands elsewhere in files than in those of Hugging Face.

    mixer: as the latter have it; name: of a parameter as the former have it.
    """
    if not isinstance(mixer, GatedDelta):
        return None
    if mixer.projections == "grouped":
        return _ungrouped(mixer, name)
    sizes = mixer.sizes
    heads = _tiled(mixer)
    values = list(_of_heads(heads, sizes.value_dim))
    keys = range(2 * sizes.key_heads * sizes.key_dim)
    match name:
        case "in_proj_qkv.weight" | "conv1d.weight":
            return Moved(name, [*keys, *(len(keys) + value for value in values)])
        case "in_proj_z.weight":
            return Moved(name, values)
        case "in_proj_b.weight" | "in_proj_a.weight" | "dt_bias":
            return Moved(name, heads)
        case "decay":
            return Moved("A_log", heads, exponential=True)
        case "out_proj.weight":
            return Moved(name, columns=values)
    return None


def _ungrouped(mixer: GatedDelta, name: str) -> Moved | None:
    """Queries, keys and values of all heads stand together, and their z."""
    rows = [range(first, last) for matrix, first, last in mixer.pieces() if matrix.endswith("qkvz")]
    queries_to_values = 3 * mixer.sizes.key_heads
    match name:
        case "in_proj_qkv.weight":
            return Moved("in_proj_qkvz.weight", [*chain(*rows[:queries_to_values])])
        case "in_proj_z.weight":
            return Moved("in_proj_qkvz.weight", [*chain(*rows[queries_to_values:])])
        case "decay":
            return Moved("A_log", exponential=True)
    return None


def _tiled(mixer: GatedDelta) -> Sequence[int]:
    """Which of the value heads of Hugging Face's files stands where."""
    sizes = mixer.sizes
    shared = sizes.value_heads // sizes.key_heads
    return [key * shared + rank for rank in range(shared) for key in range(sizes.key_heads)]


def _of_heads(heads: Sequence[int], size: int) -> chain[int]:
    return chain.from_iterable(range(head * size, (head + 1) * size) for head in heads)
