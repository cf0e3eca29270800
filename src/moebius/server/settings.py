"""What an operator chooses about the front door."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moebius.errors import ConfigError, require_seconds, require_word

UnknownFields = Literal["refuse", "warn"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What an operator chooses about the front door. Times are in seconds.

    served_model_names    names that clients may call the model by; the first is what responses
                          carry
    api_keys              any of these opens every route
    api_keys_file         more keys, each with what it may do (server/keys.py); neither: the server
                          is open
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
    api_keys_file: Path | None = None
    keep_alive: float = 15.0
    drain_timeout: float = 30.0
    request_timeout: float = 3600.0
    body_timeout: float = 30.0
    stream_buffer_bytes: int = 128 * 1024
    max_connections: int = 2048
    keep_alive_timeout: int = 75
    cors_origins: tuple[str, ...] = ()
    unknown_fields: UnknownFields = "refuse"

    @property
    def needs_key(self) -> bool:
        return bool(self.api_keys) or self.api_keys_file is not None

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("served_model_name is empty; give the model at least one name")
        for key in self.api_keys:
            check_key(key)
        require_word("unknown_fields", self.unknown_fields, UnknownFields)
        for name in ("keep_alive", "drain_timeout", "request_timeout", "body_timeout"):
            require_seconds(name, getattr(self, name))
        if self.stream_buffer_bytes < 1024:
            raise ConfigError(
                f"stream_buffer_bytes is {self.stream_buffer_bytes}; it must be at least 1024"
            )
        if self.max_connections < 1:
            raise ConfigError(f"max_connections is {self.max_connections}; it must be at least 1")
        if not 1 <= self.keep_alive_timeout <= 86_400:
            raise ConfigError(
                f"keep_alive_timeout is {self.keep_alive_timeout}; it must lie between 1 second "
                "and a day (86400)"
            )
        for origin in self.cors_origins:
            _check_origin(origin)


def check_key(key: str) -> None:
    """ConfigError, which does not quote it, unless this can be sent as a key."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            "an API key must be printable ASCII without spaces, at least one character"
        )


def _check_origin(origin: str) -> None:
    """ConfigError unless this is how a browser names an origin.

    A wrong one would match none, and nobody would hear.
    """
    if origin in ("*", "null"):
        return
    if not origin.isascii() or re.fullmatch(r"(\w[\w+.-]*)://[^\s/?#@*]+", origin) is None:
        raise ConfigError(
            f"cors_origin is {origin!r}; write scheme://host[:port] as browsers do, such as "
            "https://chat.example.com, or '*' for any"
        )
    if origin != origin.lower():
        raise ConfigError(f"cors_origin is {origin!r}; browsers write it {origin.lower()!r}")
    for scheme, port in (("http", ":80"), ("https", ":443")):
        if origin.startswith(f"{scheme}:") and origin.endswith(port):
            raise ConfigError(
                f"cors_origin is {origin!r}; browsers leave out a scheme's own port, {port}"
            )


def host_and_port(host: str, port: int) -> str:
    """An address as URLs write it: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
