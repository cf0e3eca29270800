"""What an operator's choices mean for a model with an encoder."""

from dataclasses import replace

from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError
from moebius.models.config import LayerSpec, ModelConfig
from moebius.models.store import Checkpoint


def as_asked(checkpoint: Checkpoint, config: EngineConfig) -> Checkpoint:
    """The checkpoint, its experts without a capacity if that is wanted; then its fingerprint is
    another, as answers are. Raises ConfigError where they have none."""
    if config.switch_capacity == "published":
        return checkpoint
    model = checkpoint.config
    routers = [part.router for part in model.feed_forward if part.router is not None]
    if not any(router.capacity is not None for router in routers):
        raise ConfigError(
            f"switch_capacity (--switch-capacity) is {config.switch_capacity}, but the experts of "
            f"{model.model_type} models take all tokens anyway; leave it out"
        )
    model = replace(model, layers=tuple(map(_without_capacity, model.layers)))
    json = {**checkpoint.config_json, "expert_capacity": None}
    return replace(checkpoint, config=model, config_json=json)


def _without_capacity(layer: LayerSpec) -> LayerSpec:
    part = layer.feed_forward
    if part is None or part.router is None:
        return layer
    return replace(layer, feed_forward=replace(part, router=replace(part.router, capacity=None)))


def shares_prefixes(model: ModelConfig, config: EngineConfig) -> bool:
    """Whether requests share blocks of a common prefix. What an encoder makes of a prompt's first
    tokens depends on all of it: there is no prefix to share."""
    return config.enable_prefix_caching and not model.encoder_layers
