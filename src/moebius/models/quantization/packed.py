"""GPTQ and AWQ. Keys: GPTQModel's QuantizeConfig, AutoAWQ's AwqConfig."""

from collections.abc import Mapping, Sequence
from typing import Any

from moebius.files import package_table
from moebius.models.quantization.fields import group_size, names, opened, word
from moebius.models.quantization.fp8 import all_but
from moebius.models.quantization.matching import Like, Skipped, everything
from moebius.models.quantization.record import Quantization, Rule, Scheme
from moebius.models.quantization.schemes import AwqScheme, GptqScheme
from moebius.models.reading import ConfigReader

_WHERE = "config.json: quantization_config"
# How codes were found, how other programs compute with them, and who made the file.
_HARMLESS: Sequence[str] = package_table("models/keys.toml")["packing"]
_GPTQ_KEYS: dict[str, Any] = {
    "bits": None,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": None,
    "format": None,
    "pack_dtype": "int32",
    "is_marlin_format": False,
    "dynamic": None,
    "modules_to_not_convert": None,
}


def read_gptq(raw: Mapping[str, Any]) -> Quantization:
    """Method `gptq`."""
    reader = opened(raw, _GPTQ_KEYS, _HARMLESS, _WHERE)
    if reader.flag("is_marlin_format"):
        raise reader.error("is_marlin_format is true; supported are gptq and gptq_v2")
    word(reader, "pack_dtype", ("int32",))
    skipped = names(reader, "modules_to_not_convert")
    version = _version(reader)
    usual = _gptq_scheme(reader, version)
    rules = [Rule(Skipped(skipped), None), *_dynamic(reader, raw, version), Rule(everything, usual)]
    reader.finish()
    return Quantization("gptq", tuple(rules))


def _version(reader: ConfigReader) -> str:
    """How zero points are stored, by one of two names; version 1 without any."""
    given = [key for key in ("checkpoint_format", "format") if reader.get(key) is not None]
    if not given:
        return "gptq"
    return word(reader, given[0], ("gptq", "gptq_v2"))


def _gptq_scheme(reader: ConfigReader, version: str) -> Scheme:
    bits = reader.integer("bits")
    if bits not in (4, 8):
        raise reader.error(f"bits is {bits}; supported are 4 and 8")
    zeros = "minus one" if version == "gptq" else "plain"
    if reader.flag("sym"):
        zeros = "symmetric"
    return GptqScheme(bits, group_size(reader), zeros, reader.flag("desc_act"))


def _dynamic(reader: ConfigReader, raw: Mapping[str, Any], version: str) -> list[Rule]:
    """GPTQModel's overrides: `-:` and a pattern of modules that are not quantised, or a pattern,
    `+:` before it or not, and what is different for them."""
    value = reader.get("dynamic") or {}
    if not isinstance(value, Mapping):
        raise reader.error(f"dynamic is {value!r}; it must be an object")
    rules = []
    for pattern, changes in value.items():
        if pattern.startswith("-:"):
            rules.append(Rule(Like(pattern[2:]), None))
            continue
        if not isinstance(changes, Mapping):
            raise reader.error(f"dynamic: {pattern!r} is {changes!r}; it must be an object")
        both = opened({**raw, **changes}, _GPTQ_KEYS, _HARMLESS, f"{_WHERE}: dynamic: {pattern!r}")
        rules.append(Rule(Like(pattern.removeprefix("+:")), _gptq_scheme(both, version)))
        # What holds for all modules was read before.
        both.computed |= _GPTQ_KEYS.keys()
        both.finish()
    return rules


def read_awq(raw: Mapping[str, Any]) -> Quantization:
    """Method `awq`."""
    keys = {
        "bits": None,
        "w_bit": None,
        "group_size": None,
        "q_group_size": None,
        "version": "gemm",
        "format": None,
        "zero_point": True,
        "modules_to_not_convert": None,
        "desc_act": False,
    }
    # transformers writes GPTQ's keys too; `sym` says there what zero_point says here.
    reader = opened(raw, keys, (*_HARMLESS, "sym"), _WHERE)
    bits = reader.integer("w_bit" if reader.get("bits") is None else "bits")
    if bits != 4:
        raise reader.error(f"bits is {bits}; supported are 4")
    key = "q_group_size" if reader.get("group_size") is None else "group_size"
    word(reader, "format" if reader.get("format") is not None else "version", ("gemm",))
    # Zero points are stored, and subtracted, either way.
    reader.flag("zero_point", True)
    skipped = names(reader, "modules_to_not_convert")
    scheme = AwqScheme(group_size(reader, key))
    reader.finish()
    return all_but("awq", skipped, scheme)
