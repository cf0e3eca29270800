"""What this project trains and no published architecture expresses: each feed-forward as our own
record."""

from typing import Any

from moebius.errors import ConfigError
from moebius.models.config import ModelConfig
from moebius.models.family import Family
from moebius.models.parts import attention, decoder, layers
from moebius.models.reading import ConfigReader, Keys
from moebius.moe.config import FeedForwardConfig
from moebius.ops.config import RouterConfig


def _part(given: dict[str, Any]) -> FeedForwardConfig:
    router = given["router"] and RouterConfig(**given["router"])
    return FeedForwardConfig(**given | {"router": router})


def read(reader: ConfigReader) -> ModelConfig:
    try:
        parts = [_part(given) for given in reader.get("feed_forward")]
    except (TypeError, KeyError) as error:
        raise ConfigError(f"config.json: feed_forward: {error}") from None
    if len(parts) != reader.num_layers:
        raise ConfigError("config.json: feed_forward needs one entry a layer")
    mixer = attention(reader, qk_norm=reader.get("qk_norm"), qkv_bias=reader.flag("qkv_bias"))
    return decoder(reader, layers(reader, mixer, parts), unpublished=reader.get("unpublished"))


KEYS = Keys(
    {"qk_norm": "none", "unpublished": "its layers", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    closed=True,
)
FAMILY = Family(read, keys=KEYS)
