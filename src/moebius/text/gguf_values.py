"""The values of a GGUF file's keys, each of the type that it must have.

Where there is no such key the answer is None; a value of another type raises TokenizerError, which
names the key.
"""

from collections.abc import Mapping
from typing import Any

from moebius.errors import TokenizerError

PREFIX = "tokenizer.ggml."
"""What stands before a name."""


def string(metadata: Mapping[str, object], key: str) -> str | None:
    """The string of a key, by its whole name."""
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{key} is {shown(value)}; it must be a string")
    return value


def flag(metadata: Mapping[str, object], name: str) -> bool | None:
    """The truth value of a key."""
    value = metadata.get(f"{PREFIX}{name}")
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f"{PREFIX}{name} is {shown(value)}; it must be true or false")
    return value


def strings(metadata: Mapping[str, object], name: str) -> list[str] | None:
    """The strings of a key."""
    values = metadata.get(f"{PREFIX}{name}")
    if values is None:
        return None
    if not isinstance(values, list) or not set(map(type, values)) <= {str}:
        raise TokenizerError(f"{PREFIX}{name} must be an array of strings")
    return values


def octets(metadata: Mapping[str, object], name: str) -> bytes:
    """The bytes of a key, with a sign or without; none where there is no such key."""
    values = metadata.get(f"{PREFIX}{name}")
    if values is None:
        return b""
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise TokenizerError(f"{PREFIX}{name} must be an array of bytes")
    if values and not -128 <= min(values) <= max(values) <= 255:
        raise TokenizerError(f"{PREFIX}{name} must be an array of bytes")
    return bytes(value & 0xFF for value in values)


def numbers(
    metadata: Mapping[str, object], name: str, kinds: set[type], count: int
) -> list[Any] | None:
    """A number of these types for each of `count` tokens."""
    values = metadata.get(f"{PREFIX}{name}")
    if values is None:
        return None
    if not isinstance(values, list) or not set(map(type, values)) <= kinds:
        raise TokenizerError(f"{PREFIX}{name} must be an array of numbers")
    if len(values) != count:
        raise TokenizerError(
            f"{PREFIX}{name} has {len(values)} entries for the {count} of {PREFIX}tokens"
        )
    return values


def shown(value: object) -> str:
    """A value as an error has it: never long."""
    whole = repr(value)
    return whole if len(whole) <= 40 else f"{whole[:40]}..."
