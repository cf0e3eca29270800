"""What a model is computed in, and what its keys and values are held in."""

import torch

from moebius.errors import ConfigError
from moebius.ops.formats import dtype_name


def choose_dtype(wish: str, stored: str, device: str) -> torch.dtype:
    """What is computed in; auto is the checkpoint's own.

    A CPU has no fast float16: there float32 takes its place, which holds every float16 exactly, so
    that the weights can stay as they are.
    """
    if wish == "auto":
        wish = "float32" if stored == "float16" and device == "cpu" else stored
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[wish]


def choose_kv_dtype(wish: str, computed: torch.dtype) -> torch.dtype:
    """What keys and values are held in; auto is what is computed in. Raises ConfigError for another
    than that and int8."""
    if wish == "int8":
        return torch.int8
    name = dtype_name(computed)
    if wish not in ("auto", name):
        raise ConfigError(
            f"kv_cache_dtype is {wish}, but {name} is computed in; use auto, {name} or int8"
        )
    return computed
