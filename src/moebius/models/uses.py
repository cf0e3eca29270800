"""Which operations a model asks of its backend, told from its configuration."""

import torch

from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.ops import Operation, Ops, Use

_ALWAYS = (
    Operation.EMBED,
    Operation.LOGITS,
    Operation.RMS_NORM,
    Operation.ADD_RMS_NORM,
    Operation.SAMPLING,
)


def uses(
    config: ModelConfig, dtype: torch.dtype, kv_dtype: torch.dtype | None = None
) -> frozenset[Use]:
    """What serving a model of this configuration computes, in `dtype`.

    kv_dtype: what keys and values are held in; None: as they are computed.
    """
    found = {Use(operation, dtype) for operation in _ALWAYS}
    for mixer in config.mixers:
        found.update(mixer.uses(dtype, kv_dtype))
    for part in config.feed_forward:
        found.update(part.uses(dtype))
        if part.router is not None and part.router.capacity is not None:
            found.add(Use(Operation.WITHIN_CAPACITY, torch.float32))
    if any(layer.norms == "post" for layer in config.layers):
        found.add(Use(Operation.ADD_GATED, dtype))
    if config.logits_divisor != 1.0:
        found.add(Use(Operation.DIVIDE, torch.float32))
    if config.logits_softcap is not None:
        found.add(Use(Operation.SOFTCAP, torch.float32))
    return frozenset(found)


def check_served(
    config: ModelConfig, dtype: torch.dtype, ops: Ops, kv_dtype: torch.dtype | None = None
) -> None:
    """ConfigError for a model that asks for what this backend does not compute."""
    lacking = [use for use in uses(config, dtype, kv_dtype) if ops.capability(use) is None]
    if lacking:
        raise ConfigError(
            f"the {ops.name} operations lack what this {config.model_type} model asks for: "
            f"{', '.join(sorted(map(str, lacking)))}"
        )
