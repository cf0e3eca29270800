"""Input items of the Responses API as the messages of a chat.

See https://platform.openai.com/docs/api-reference/responses. Items that stand together and are one
turn of the model's (its reasoning, what it says, its calls) become one message.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moebius.errors import RequestError
from moebius.server.responses_tools import INPUT, flat_name

Json = dict[str, Any]

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_CALLS = ("function_call", "custom_tool_call")
_RESULTS = ("function_call_output", "custom_tool_call_output")
# What OpenAI's own tools left in a history, and says nothing without them.
_DROPPED = ("web_search_call",)


def _wrong(at: str, message: str) -> RequestError:
    return RequestError(f"{at}: {message}", param=at)


def sealed(reasoning: str) -> str:
    """Reasoning for a client that sends back nothing but `encrypted_content`; it is no secret."""
    return base64.b64encode(reasoning.encode()).decode("ascii")


def _unsealed(given: object) -> str:
    """The same, back; nothing where another server has sealed it."""
    if not isinstance(given, str):
        return ""
    try:
        return base64.b64decode(given, validate=True).decode()
    except (binascii.Error, ValueError):
        return ""


def chat_messages(instructions: str | None, given: str | Sequence[object]) -> list[Json]:
    """The conversation. RequestError names the item that is wrong."""
    messages: list[Json] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    turn = _Turn()
    for i, item in enumerate(given):
        at = f"input[{i}]"
        if not isinstance(item, Mapping):
            raise _wrong(at, "an item must be an object")
        if turn.takes(item, at):
            continue
        messages += [*turn.messages(), *_message(item, at)]
        turn = _Turn()
    return [*messages, *turn.messages()]


class _Turn:
    """One turn of the model's, item by item."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._thought: list[str] = []
        self._calls: list[Json] = []

    def takes(self, item: Mapping[str, Any], at: str) -> bool:
        """Whether the item belongs to the turn."""
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") == "assistant":
            self._said += _texts(item.get("content"), f"{at}.content")
        elif kind == "reasoning":
            self._thought.append(_reasoning(item, at))
        elif kind in _CALLS:
            self._calls.append(_call(item, at))
        else:
            return False
        return True

    def messages(self) -> Iterator[Json]:
        """Its message, if there is anything in it but thought."""
        message: Json = {"role": "assistant", "content": "".join(self._said)}
        if self._calls:
            message |= {"content": message["content"] or None, "tool_calls": self._calls}
        if any(self._thought):
            message["reasoning_content"] = "".join(self._thought)
        if self._calls or self._said:
            yield message


def _message(item: Mapping[str, Any], at: str) -> Iterator[Json]:
    kind = item.get("type", "message")
    role = item.get("role")
    if kind == "message" and role in ("user", "system", "developer"):
        parts = _texts(item.get("content"), f"{at}.content")
        yield {"role": role, "content": [{"type": "text", "text": part} for part in parts]}
    elif kind == "message":
        wanted = "it must be user, assistant, system or developer"
        raise _wrong(f"{at}.role", f"role is {str(role)[:100]!r}; {wanted}")
    elif kind in _RESULTS:
        content = "\n".join(_texts(item.get("output"), f"{at}.output"))
        yield {"role": "tool", "tool_call_id": _id(item, at), "content": content}
    elif kind not in _DROPPED:
        raise _wrong(f"{at}.type", f"items of type {str(kind)[:100]!r} are not supported here")


def _texts(content: object, at: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise _wrong(at, "it must be a string or a list of parts")
    return [_part(part, f"{at}[{i}]") for i, part in enumerate(content)]


def _part(part: object, at: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = None
    if isinstance(part, Mapping) and kind in (*_TEXTS, "refusal"):
        text = part.get("refusal" if kind == "refusal" else "text")
    elif kind is not None:
        raise _wrong(at, f"a part of type {str(kind)[:100]!r} is not supported; only text is")
    if not isinstance(text, str):
        raise _wrong(at, "a part needs its type and its text, a string")
    return text


def _reasoning(item: Mapping[str, Any], at: str) -> str:
    """Its text; of what was sealed by another server there is none."""
    content = item.get("content")
    if content:
        return "".join(_texts(content, f"{at}.content"))
    return _unsealed(item.get("encrypted_content"))


def _call(item: Mapping[str, Any], at: str) -> Json:
    name = item.get("name")
    custom = item.get("type") == "custom_tool_call"
    field = INPUT if custom else "arguments"
    given = item.get(field, "")
    if not isinstance(name, str) or not name:
        raise _wrong(f"{at}.name", "a call must name its tool")
    if not isinstance(given, str):
        raise _wrong(f"{at}.{field}", "it must be a string")
    arguments: object = {INPUT: given} if custom else given
    function = {"name": flat_name(name, item.get("namespace")), "arguments": arguments}
    return {"id": _id(item, at), "type": "function", "function": function}


def _id(item: Mapping[str, Any], at: str) -> str:
    found = item.get("call_id")
    if not isinstance(found, str):
        raise _wrong(f"{at}.call_id", "it must be a string")
    return found
