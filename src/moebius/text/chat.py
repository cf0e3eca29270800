"""Chat templates: which one a model has, what messages they are given, and what they render."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from moebius.config import read_json, read_text
from moebius.errors import RequestError, TokenizerError
from moebius.text.sandbox import MAX_CHARACTERS, MAX_SECONDS, TemplateEnvironment

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


def _text_of(content: object, param: str) -> str | None:
    """Content as one string; several text parts are joined by a line break, as other engines do."""
    if content is None or isinstance(content, str):
        return content
    _check(isinstance(content, (list, tuple)), param, "content must be a string, null, or a list of text parts")
    texts: list[str] = []
    for part in content:  # type: ignore[attr-defined]
        if isinstance(part, str):
            texts.append(part)
            continue
        _check(isinstance(part, Mapping), param, 'a content part must be {"type": "text", "text": ...}')
        _check(part.get("type") == "text", param, f"content part {part.get('type')!r} is not supported; only text is")
        _check(isinstance(part.get("text"), str), param, "a text part needs a string under `text`")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_call(call: object, param: str) -> dict[str, Any]:
    """A tool call whose arguments are an object: OpenAI's clients send JSON text, templates want the object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    _check(isinstance(function, Mapping), param, "a tool call needs a `function` object")
    assert isinstance(call, Mapping) and isinstance(function, Mapping)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (json.JSONDecodeError, RecursionError) as error:
            raise RequestError(f"{param}: function.arguments is no JSON: {error}", param=param) from error
    if arguments is not None:
        _check(isinstance(arguments, Mapping), param, "function.arguments must be a JSON object")
        function = {**function, "arguments": arguments}
    return {**call, "function": dict(function)}


def normalise_messages(messages: Sequence[Mapping[str, Any]], *, knows_developer: bool) -> list[dict[str, Any]]:
    """Messages as templates expect them: text contents, tool arguments as objects, no keys that are null.

    The role `developer` becomes `system` where the template does not know it, for most would drop it silently.
    Raises RequestError naming the message.
    """
    _check(len(messages) > 0, "messages", "there must be at least one message")
    normal: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        param = f"messages[{i}]"
        _check(isinstance(message, Mapping), param, "a message must be an object with `role` and `content`")
        role = message.get("role")
        _check(role in ROLES, f"{param}.role", f"role is {role!r}; it must be one of {', '.join(ROLES)}")
        fields = {key: value for key, value in message.items() if value is not None}
        if role == "developer" and not knows_developer:
            fields["role"] = "system"
        content = _text_of(message.get("content"), f"{param}.content")
        calls = message.get("tool_calls")
        _check(
            content is not None or role == "assistant",
            f"{param}.content",
            "content is missing; only an assistant's message may do without",
        )
        if content is not None:
            fields["content"] = content
        if calls is not None:
            _check(isinstance(calls, (list, tuple)), f"{param}.tool_calls", "tool_calls must be a list")
            fields["tool_calls"] = [_tool_call(call, f"{param}.tool_calls[{j}]") for j, call in enumerate(calls)]
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

    @property
    def knows_developer(self) -> bool:
        """Whether the template mentions OpenAI's role `developer`."""
        return "developer" in self.source

    def render(
        self, variables: Mapping[str, Any], *, seconds: float = MAX_SECONDS, characters: int = MAX_CHARACTERS
    ) -> str:
        """The text for these variables (`messages`, `tools`, `add_generation_prompt`, ...).

        RequestError(param="messages") where the template refuses them, fails on them, or passes a limit: `seconds`,
        or `characters` that its expressions make in all.
        """
        try:
            return self._environment.run(self._template, variables, seconds=seconds, characters=characters)
        except _TEMPLATE_FAULTS as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            raise RequestError(f"the chat template refuses these messages: {reason}", param="messages") from error


def load_templates(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """All templates of a model directory by name; the plain one is `default`.

    In falling priority: chat_template.jinja (and additional_chat_templates/*.jinja), chat_template.json, and
    chat_template in tokenizer_config.json, a string or a list of {"name", "template"}.
    """
    sources: dict[str, str] = {}
    for found in (
        tokenizer_config.get("chat_template"),
        read_json(directory / "chat_template.json", default={}).get("chat_template"),
    ):
        sources |= _named_sources(found)
    files = {path.stem: path for path in sorted(directory.glob("additional_chat_templates/*.jinja"))}
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
            raise TokenizerError('chat_template must be a string or a list of {"name": ..., "template": ...}')
        sources[name] = source
    return sources
