"""What a body's fields may hold, before any of them is taken for what it should be.

Every field of a body is one of four: ours (in a model of protocol.py), harmless (accepted and
without effect), known but not supported (accepted only at its neutral value), or unknown.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BeforeValidator

from moebius.errors import RequestError
from moebius.files import package_table
from moebius.request.params import LIMITS
from moebius.server.limits import HTTP_LIMITS

_TABLE = package_table("server/fields.toml")
HARMLESS = frozenset(_TABLE["harmless"])
UNSUPPORTED: Mapping[str, list[Any]] = _TABLE["unsupported"]
_INSTEAD: Mapping[str, str] = _TABLE["instead"]
_MESSAGE_TEXTS = _TABLE["message"]["texts"]
_MESSAGE_UNSUPPORTED = _TABLE["message"]["unsupported"]
_MESSAGE_FIELDS = frozenset([*_MESSAGE_TEXTS, *_TABLE["message"]["others"]])

Prompts = list[str] | list[list[int]]


def refuse_unsupported(
    fields: Mapping[str, Any], unsupported: Mapping[str, list[Any]], at: str = ""
) -> None:
    """Raise on a field that is not supported, and not neutral; `at` goes before its name."""
    for name in fields.keys() & unsupported.keys():
        value = fields[name]
        if not any(type(value) is type(no) and value == no for no in unsupported[name]):
            instead = _INSTEAD.get(name, "leave it out")
            raise RequestError(
                f"{at}{name}: this field is not supported here; {instead}", param=at + name
            )


def without_nulls(value: Any) -> Any:
    """An object without the fields that are null: they count as not given."""
    if not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if item is not None}


def without_idle_functions(given: dict[str, Any]) -> dict[str, Any]:
    """Functions, as tools were once called, ask for nothing where the model is not to call any."""
    if "functions" not in given or given.get("function_call") != "none":
        return given
    found = given["functions"]
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RequestError("functions must be a list of objects", param="functions")
    _check_count("functions", "has", len(found), "entries", LIMITS.tools)
    return {name: value for name, value in given.items() if name != "functions"}


def _check_count(name: str, verb: str, count: int, what: str, most: int) -> None:
    if count > most:
        raise RequestError(f"{name} {verb} {count} {what}; at most {most}", param=name)


def at_most(name: str) -> BeforeValidator:
    """Counts a collection before each of its values is looked at."""
    most: int = getattr(LIMITS, name)

    def check(value: Any) -> Any:
        if isinstance(value, (list, dict)):
            _check_count(name, "has", len(value), "entries", most)
        return value

    return BeforeValidator(check)


def as_list(value: Any) -> Any:
    """One stop string as a list of one."""
    return [value] if isinstance(value, str) else value


def counted_documents(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Documents for a chat template, each an object of its own making."""
    _check_count("documents", "holds", len(value), "entries", HTTP_LIMITS.documents)
    return value


def bias_by_id(value: dict[str, float]) -> dict[int, float]:
    """JSON's names are strings: here they are token ids."""
    for key in value:
        if re.fullmatch("[0-9]{1,10}", key) is None:
            raise RequestError(f"logit_bias: the key {key!r} is not a token id", param="logit_bias")
    return {int(key): bias for key, bias in value.items()}


def as_prompts(value: Any) -> Prompts:
    """A string, a list of strings, a list of token ids, or a list of such lists, as a list of
    prompts."""
    one = isinstance(value, str) or (bool(value) and _are_ids(value))
    items = [value] if one else value
    if not items or not isinstance(items, list) or not (_are_texts(items) or _are_id_lists(items)):
        raise RequestError(
            "prompt must be a string, a list of strings, a list of token ids, or a list of lists "
            "of token ids, not empty",
            param="prompt",
        )
    _check_count("prompt", "holds", len(items), "prompts", HTTP_LIMITS.prompts)
    return items


def _are_texts(items: list[object]) -> bool:
    return all(isinstance(item, str) for item in items)


def _are_id_lists(items: list[object]) -> bool:
    return all(map(_are_ids, items))


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def as_messages(value: Any) -> list[dict[str, Any]]:
    """A chat: of each message what means something here."""
    good = isinstance(value, list) and bool(value)
    if not good or not all(isinstance(message, dict) for message in value):
        raise RequestError(
            "messages must be a list of objects with `role` and `content`, not empty",
            param="messages",
        )
    _check_count("messages", "holds", len(value), "entries", HTTP_LIMITS.messages)
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Clients add keys of their own, and send back what they were sent."""
    given = without_nulls(message)
    refuse_unsupported(given, _MESSAGE_UNSUPPORTED, f"{at}.")
    for name in _MESSAGE_TEXTS:
        if not isinstance(given.get(name, ""), str):
            raise RequestError(f"{at}.{name} must be a string", param=f"{at}.{name}")
    return {name: value for name, value in message.items() if name in _MESSAGE_FIELDS}
