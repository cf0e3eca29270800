"""Which method a model directory is quantised by, and the reader of what it says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moebius.errors import ConfigError
from moebius.files import read_json
from moebius.models.quantization import compressed_tensors, fp8, mlx, modelopt, packed
from moebius.models.quantization.record import Quantization

_READERS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    "awq": packed.read_awq,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": fp8.read_fbgemm,
    "fp8": fp8.read,
    "gptq": packed.read_gptq,
    "mlx": mlx.read,
    "modelopt": modelopt.read,
    "modelopt_fp4": modelopt.read,
    "mxfp4": fp8.read_mxfp4,
}
KEYS = frozenset({"quantization_config", "compression_config", "quantization"})
"""Keys of config.json that say how a checkpoint is quantised."""
BESIDE = "hf_quant_config.json"
"""A file that may say it instead, as modelopt writes it."""


def read_quantization(config_json: Mapping[str, Any]) -> Quantization | None:
    """How a config.json says that matrices are quantised; None for plain numbers.

    Raises ConfigError naming a method that is not supported, or a key that counts and is not.
    """
    stated = _stated(config_json)
    if stated is None:
        return None
    method, raw = stated
    if not isinstance(method, str) or method not in _READERS:
        raise _unsupported(method)
    return _READERS[method](raw)


def _unsupported(method: object) -> ConfigError:
    return ConfigError(
        f"config.json: quantization_config of method {method!r} is not supported; supported are "
        f"{', '.join(_READERS)}, and checkpoints in bfloat16, float16 or float32"
    )


def quantization_beside(directory: Path) -> Quantization | None:
    """What a file beside config.json says instead. Raises ConfigError."""
    file = directory / BESIDE
    return modelopt.read(read_json(file)) if file.exists() else None


def _stated(config_json: Mapping[str, Any]) -> tuple[object, Mapping[str, Any]] | None:
    """The method, and the object that says the rest."""
    raw = config_json.get("quantization_config") or config_json.get("compression_config") or {}
    of_mlx = config_json.get("quantization") or {}
    for each in (raw, of_mlx):
        if not isinstance(each, Mapping):
            raise _unsupported(each)
    if not raw and not of_mlx:
        return None
    # mlx-lm writes the same under two names.
    if of_mlx and "quant_method" not in raw:
        return "mlx", of_mlx
    method = raw.get("quant_method")
    if method is None and "config_groups" in raw:
        method = "compressed-tensors"
    return method, raw
