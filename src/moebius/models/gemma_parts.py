"""What Gemma 4's models share: heads of another size in each kind of layer, each with a rotary
embedding of its own, and keys and values that some layers take from others."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moebius.models.parts import (
    FULL,
    SLIDING,
    activation,
    every_nth_full,
    given_ropes,
    layer_types,
    rope_of,
)
from moebius.models.reading import ConfigReader, Keys
from moebius.moe.beside import DenseBeside
from moebius.moe.config import FeedForwardConfig
from moebius.nn.mixers.normed_values import NormedValues
from moebius.nn.rope import RopeConfig
from moebius.ops.config import RouterConfig

USUAL_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
PER_LAYER = "per_layer_config"
_SIZES = ("head_dim", "num_key_value_heads")


def turning_pairs(partial: float, head_dim: int) -> int:
    """How many pairs of a head turn, of a proportional rotary embedding; all are i and i + half."""
    return int(partial * head_dim // 2)


def proportional(theta: float, partial: float, head_dim: int, factor: float = 1.0) -> RopeConfig:
    """The frequencies of whole heads, of which the slow ones are 0 (transformers' rope type of that
    name)."""
    turning = turning_pairs(partial, head_dim)
    still = head_dim // 2 - turning
    return RopeConfig(theta, divisors=(factor,) * turning + (float("inf"),) * still)


def _rope(reader: ConfigReader, kind: str, given: Any, head_dim: int) -> RopeConfig:
    name = f"rope_parameters.{kind}"
    if not isinstance(given, dict):
        raise reader.error(f"rope_parameters has no object for {kind}, which a layer is of")
    if given.get("rope_type") != "proportional":
        return rope_of(reader, name, given)
    keys = ("rope_theta", "partial_rotary_factor", "factor", "rope_type")
    entries = ConfigReader(given, Keys(dict.fromkeys(keys)), f"{reader.where}{name}: ")
    entries.computed.add("rope_type")
    partial = entries.number("partial_rotary_factor", 1.0)
    if not 0 <= partial <= 1:
        raise entries.error(f"partial_rotary_factor is {partial}; it must lie between 0 and 1")
    theta = entries.number("rope_theta")
    factor = entries.number("factor", 1.0)
    if not factor >= 1:
        raise entries.error(f"factor is {factor}; it must be at least 1")
    entries.finish()
    return proportional(theta, partial, head_dim, factor)


def kinds(reader: ConfigReader) -> Sequence[str]:
    """What each layer is; the last one always sees everything."""
    types = layer_types(reader) or every_nth_full(reader.num_layers, 6)
    return [*types[:-1], FULL]


def _sizes(reader: ConfigReader, types: Sequence[str]) -> list[Mapping[str, int]]:
    """What of its heads is another layer's, by config.json's keys."""
    reader.computed |= {"global_head_dim", "num_global_key_value_heads", PER_LAYER}
    if PER_LAYER not in reader.raw:
        full = {"head_dim": reader.integer("global_head_dim", 512)}
        heads = reader.get("num_global_key_value_heads")
        if heads is not None and reader.flag("attention_k_eq_v"):
            full["num_key_value_heads"] = reader.integer("num_global_key_value_heads")
        return [full if kind == FULL else {} for kind in types]
    given = reader.raw[PER_LAYER] or {}
    if not isinstance(given, Mapping):
        raise reader.error(f"{PER_LAYER} is {given!r}; it must be an object")
    found: list[Mapping[str, int]] = [{} for _ in types]
    for layer, sizes in given.items():
        numbered = str(layer).isdecimal() and int(layer) < len(types)
        known = isinstance(sizes, Mapping) and set(sizes) <= set(_SIZES)
        if not (numbered and known and all(type(size) is int for size in sizes.values())):
            raise reader.error(
                f"{PER_LAYER} must have numbers of layers, with {' and '.join(_SIZES)} of each; "
                f"{layer!r}: {sizes!r} is not supported"
            )
        found[int(layer)] = sizes
    return found


def _of_kind(
    reader: ConfigReader, types: Sequence[str], kind: str, sizes: Sequence[Mapping[str, int]]
) -> NormedValues:
    """The attention of all layers of a kind."""
    own = [each for each, its in zip(sizes, types, strict=True) if its == kind]
    if any(each != own[0] for each in own):
        raise reader.error(f"{PER_LAYER} differs among layers of {kind}, which is not supported")
    biases = reader.flag("attention_bias")
    head_dim = own[0].get("head_dim", reader.integer("head_dim"))
    ropes = given_ropes(reader, USUAL_ROPES)
    return NormedValues(
        num_heads=reader.integer("num_attention_heads"),
        num_kv_heads=own[0].get("num_key_value_heads", reader.integer("num_key_value_heads")),
        head_dim=head_dim,
        window=reader.integer("sliding_window") if kind == SLIDING else None,
        rope=_rope(reader, kind, ropes.get(kind) if isinstance(ropes, dict) else None, head_dim),
        qk_norm="head",
        qkv_bias=biases,
        output_bias=biases,
        scale=1.0,
        keys_as_values=reader.flag("attention_k_eq_v") and kind == FULL,
    )


def first_taker(reader: ConfigReader) -> int:
    """The first of the layers, up to the last, that attend over what others keep."""
    return reader.num_layers - reader.integer("num_kv_shared_layers", 0, low=0)


def mixers(reader: ConfigReader) -> list[NormedValues]:
    """Each layer's attention. Layers that keep nothing attend over what the last one of their kind
    kept before them."""
    types = kinds(reader)
    sizes = _sizes(reader, types)
    each = {kind: _of_kind(reader, types, kind, sizes) for kind in dict.fromkeys(types)}
    reader.computed.add("sliding_window")  # where no layer has one, it is none's
    first = first_taker(reader)
    if first < 0 or set(types[:first]) != set(types):
        raise reader.error(
            f"num_kv_shared_layers = {len(types) - first} leaves no layer of some kind to take "
            "keys and values from"
        )
    last = {kind: layer for layer, kind in enumerate(types[:first])}
    return [
        each[kind] if layer < first else replace(each[kind], kept_by=last[kind])
        for layer, kind in enumerate(types)
    ]


def feed_forwards(reader: ConfigReader) -> list[FeedForwardConfig]:
    """Each layer's: dense, or dense beside experts. A dense one may be twice as wide where keys and
    values are another layer's."""
    width = reader.integer("intermediate_size")
    does = activation(reader, "hidden_activation")
    if "enable_moe_block" in reader.keys.read and reader.flag("enable_moe_block"):
        router = RouterConfig(
            reader.integer("num_experts"), reader.integer("top_k_experts"), weight="renorm"
        )
        experts = reader.integer("moe_intermediate_size")
        parts: dict[int, FeedForwardConfig] = {
            times: DenseBeside(experts, router, does, shared_width=times * width)
            for times in (1, 2)
        }
    else:
        reader.computed |= {"num_experts", "top_k_experts", "moe_intermediate_size"}
        parts = {times: FeedForwardConfig(times * width, activation=does) for times in (1, 2)}
    wider = 2 if reader.flag("use_double_wide_mlp") else 1
    first = first_taker(reader)
    return [parts[1 if layer < first else wider] for layer in range(reader.num_layers)]
