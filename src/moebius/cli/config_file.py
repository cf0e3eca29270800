"""`moebius serve --config FILE`: the command line's options in a TOML file, and bounds that have no
option."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from moebius.errors import ConfigError
from moebius.server.settings import ServerSettings

BOUNDS = "bounds"
"""The file's one table: what hardly anybody sets."""
_BOUNDS = (
    "request_timeout",
    "drain_timeout",
    "body_timeout",
    "keep_alive",
    "keep_alive_timeout",
    "max_connections",
    "stream_buffer_bytes",
)
_ITSELF = "config_file"


def read(path: Path) -> dict[str, Any]:
    """What a file says, by names with underscores. ConfigError where it is no TOML."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config file {path} is no TOML: {error}") from error
    said: dict[str, Any] = {}
    for name, value in found.items():
        plain = name.replace("-", "_")
        if plain in said:
            raise ConfigError(f"config file {path} says {plain!r} twice, with '-' and with '_'")
        said[plain] = value
    return said


def set_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Let a file's options stand for those that the command line does not give, nor the
    environment.

    It is the callback of --config. ConfigError names what the command does not know, or a value
    that cannot be one.
    """
    if path is None:
        return None
    known = {option.name: option for option in context.command.params if option.name != "help"}
    del known[_ITSELF]
    defaults: dict[str, Any] = {}
    for name, value in read(path).items():
        if name == BOUNDS:
            continue  # `bounds` reads it
        if name not in known:
            raise ConfigError(
                f"config file {path} has no option {name!r}; it may have "
                f"{', '.join(sorted(map(str, known)))} and a table [{BOUNDS}]"
            )
        where = f"config file {path}: {name}"
        defaults[name] = _given(where, known[name], value)
        try:
            known[name].process_value(context, defaults[name])
        except typer.BadParameter as error:
            raise ConfigError(f"{where} is {value!r}: {error.message}") from None
    context.default_map = defaults
    return path


def _given(where: str, option: Any, value: Any) -> Any:
    """A value as the command line would have it: a text, a list of texts, or a truth value.

    So that the option's own check reads it, and no number is rounded in silence.
    """
    if getattr(option, "is_flag", False):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}; it must be true or false")
        return value
    if option.multiple:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ConfigError(f"{where} is {value!r}; it must be a list of texts")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{where} is {value!r}; it must be a text or a number")
    return str(value)


def bounds(path: Path | None) -> dict[str, Any]:
    """The bounds of a file, as fields of ServerSettings, which checks their values. ConfigError
    names one that there is not, or whose kind is wrong."""
    table = {} if path is None else read(path).get(BOUNDS, {})
    where = f"config file {path}: [{BOUNDS}]"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table")
    found: dict[str, Any] = {}
    for name, value in table.items():
        plain = name.replace("-", "_")
        if plain not in _BOUNDS:
            raise ConfigError(f"{where} has no {name!r}; it may have {', '.join(_BOUNDS)}")
        whole = ServerSettings.__dataclass_fields__[plain].type is int
        kinds = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            what = "an integer" if whole else "a number"
            raise ConfigError(f"{where} {name} is {value!r}; it must be {what}")
        found[plain] = value
    return found
