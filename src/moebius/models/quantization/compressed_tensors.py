"""compressed-tensors: groups of modules, each with its own scheme.

Keys: its QuantizationConfig, QuantizationScheme and QuantizationArgs.
"""

from collections.abc import Mapping
from typing import Any

from moebius.models.quantization.fields import block_size, names, opened, word
from moebius.models.quantization.fp8 import ACTIVATIONS
from moebius.models.quantization.matching import Targets
from moebius.models.quantization.record import Quantization, Rule, Scheme
from moebius.models.quantization.schemes import (
    BytesScheme,
    Fp8Scheme,
    MxFp4Scheme,
    NvFp4Scheme,
    WordsScheme,
)
from moebius.models.reading import ConfigReader

_WHERE = "config.json: quantization_config"
_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
_MIXED = "mixed-precision"
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_ARGS: dict[str, Any] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "group_size": None,
    "strategy": None,
    "block_structure": None,
    "dynamic": False,
    "actorder": None,
}
# What is stored beside the codes, and says again what the header does, or is of activations.
_UNREAD = ACTIVATIONS | {
    "weight_shape",
    "input_zero_point",
    "output_zero_point",
    "input_global_scale",
    "output_global_scale",
}


def read(raw: Mapping[str, Any]) -> Quantization:
    """Method `compressed-tensors`. A module's scheme is that of the target that says most: its
    name, then a pattern, then its class."""
    keys = {
        "config_groups": None,
        "format": None,
        "ignore": None,
        "sparsity_config": None,
        "transform_config": None,
        "moe_sparsity_config": None,
    }
    # The cache has the dtype that is asked for.
    harmless = ("quantization_status", "global_compression_ratio", "kv_cache_scheme", "version")
    reader = opened(raw, keys, harmless, _WHERE)
    usual = word(reader, "format", (*_FORMATS, _MIXED))
    ignored = Targets(names(reader, "ignore"))
    _check_sparsity(reader)
    groups = reader.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise reader.error(f"config_groups is {groups!r}; it must be an object of groups")
    reader.finish()
    schemes = [_group(name, group, usual) for name, group in groups.items()]
    rules = [Rule(ignored, None)]
    rules += [Rule(targets.named, scheme) for targets, scheme in schemes]
    rules += [Rule(targets.like, scheme) for targets, scheme in schemes]
    rules += [Rule(targets.classed, scheme) for targets, scheme in schemes]
    return Quantization("compressed-tensors", tuple(rules), _UNREAD)


def _check_sparsity(reader: ConfigReader) -> None:
    """`dense` says that nothing is left out."""
    sparsity = reader.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise reader.error(
            f"sparsity_config has the format {sparsity['format']!r}; supported is dense"
        )


def _group(name: str, group: object, usual: str) -> tuple[Targets, Scheme]:
    where = f"{_WHERE}: config_groups: {name}"
    if not isinstance(group, Mapping):
        raise opened({}, {}, (), where).error(f"it is {group!r}; it must be an object")
    keys = {"targets": None, "weights": None, "output_activations": None, "format": None}
    # Activations are computed in the model's own dtype, which loses nothing.
    reader = opened(group, keys, ("input_activations",), where)
    format = usual
    if reader.get("format") is not None:
        format = word(reader, "format", _FORMATS)
    if format == _MIXED:
        raise reader.error(f"format is missing; with {_MIXED} each group must name its own")
    weights = reader.get("weights")
    if not isinstance(weights, Mapping):
        raise reader.error(f"weights is {weights!r}; it must be an object")
    targets = Targets(names(reader, "targets"))
    reader.finish()
    return targets, _scheme(weights, format, f"{where}: weights")


def _scheme(raw: Mapping[str, Any], format: str, where: str) -> Scheme:
    harmless = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    reader = opened(raw, _ARGS, harmless, where)
    if reader.get("dynamic"):
        raise reader.error("dynamic is true; weights are quantised once")
    kind = word(reader, "type", ("int", "float"))
    bits = reader.integer("num_bits")
    strategy = _strategy(reader)
    # `block_structure`, `group_size` and `actorder` are read where they count.
    scheme = _of_kind(reader, format, (kind, bits), strategy)
    reader.computed |= {"group_size", "symmetric"}
    reader.finish()
    return scheme


def _strategy(reader: ConfigReader) -> str:
    if reader.get("strategy") is not None:
        return word(reader, "strategy", _STRATEGIES)
    size = reader.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _of_kind(reader: ConfigReader, format: str, kind: tuple[str, int], strategy: str) -> Scheme:
    wanted = {
        "pack-quantized": [("int", 4), ("int", 8)],
        "int-quantized": [("int", 8), ("int", 4)],
        "float-quantized": [("float", 8)],
        "naive-quantized": [("int", 8), ("int", 4), ("float", 8)],
        "nvfp4-pack-quantized": [("float", 4)],
        "mxfp4-pack-quantized": [("float", 4)],
    }[format]
    if kind not in wanted:
        known = ", ".join(f"{bits} of type {name}" for name, bits in wanted)
        raise reader.error(
            f"num_bits is {kind[1]} of type {kind[0]}; for {format} supported are {known}"
        )
    if format == "nvfp4-pack-quantized":
        return NvFp4Scheme(("_packed", "_scale", "_global_scale"), divided=True)
    if format == "mxfp4-pack-quantized":
        return MxFp4Scheme(("_packed", "_scale"))
    if kind[0] == "float":
        return Fp8Scheme(_block(reader, strategy))
    return _integers(reader, format, kind[1], strategy)


def _block(reader: ConfigReader, strategy: str) -> tuple[int, int]:
    """Rows and columns that share a scale; 0 is all."""
    if strategy == "block":
        return block_size(reader, "block_structure")
    if strategy in ("group", "tensor_group"):
        return 1, reader.integer("group_size")
    return (1, 0) if strategy == "channel" else (0, 0)


def _integers(reader: ConfigReader, format: str, bits: int, strategy: str) -> Scheme:
    if strategy not in ("channel", "group"):
        raise reader.error(f"strategy is {strategy!r}; of integers supported are channel and group")
    group = reader.integer("group_size") if strategy == "group" else 0
    zeros = not reader.flag("symmetric")
    # `weight` and `static` change how codes were found, and not how they are stored.
    order = reader.get("actorder")
    known = (None, False, True, "weight", "static", "group", "dynamic")
    if order not in known:
        raise reader.error(f"actorder is {order!r}; supported are weight, static, group, dynamic")
    ordered = order in (True, "group", "dynamic")
    if format == "pack-quantized":
        return WordsScheme(bits, group, zeros, ordered)
    if ordered:
        raise reader.error(f"actorder is {order!r}; it is supported with pack-quantized alone")
    return BytesScheme(group, zeros)
