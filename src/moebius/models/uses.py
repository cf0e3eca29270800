"""Which operations a model asks of its backend, told from its configuration."""

import torch

from moebius.models.config import ModelConfig
from moebius.ops import Feature, Operation, Use

_ALWAYS = (
    Operation.EMBED,
    Operation.LINEAR,
    Operation.LOGITS,
    Operation.RMS_NORM,
    Operation.ADD_RMS_NORM,
    Operation.ROTATION,
    Operation.ROTATE_AND_STORE,
    Operation.EXPERTS,
    Operation.SAMPLING,
)


def uses(config: ModelConfig, dtype: torch.dtype) -> frozenset[Use]:
    """What serving a model of this configuration computes, in `dtype`."""
    found = {Use(operation, dtype) for operation in _ALWAYS}
    for window in set(config.windows):
        features = frozenset() if window is None else frozenset({Feature.WINDOW})
        found.add(Use(Operation.PAGED_ATTENTION, dtype, features))
    if config.attention.qk_norm == "full":
        found.add(Use(Operation.RMS_NORM_PART, dtype))
    for layer in config.feed_forward:
        features = frozenset() if layer.gated else frozenset({Feature.TWO_MATRICES})
        found.add(Use(Operation.EXPERTS, dtype, features))
        if layer.router is not None:
            found.add(Use(Operation.ROUTE, dtype))
        if layer.shared_width:
            found.add(Use(Operation.ADD_GATED, dtype))
    return frozenset(found)
