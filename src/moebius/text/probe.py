"""What a chat template takes, found out by rendering small chats with it.

Templates differ in what they do with a message without content, with a tool call's arguments as an
object or as JSON text, and with content in parts. Each form is tried; the marks that it should
leave in the text tell which one is right.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moebius.errors import RequestError

Messages = list[dict[str, Any]]
Render = Callable[[Messages, float], str]
"""Messages and seconds to a text; RequestError where the template refuses."""

_SECONDS = 2.0
_KEY = "probekey"
_VALUE = "probevalue"
_TEXT = "probetext"
_BEFORE = "probebefore"
_BEHIND = "probebehind"
_OBJECT = {_KEY: _VALUE}
_JSON = f'{{"{_KEY}": "{_VALUE}"}}'
_CALL_ID = "probe0001"  # nine letters and digits, which Mistral's templates insist on
TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A tool.",
        "parameters": {
            "type": "object",
            "properties": {"field": {"type": "string", "description": "A field."}},
        },
    },
}
_USER = {"role": "user", "content": "Hello"}
_REPLY = {"role": "assistant", "content": "Hello"}
_RESULT = {"role": "tool", "name": "probe", "tool_call_id": _CALL_ID, "content": "done"}
NoContent = Literal["absent", "null", "empty"]
CONTENTS: Mapping[NoContent, Mapping[str, Any]] = {
    "absent": {},
    "null": {"content": None},
    "empty": {"content": ""},
}
# How well a tool call's arguments come out.
_REFUSED, _ABSENT, _MISSPELLED, _SHOWN = range(4)


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What one template takes.

    no_content        what a tool call without content says: nothing (`absent`), null, or ""
                      (`empty`)
    object_arguments  whether a tool call's arguments are to be an object, else JSON text
    any_arguments     whether text that is no JSON will do for arguments
    parts             the roles whose content must be a list of parts, not a string
    developer         whether it knows OpenAI's role `developer`
    late_system       whether it shows a system message in its place wherever that is; else it
                      refuses one that is not the first, leaves it out, or moves it
    """

    no_content: NoContent = "empty"
    object_arguments: bool = True
    any_arguments: bool = False
    parts: frozenset[str] = frozenset()
    developer: bool = False
    late_system: bool = True


def probe(render: Render, source: str) -> TemplateFacts:
    """The facts of the template with this source."""
    tried = _Trial(render)
    no_content: NoContent = "empty"
    if _takes(tried, "absent"):
        no_content = "absent"
    elif _takes(tried, "null"):
        no_content = "null"
    as_object = _arguments(tried, no_content, _OBJECT)
    as_text = _arguments(tried, no_content, _JSON)
    roles = ("system", "user", "assistant", "tool")
    parts = frozenset(role for role in roles if _wants_parts(tried, role))
    return TemplateFacts(
        no_content=no_content,
        object_arguments=as_object >= as_text,
        any_arguments=as_text == _SHOWN,
        parts=parts,
        developer="developer" in source and _shows_developer(tried),
        late_system=_shows_late_system(tried, parts),
    )


def _shows_developer(tried: "_Trial") -> bool:
    return _TEXT in tried([{"role": "developer", "content": _TEXT}, _USER])


def _shows_late_system(tried: "_Trial", parts: frozenset[str]) -> bool:
    """Behind a reply, and before the turn that comes next. So it is said of a template that takes
    no chat of two turns, too, of which this cannot be known."""

    def said(role: str, text: str) -> dict[str, Any]:
        content = [{"type": "text", "text": text}] if role in parts else text
        return {"role": role, "content": content}

    turns = [said("user", "Hello"), said("assistant", _BEFORE), said("user", _BEHIND)]
    if _BEHIND not in tried(turns):
        return True
    text = tried([*turns[:2], said("system", _TEXT), turns[2]])
    places = [text.find(each) for each in (_BEFORE, _TEXT, _BEHIND)]
    return -1 < places[0] < places[1] < places[2]


class _Trial:
    """Renders chats, all of them within a time; "" for a refused one, or when the time is over."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._deadline = time.monotonic() + _SECONDS

    def __call__(self, *chats: Messages) -> str:
        """The text of the first chat that the template takes."""
        for messages in chats:
            left = self._deadline - time.monotonic()
            if left <= 0:
                break
            try:
                return self._render(messages, left)
            except RequestError:
                continue
        return ""


def _called(no_content: NoContent, arguments: Any) -> list[Messages]:
    """Chats with a tool call: the last turn, an earlier one, and one without the role `tool`."""
    call = {
        "id": _CALL_ID,
        "type": "function",
        "function": {"name": "probe", "arguments": arguments},
    }
    message = {"role": "assistant", **CONTENTS[no_content], "tool_calls": [call]}
    return [
        [_USER, message, _RESULT],
        [_USER, message, _RESULT, _REPLY, _USER],
        [_USER, message, _USER],
    ]


def _takes(tried: _Trial, no_content: NoContent) -> bool:
    """Whether a call without content may say so in this way.

    It may wherever "" will do, and it is not printed.
    """
    fits: list[bool] = []
    chats = zip(
        _called(no_content, _OBJECT),
        _called(no_content, _JSON),
        _called("empty", _OBJECT),
        _called("empty", _JSON),
        strict=True,
    )
    for as_object, as_text, empty_as_object, empty_as_text in chats:
        found = tried(as_object, as_text)
        empty = tried(empty_as_object, empty_as_text)
        if found or empty:
            printed = any(found.count(word) > empty.count(word) for word in ("None", "null"))
            fits.append(bool(found) and not (empty and printed))
    return bool(fits) and all(fits)


def _arguments(tried: _Trial, no_content: NoContent, given: object) -> int:
    text = tried(*_called(no_content, given))
    if not text:
        return _REFUSED
    if _KEY not in text or _VALUE not in text:
        return _ABSENT
    # Python's spelling, or JSON within JSON.
    misspelled = f"'{_KEY}'" in text or f'\\"{_KEY}' in text
    return _MISSPELLED if misspelled else _SHOWN


def _wants_parts(tried: _Trial, role: str) -> bool:
    """Whether this role's content is refused or lost as a string, and not as a part."""

    def shows(content: Any) -> bool:
        if role == "tool":
            result = {**_RESULT, "content": content}
            calls = [_called("empty", given)[0] for given in (_OBJECT, _JSON)]
            return _TEXT in tried(*([*chat[:-1], result] for chat in calls))
        message = {"role": role, "content": content}
        others = {
            "system": [[message, _USER]],
            "user": [[message]],
            "assistant": [[_USER, message, _USER]],
        }
        return _TEXT in tried(*others[role])

    return not shows(_TEXT) and shows([{"type": "text", "text": _TEXT}])
