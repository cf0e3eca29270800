"""What an operator chooses about the front door."""

import re
from dataclasses import dataclass
from typing import Literal

from moebius.errors import require, require_seconds, require_word

UnknownFields = Literal["refuse", "warn"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What an operator chooses about the front door. Times are in seconds.

    served_model_names    names that clients may call the model by; the first is what responses
                          carry
    api_keys              any of these opens every route; none: the server is open
    metrics_api_key       opens /metrics and nothing else; where there is one, no other key opens
                          that
    vllm_metric_names     export the metrics under vLLM's names too
    keep_alive            silence in a stream after which a comment line is sent
    drain_timeout         how long in-flight work may take after SIGTERM
    request_timeout       a request's deadline, from its arrival; its own timeout may be shorter
    body_timeout          how long a client may take to send its body
    stream_buffer_bytes   output that may wait for a reader that lags, before the reader is cut off
    max_connections       connections at once: beyond, those that rest the longest are closed, and
                          then none is taken
    keep_alive_timeout    how long a connection may rest between two requests, in whole seconds
    cors_origins          web pages from these origins may call the server from a browser; `*`: from
                          any
    unknown_fields        of a request's body: refuse it, or ignore them and name them in its log
                          line, a warning
    """

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    metrics_api_key: str | None = None
    vllm_metric_names: bool = True
    keep_alive: float = 15.0
    drain_timeout: float = 30.0
    request_timeout: float = 3600.0
    body_timeout: float = 30.0
    stream_buffer_bytes: int = 128 * 1024
    max_connections: int = 2048
    keep_alive_timeout: int = 75
    cors_origins: tuple[str, ...] = ()
    unknown_fields: UnknownFields = "refuse"

    def __post_init__(self) -> None:
        named = bool(self.served_model_names) and all(self.served_model_names)
        require(named, "served_model_name is empty; give the model at least one name")
        for key in (
            self.api_keys
            if self.metrics_api_key is None
            else (*self.api_keys, self.metrics_api_key)
        ):
            good = key.isascii() and key.isprintable() and key != "" and " " not in key
            require(
                good, "an API key must be printable ASCII without spaces, at least one character"
            )
        require_word("unknown_fields", self.unknown_fields, UnknownFields)
        for name in ("keep_alive", "drain_timeout", "request_timeout", "body_timeout"):
            require_seconds(name, getattr(self, name))
        size = self.stream_buffer_bytes
        require(size >= 1024, f"stream_buffer_bytes is {size}; it must be at least 1024")
        most = self.max_connections
        require(most >= 1, f"max_connections is {most}; it must be at least 1")
        rest = self.keep_alive_timeout
        require(
            1 <= rest <= 86_400,
            f"keep_alive_timeout is {rest}; it must lie between 1 second and a day (86400)",
        )
        for origin in self.cors_origins:
            _check_origin(origin)


def _check_origin(origin: str) -> None:
    """ConfigError unless this is how a browser names an origin: a wrong one would match none, and
    nobody would hear."""
    if origin in ("*", "null"):
        return
    match = re.fullmatch(r"(\w[\w+.-]*)://[^\s/?#@*]+", origin)
    example = "write scheme://host[:port] as browsers do, such as https://chat.example.com"
    require(
        match is not None and origin.isascii(),
        f"cors_origin is {origin!r}; {example}, or '*' for any",
    )
    require(
        origin == origin.lower(), f"cors_origin is {origin!r}; browsers write it {origin.lower()!r}"
    )
    for scheme, port in (("http", ":80"), ("https", ":443")):
        usual = origin.startswith(f"{scheme}:") and origin.endswith(port)
        require(
            not usual, f"cors_origin is {origin!r}; browsers leave out a scheme's own port, {port}"
        )


def host_and_port(host: str, port: int) -> str:
    """An address as URLs write it: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
