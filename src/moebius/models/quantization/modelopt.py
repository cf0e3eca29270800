"""NVIDIA modelopt's NVFP4 and FP8, in config.json or in a hf_quant_config.json beside it."""

from collections.abc import Mapping
from typing import Any

from moebius.models.quantization.fields import names, opened
from moebius.models.quantization.fp8 import ACTIVATIONS
from moebius.models.quantization.matching import Wildcards, everything
from moebius.models.quantization.record import Quantization, Rule, Scheme
from moebius.models.quantization.schemes import Fp8Scheme, NvFp4Scheme

_SCHEMES: dict[str, Scheme] = {
    "NVFP4": NvFp4Scheme(("", "_scale", "_scale_2"), divided=False),
    "FP8": Fp8Scheme((0, 0)),
}


def read(raw: Mapping[str, Any]) -> Quantization:
    """Method `modelopt`; what is in hf_quant_config.json's `quantization` stands by itself in
    config.json."""
    inner = raw.get("quantization")
    where = (
        "config.json: quantization_config"
        if inner is None
        else "hf_quant_config.json: quantization"
    )
    keys = {"quant_algo": None, "exclude_modules": None, "ignore": None, "group_size": None}
    # Caches have the dtype that is asked for; groups of modules say the same in other words.
    harmless = ("kv_cache_quant_algo", "kv_cache_scheme", "producer", "config_groups")
    reader = opened(raw if inner is None else inner, keys, harmless, where)
    algorithm = reader.get("quant_algo")
    if algorithm not in _SCHEMES:
        raise reader.error(f"quant_algo is {algorithm!r}; supported are {', '.join(_SCHEMES)}")
    if reader.get("group_size") not in (None, 16):
        raise reader.error(f"group_size is {reader.get('group_size')}; NVFP4's is 16")
    skipped = names(reader, "exclude_modules") + names(reader, "ignore")
    reader.finish()
    rules = (Rule(Wildcards(skipped), None), Rule(everything, _SCHEMES[algorithm]))
    return Quantization("modelopt", rules, ACTIVATIONS)
