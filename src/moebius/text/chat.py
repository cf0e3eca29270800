"""Chat templates: which one a model has, what messages they are given, and what they render."""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from moebius.errors import RequestError, TokenizerError
from moebius.files import read_json, read_text
from moebius.text.probe import CONTENTS, TOOL, TemplateFacts, probe
from moebius.text.sandbox import MAX_CHARACTERS, MAX_SECONDS, TemplateEnvironment

log = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool")

# What a template can do wrong with messages that it was not written for.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


def _wrong(param: str, message: str) -> RequestError:
    return RequestError(f"{param}: {message}", param=param)


def _parts_of(content: object, param: str) -> list[str] | None:
    """The texts of a content; None where there is none."""
    if content is None:
        return None
    if isinstance(content, str):
        return [content]
    if not isinstance(content, (list, tuple)):
        raise _wrong(param, "content must be a string, null, or a list of text parts")
    return [_part(part, param) for part in content]


def _part(part: object, param: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise _wrong(param, 'a content part must be {"type": "text", "text": ...}')
    kind = part.get("type")
    # What an assistant said when it refused is what it said.
    if kind not in ("text", "refusal"):
        raise _wrong(param, f"content part {kind!r} is not supported; only text is")
    text = part.get(kind)
    if not isinstance(text, str):
        raise _wrong(param, f"a {kind} part needs a string under `{kind}`")
    return text


def _content(
    message: Mapping[str, Any], role: str, facts: TemplateFacts, param: str
) -> Mapping[str, Any]:
    """The field `content` as the template wants it, or no such field where it wants none.

    Several text parts are joined by a line break, as other engines do.
    """
    texts = _parts_of(message.get("content"), param)
    if texts is None:
        if role != "assistant":
            raise _wrong(param, "content is missing; only an assistant's message may do without")
        return CONTENTS[facts.no_content if message.get("tool_calls") else "empty"]
    if role in facts.parts:
        return {"content": [{"type": "text", "text": text} for text in texts]}
    return {"content": "\n".join(texts)}


def _loaded(arguments: str) -> object:
    """The JSON of a call's arguments; half a character, written as \\ud83d alone, becomes U+FFFD.

    Raises ValueError or RecursionError.
    """
    found = json.loads(arguments.strip() or "{}")
    if "\\ud" not in arguments.lower():
        return found
    written = json.dumps(found, ensure_ascii=False)
    return json.loads(written.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def _arguments(given: object, facts: TemplateFacts, param: str) -> object:
    """A call's arguments as the template wants them.

    A call of an earlier turn may be broken: the model was cut off, and the client sends back what
    it got. It must not end the conversation.
    """
    arguments = given
    if isinstance(given, str):
        try:
            arguments = _loaded(given)
        except (ValueError, RecursionError):
            arguments = given
    if arguments is None:
        given = {}
        arguments = {}
    if isinstance(arguments, Mapping):
        if facts.object_arguments:
            return arguments
        if isinstance(given, str) and given.strip():
            return given
        return json.dumps(arguments, ensure_ascii=False)
    if facts.any_arguments:
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    log.warning(
        "%s: function.arguments is no JSON object; the chat template is given an empty one", param
    )
    return {} if facts.object_arguments else "{}"


def _tool_call(call: object, facts: TemplateFacts, param: str) -> dict[str, Any]:
    """A tool call with a type, and arguments as the template wants them; null keys go."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise _wrong(param, "a tool call needs a `function` object")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _wrong(f"{param}.function.name", "a tool call must name its function")
    fields = {key: value for key, value in call.items() if value is not None}
    arguments = _arguments(function.get("arguments"), facts, param)
    return {
        **fields,
        "type": fields.get("type", "function"),
        "function": {**function, "arguments": arguments},
    }


def _with_reasoning(fields: dict[str, Any]) -> dict[str, Any]:
    """A turn's reasoning, by whatever name a client has for it, under those that templates read."""
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in fields:
            return {"thinking": fields[name], **fields, "reasoning_content": fields[name]}
    return fields


def normalise_messages(
    messages: Sequence[Mapping[str, Any]], facts: TemplateFacts
) -> list[dict[str, Any]]:
    """Messages as the template with these facts takes them; keys that are null are left out.

    The role `developer` becomes `system` where the template does not know it, for most would drop
    it silently. A system message in the middle becomes a user's where the template would not show
    it in its place. Raises RequestError naming the message.
    """
    if not messages:
        raise _wrong("messages", "there must be at least one message")
    found = [_normal(message, facts, f"messages[{i}]") for i, message in enumerate(messages)]
    if facts.late_system or not any(message["role"] in _SYSTEM for message in found[1:]):
        return found
    return _with_system_in_front(found, facts)


_SYSTEM = ("system", "developer")


def _with_system_in_front(messages: list[dict[str, Any]], facts: TemplateFacts) -> list[Any]:
    """What is said to the system behind the first turn is said by the user, in the same place.

    Put into the front, it would change what every later turn begins with, and nothing of a
    conversation would be found in the prefix cache. Turns of one role that come to stand together
    are joined, since many templates want them to alternate.
    """
    found: list[dict[str, Any]] = []
    moved = False
    for message in messages:
        role = message["role"]
        leads = all(before["role"] in _SYSTEM for before in found)
        late = role in _SYSTEM and not leads
        if late:
            role = "user"
        joins = bool(found) and found[-1]["role"] == role
        if joins and (late or moved or (role in _SYSTEM and leads)):
            found[-1] = {**found[-1], **_joined(found[-1], message, role in facts.parts)}
        else:
            content = _as(message["content"], parts=role in facts.parts)
            found.append({**message, "role": role, "content": content} if late else message)
        moved = late
    return found


def _joined(one: Mapping[str, Any], other: Mapping[str, Any], parts: bool) -> Mapping[str, Any]:
    """The content of two turns as one's."""
    if parts:
        return {"content": [*_as(one["content"], parts=True), *_as(other["content"], parts=True)]}
    texts = (_as(each["content"], parts=False) for each in (one, other))
    return {"content": "\n\n".join(texts)}


def _as(content: Any, *, parts: bool) -> Any:
    """Normalised content as a list of parts, or as one text."""
    if parts:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _normal(message: object, facts: TemplateFacts, param: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(param, "a message must be an object with `role` and `content`")
    role = message.get("role")
    if role not in ROLES:
        raise _wrong(f"{param}.role", f"role is {role!r}; it must be one of {', '.join(ROLES)}")
    if role == "developer" and not facts.developer:
        role = "system"
    fields = {key: value for key, value in message.items() if value is not None}
    fields |= {"role": role, **_content(message, role, facts, f"{param}.content")}
    fields = _with_reasoning(fields)
    calls = fields.pop("tool_calls", None)
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise _wrong(f"{param}.tool_calls", "tool_calls must be a list")
    if calls:
        fields["tool_calls"] = [
            _tool_call(call, facts, f"{param}.tool_calls[{j}]") for j, call in enumerate(calls)
        ]
    return fields


class ChatTemplate:
    """One compiled chat template. TokenizerError where it is no valid Jinja."""

    def __init__(self, source: str, name: str = "default") -> None:
        self.source = source
        self._environment = TemplateEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise TokenizerError(f"chat template {name!r}{line}: {error}") from error

    @cached_property
    def reads(self) -> frozenset[str]:
        """The names of the variables that it may read."""
        tree = self._environment.parse(self.source)
        return frozenset(jinja2.meta.find_undeclared_variables(tree))

    def probe(self, variables: Mapping[str, Any]) -> TemplateFacts:
        """What the template takes, tried with these variables (special tokens' names) beside."""
        known = {"documents": None, **variables, "tools": [TOOL], "add_generation_prompt": True}

        def render(messages: Sequence[Mapping[str, Any]], seconds: float) -> str:
            return self.render({**known, "messages": messages}, seconds=seconds)

        return probe(render, self.source)

    def render(
        self,
        variables: Mapping[str, Any],
        *,
        seconds: float = MAX_SECONDS,
        characters: int = MAX_CHARACTERS,
    ) -> str:
        """The text for these variables (`messages`, `tools`, `add_generation_prompt`, ...).

        RequestError(param="messages") where the template refuses them, fails on them, or passes a
        limit: `seconds`, or `characters` that its expressions make in all.
        """
        try:
            return self._environment.run(
                self._template, variables, seconds=seconds, characters=characters
            )
        except _TEMPLATE_FAULTS as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            raise RequestError(
                f"the chat template refuses these messages: {reason}", param="messages"
            ) from error


def load_templates(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """All templates of a model directory by name; the plain one is `default`.

    In falling priority: chat_template.jinja (and additional_chat_templates/*.jinja),
    chat_template.json, and chat_template in tokenizer_config.json, a string or a list of {"name",
    "template"}.
    """
    older = read_json(directory / "chat_template.json", default={})
    sources = _named_sources(tokenizer_config.get("chat_template"))
    sources |= _named_sources(older.get("chat_template"))
    additional = sorted(directory.glob("additional_chat_templates/*.jinja"))
    files = {path.stem: path for path in additional}
    plain = directory / "chat_template.jinja"
    if plain.is_file():
        files["default"] = plain
    for name, path in files.items():
        try:
            sources[name] = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path.name} cannot be read: {error}") from error
    return {name: ChatTemplate(source, name) for name, source in sources.items()}


def _named_sources(found: object) -> dict[str, str]:
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, Mapping):
        found = [{"name": name, "template": source} for name, source in found.items()]
    sources: dict[str, str] = {}
    for entry in found if isinstance(found, list) else [None]:
        fields = entry if isinstance(entry, Mapping) else {}
        name = fields.get("name")
        source = fields.get("template")
        if not isinstance(name, str) or not isinstance(source, str):
            raise TokenizerError(
                'chat_template must be a string or a list of {"name": ..., "template": ...}'
            )
        sources[name] = source
    return sources
