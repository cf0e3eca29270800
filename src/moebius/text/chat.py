"""Chat templates: which one a model has, what messages they are given, and what they render."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

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


def _check(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise RequestError(f"{param}: {message}", param=param)


def _parts_of(content: object, param: str) -> list[str] | None:
    """The texts of a content; None where there is none."""
    if content is None or isinstance(content, str):
        return None if content is None else [content]
    _check(
        isinstance(content, (list, tuple)),
        param,
        "content must be a string, null, or a list of text parts",
    )
    texts: list[str] = []
    for part in content:  # type: ignore[attr-defined]
        if isinstance(part, str):
            texts.append(part)
            continue
        _check(
            isinstance(part, Mapping), param, 'a content part must be {"type": "text", "text": ...}'
        )
        kind = part.get("type")
        # What an assistant said when it refused is what it said.
        _check(
            kind in ("text", "refusal"),
            param,
            f"content part {kind!r} is not supported; only text is",
        )
        _check(
            isinstance(part.get(kind), str), param, f"a {kind} part needs a string under `{kind}`"
        )
        texts.append(part[kind])
    return texts


def _content(
    message: Mapping[str, Any], role: str, facts: TemplateFacts, param: str
) -> Mapping[str, Any]:
    """The field `content` as the template wants it, or no such field where it wants none.

    Several text parts are joined by a line break, as other engines do.
    """
    texts = _parts_of(message.get("content"), param)
    _check(
        texts is not None or role == "assistant",
        param,
        "content is missing; only an assistant's message may do without",
    )
    if texts is None:
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
        given = arguments = {}
    if isinstance(arguments, Mapping):
        if facts.object_arguments:
            return arguments
        return (
            given
            if isinstance(given, str) and given.strip()
            else json.dumps(arguments, ensure_ascii=False)
        )
    if facts.any_arguments:
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    log.warning(
        "%s: function.arguments is no JSON object; the chat template is given an empty one", param
    )
    return {} if facts.object_arguments else "{}"


def _tool_call(call: object, facts: TemplateFacts, param: str) -> dict[str, Any]:
    """A tool call with its type, and arguments as the template wants them; keys that are null are
    left out."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise RequestError(f"{param}: a tool call needs a `function` object", param=param)
    name = function.get("name")
    named = isinstance(name, str) and name != ""
    _check(named, f"{param}.function.name", "a tool call must name its function")
    fields = {key: value for key, value in call.items() if value is not None}
    arguments = _arguments(function.get("arguments"), facts, param)
    return {
        **fields,
        "type": fields.get("type", "function"),
        "function": {**function, "arguments": arguments},
    }


def _with_reasoning(fields: dict[str, Any]) -> dict[str, Any]:
    """Clients and templates have several names for a turn's reasoning: it goes by those that
    templates read."""
    found = [
        fields[name] for name in ("reasoning_content", "thinking", "reasoning") if name in fields
    ]
    return {"thinking": found[0], **fields, "reasoning_content": found[0]} if found else fields


def normalise_messages(
    messages: Sequence[Mapping[str, Any]], facts: TemplateFacts
) -> list[dict[str, Any]]:
    """Messages as the template with these facts takes them; keys that are null are left out.

    The role `developer` becomes `system` where the template does not know it, for most would drop
    it silently. Raises RequestError naming the message.
    """
    _check(len(messages) > 0, "messages", "there must be at least one message")
    normal: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        param = f"messages[{i}]"
        _check(
            isinstance(message, Mapping),
            param,
            "a message must be an object with `role` and `content`",
        )
        role = message.get("role")
        _check(
            role in ROLES,
            f"{param}.role",
            f"role is {role!r}; it must be one of {', '.join(ROLES)}",
        )
        role = "system" if role == "developer" and not facts.developer else str(role)
        fields = {key: value for key, value in message.items() if value is not None}
        fields |= {"role": role, **_content(message, role, facts, f"{param}.content")}
        fields = _with_reasoning(fields)
        calls = fields.pop("tool_calls", None)
        if calls is not None:
            _check(
                isinstance(calls, (list, tuple)), f"{param}.tool_calls", "tool_calls must be a list"
            )
        if calls:
            fields["tool_calls"] = [
                _tool_call(call, facts, f"{param}.tool_calls[{j}]") for j, call in enumerate(calls)
            ]
        normal.append(fields)
    return normal


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

    def probe(self, variables: Mapping[str, Any]) -> TemplateFacts:
        """What the template takes, tried with these variables beside the messages (the special
        tokens' names)."""
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
    sources: dict[str, str] = {}
    for found in (
        tokenizer_config.get("chat_template"),
        read_json(directory / "chat_template.json", default={}).get("chat_template"),
    ):
        sources |= _named_sources(found)
    files = {
        path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))
    }
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
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
        name, source = fields.get("name"), fields.get("template")
        if not isinstance(name, str) or not isinstance(source, str):
            raise TokenizerError(
                'chat_template must be a string or a list of {"name": ..., "template": ...}'
            )
        sources[name] = source
    return sources
