"""Tools that a reply may call, read from OpenAI's shapes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from moebius.errors import RequestError
from moebius.request.params import LIMITS

Mode = Literal["none", "auto", "required"]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


def _wrong(param: str, message: str) -> RequestError:
    return RequestError(f"{param}: {message}", param=param)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a reply may call.

    parameters   JSON Schema of its arguments, an object
    strict       whether its arguments must be held to that
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NO_ARGUMENTS)
    strict: bool = False

    @property
    def shown(self) -> dict[str, Any]:
        """As chat templates know it."""
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @classmethod
    def of(cls, given: object, param: str) -> Self:
        """From {"type": "function", "function": {"name", "description", "parameters", "strict"}}.

        Keys that clients add to it mean nothing here. RequestError, naming `param`.
        """
        if not isinstance(given, Mapping):
            raise _wrong(param, "a tool must be an object")
        kind = given.get("type", "function")
        if kind != "function":
            raise _wrong(f"{param}.type", f"{str(kind)[:100]!r} is not supported; only function is")
        function = given.get("function")
        if not isinstance(function, Mapping):
            raise _wrong(param, "a tool needs a `function` object")
        return cls.named(function, f"{param}.function")

    @classmethod
    def named(cls, given: Mapping[str, Any], param: str) -> Self:
        """From {"name", "description", "parameters", "strict"}, as Responses has it, too."""
        name = given.get("name")
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise _wrong(f"{param}.name", "it must be 1 to 128 of A-Z a-z 0-9 _ . -")
        description = given.get("description")
        if not isinstance(description, str | None):
            raise _wrong(f"{param}.description", "it must be a string")
        parameters = given.get("parameters")
        if parameters is None:
            parameters = _NO_ARGUMENTS
        if not isinstance(parameters, Mapping):
            raise _wrong(f"{param}.parameters", "it must be a JSON Schema, an object")
        strict = given.get("strict")
        if not isinstance(strict, bool | None):
            raise _wrong(f"{param}.strict", "it must be true, false or null")
        return cls(name, description, parameters, strict or False)


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools a reply may call, and whether it must.

    names   of those that it may; None: all
    one     the client has named the one function that must be called
    """

    mode: Mode = "auto"
    names: frozenset[str] | None = None
    one: bool = False

    def allows(self, name: str) -> bool:
        return self.names is None or name in self.names


def tools_of(given: object) -> tuple[Tool, ...]:
    """A request's `tools`. RequestError names what is wrong."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise RequestError("tools must be a list of objects", param="tools")
    if len(given) > LIMITS.tools:
        raise RequestError(f"tools has {len(given)} entries; at most {LIMITS.tools}", param="tools")
    tools = tuple(Tool.of(tool, f"tools[{i}]") for i, tool in enumerate(given))
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in seen:
            raise _wrong(f"tools[{i}].function.name", f"{tool.name!r} is there twice")
        seen.add(tool.name)
    return tools


def choice_of(given: object, tools: Sequence[Tool]) -> ToolChoice:
    """A request's `tool_choice`: "none", "auto", "required", a function, or allowed tools.

    RequestError names what is wrong.
    """
    if given is None or given == "auto":
        return ToolChoice()
    if given == "none":
        return ToolChoice("none")
    found = _choice(given)
    if not tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    known = {tool.name for tool in tools}
    for name in sorted(found.names or ()):
        if name not in known:
            raise RequestError(
                f"tool_choice names {name[:128]!r}, which is not among the tools",
                param="tool_choice",
            )
    return found


def _choice(given: object) -> ToolChoice:
    if given == "required":
        return ToolChoice("required")
    kind = given.get("type") if isinstance(given, Mapping) else None
    if isinstance(given, Mapping) and kind == "function":
        return ToolChoice("required", frozenset([_function_name(given)]), one=True)
    if isinstance(given, Mapping) and kind == "allowed_tools":
        return _allowed(given.get("allowed_tools"))
    raise RequestError(
        'tool_choice must be "none", "auto", "required", {"type": "function", "function": '
        '{"name": ...}}, or {"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": '
        "[...]}}",
        param="tool_choice",
    )


def _function_name(given: object) -> str:
    function = given.get("function") if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            'tool_choice: a function needs its name: {"type": "function", "function": {"name": '
            "...}}",
            param="tool_choice",
        )
    return name


def _allowed(given: object) -> ToolChoice:
    mode = given.get("mode") if isinstance(given, Mapping) else None
    entries = given.get("tools") if isinstance(given, Mapping) else None
    if mode not in ("auto", "required") or not isinstance(entries, list) or not entries:
        raise RequestError(
            'tool_choice: allowed_tools needs a `mode`, "auto" or "required", and `tools`, a list',
            param="tool_choice",
        )
    return ToolChoice(mode, frozenset(map(_function_name, entries)))
