"""What an operator chooses about the front door."""

from __future__ import annotations

from dataclasses import dataclass

from moebius.config import require_seconds
from moebius.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Times are in seconds.

    served_model_names    names that clients may call the model by; the first is what responses carry
    api_keys              any of these opens every route; none: the server is open
    vllm_metric_names     export the metrics under vLLM's names too
    keep_alive            silence in a stream after which a comment line is sent
    drain_timeout         how long in-flight work may take after SIGTERM
    request_timeout       a request's deadline, from its arrival
    body_timeout          how long a client may take to send its body
    stream_buffer_bytes   output that may wait for a reader that lags, before the reader is cut off
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    vllm_metric_names: bool = True
    keep_alive: float = 15.0
    drain_timeout: float = 30.0
    request_timeout: float = 3600.0
    body_timeout: float = 30.0
    stream_buffer_bytes: int = 128 * 1024

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("served_model_name is empty; give the model at least one name")
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("an API key must be printable ASCII without spaces, at least one character")
        for name in ("keep_alive", "drain_timeout", "request_timeout", "body_timeout"):
            require_seconds(name, getattr(self, name))
        if self.stream_buffer_bytes < 1024:
            raise ConfigError(f"stream_buffer_bytes is {self.stream_buffer_bytes}; it must be at least 1024")
