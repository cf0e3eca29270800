"""FP8 in blocks, a row or a matrix at a time, and gpt-oss's MXFP4.

Keys: transformers' FineGrainedFP8Config, FbgemmFp8Config and Mxfp4Config.
"""

from collections.abc import Mapping
from typing import Any

from moebius.models.quantization.fields import block_size, names, opened, word
from moebius.models.quantization.matching import Skipped, everything
from moebius.models.quantization.record import Quantization, Rule, Scheme
from moebius.models.quantization.schemes import Fp8Scheme, MxFp4Scheme

_WHERE = "config.json: quantization_config"
# Scales of activations, which are computed in the model's own dtype here.
ACTIVATIONS = frozenset(
    {"input_scale", "output_scale", "activation_scale", "q_scale", "k_scale", "v_scale"}
)


def read(raw: Mapping[str, Any]) -> Quantization:
    """Method `fp8`."""
    keys = {
        "fmt": "e4m3",
        "weight_block_size": None,
        "activation_scheme": "dynamic",
        "modules_to_not_convert": None,
        "ignored_layers": None,
        "scale_fmt": None,
        "expert_dtype": "fp8",
    }
    # Modules beside the usual ones that are quantised: the tensors tell.
    harmless = ("dequantize", "modules_to_convert", "kv_cache_scheme", "kv_cache_quant_algo")
    reader = opened(raw, keys, harmless, _WHERE)
    word(reader, "fmt", ("e4m3", "float8_e4m3fn"))
    word(reader, "activation_scheme", ("dynamic", "static"))
    word(reader, "expert_dtype", ("fp8",))
    if reader.get("scale_fmt") is not None:
        word(reader, "scale_fmt", ("ue8m0", "float"))
    skipped = names(reader, "modules_to_not_convert") + names(reader, "ignored_layers")
    block = None
    if reader.get("weight_block_size") is not None:
        block = block_size(reader, "weight_block_size")
    reader.finish()
    return all_but("fp8", skipped, Fp8Scheme(block))


def read_fbgemm(raw: Mapping[str, Any]) -> Quantization:
    """Method `fbgemm_fp8`: a scale a row."""
    reader = opened(raw, {"modules_to_not_convert": None}, ("activation_scale_ub",), _WHERE)
    skipped = names(reader, "modules_to_not_convert")
    reader.finish()
    return all_but("fbgemm_fp8", skipped, Fp8Scheme((1, 0)))


def read_mxfp4(raw: Mapping[str, Any]) -> Quantization:
    """Method `mxfp4`."""
    reader = opened(raw, {"modules_to_not_convert": None}, ("dequantize",), _WHERE)
    skipped = names(reader, "modules_to_not_convert")
    reader.finish()
    return all_but("mxfp4", skipped, MxFp4Scheme())


def all_but(method: str, skipped: tuple[str, ...], scheme: Scheme) -> Quantization:
    """One scheme for all modules but those."""
    rules = (Rule(Skipped(skipped), None), Rule(everything, scheme))
    return Quantization(method, rules, ACTIVATIONS)
