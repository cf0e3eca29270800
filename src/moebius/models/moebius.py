"""What this project trains and no published architecture expresses: every layer's feed-forward as our own records."""

from __future__ import annotations

from typing import Any

from moebius.config import FeedForwardConfig, ModelConfig, RouterConfig
from moebius.errors import ConfigError
from moebius.models.layout import Layout
from moebius.models.reading import ConfigReader, decoder_fields

LAYOUTS = (Layout(),)


def config(reader: ConfigReader) -> ModelConfig:
    fields = decoder_fields(reader, theta=10_000.0, eps=1e-6)
    try:
        parts = tuple(_part(part) for part in reader.get("feed_forward"))
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"config.json: feed_forward: {error}") from None
    return ModelConfig(
        **fields,
        feed_forward=parts,
        windows=(None,) * fields["num_layers"],
        qk_norm=reader.get("qk_norm", "none"),
        qkv_bias=reader.flag("qkv_bias", False),
        unpublished=reader.get("unpublished", "what its config.json describes"),
    )


def _part(part: dict[str, Any]) -> FeedForwardConfig:
    router = part.get("router")
    return FeedForwardConfig(**{**part, "router": None if router is None else RouterConfig(**router)})
