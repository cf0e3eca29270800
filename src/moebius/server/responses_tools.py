"""Tools of the Responses API: all of them are functions to the model, whatever they are to the
client."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moebius.errors import RequestError
from moebius.front.tools import Tool
from moebius.server.told_once import left_out

Json = dict[str, Any]

INPUT = "input"
"""The one parameter of a custom tool, which holds the text that it takes."""


@dataclass(frozen=True, slots=True)
class KnownTool:
    """What the client calls a function of the model's: its own name, and in which namespace.

    custom   it takes a text, and no JSON
    """

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(frozen=True, slots=True)
class Toolbox:
    """A request's tools.

    kept       as the client sent them, those that are none of OpenAI's own
    functions  in the form of a chat
    known      by the name that the model has for each
    """

    kept: list[Json] = field(default_factory=list)
    functions: list[Json] = field(default_factory=list)
    known: dict[str, KnownTool] = field(default_factory=dict)

    def of(self, name: str) -> KnownTool:
        """What a function that the model calls is; one that nobody knows is what it says."""
        return self.known.get(name, KnownTool(name))


def flat_name(name: str, namespace: object) -> str:
    """What the model knows a tool of a namespace by."""
    return f"{namespace}__{name}" if isinstance(namespace, str) and namespace else name


def toolbox_of(tools: Sequence[Mapping[str, Any]]) -> Toolbox:
    """The tools that a client runs. Those that OpenAI runs are left out, and logged: Codex sends
    some always."""
    found = Toolbox()
    for i, tool in enumerate(tools):
        entries = list(_entries(tool, f"tools[{i}]"))
        if not entries:
            left_out("tool of type", tool.get("type"))
            continue
        found.kept.append(dict(tool))
        for known, function in entries:
            found.known[function["name"]] = known
            found.functions.append({"type": "function", "function": function})
    return found


def _entries(tool: Mapping[str, Any], at: str) -> Iterator[tuple[KnownTool, Json]]:
    if tool.get("type") != "namespace":
        yield from _entry(tool, at, None)
        return
    namespace = tool.get("name")
    inner = tool.get("tools")
    if not isinstance(namespace, str) or not isinstance(inner, list):
        raise RequestError(f"{at}: a namespace needs its name and its tools", param=at)
    for i, each in enumerate(inner):
        if not isinstance(each, Mapping):
            raise RequestError(f"{at}.tools[{i}]: it must be an object", param=f"{at}.tools[{i}]")
        yield from _entry(each, f"{at}.tools[{i}]", namespace)


def _entry(
    tool: Mapping[str, Any], at: str, namespace: str | None
) -> Iterator[tuple[KnownTool, Json]]:
    kind = tool.get("type")
    if kind not in ("function", "custom"):
        return
    name = tool.get("name")
    if not isinstance(name, str):
        raise RequestError(f"{at}.name: it must be a string", param=f"{at}.name")
    fields = {key: tool[key] for key in ("description", "parameters", "strict") if key in tool}
    if kind == "custom":
        fields = _as_function(tool, fields)
    function = {**fields, "name": flat_name(name, namespace)}
    Tool.named(function, at)
    yield KnownTool(name, namespace, kind == "custom"), function


def _as_function(tool: Mapping[str, Any], fields: Mapping[str, Any]) -> Json:
    """A tool that takes a text as a function of one string; the model is shown the text's grammar.

    What holds the text to that grammar is to be made where a chat's tools are held to theirs.
    """
    text: Json = {"type": "string"}
    wanted = tool.get("format")
    if isinstance(wanted, Mapping) and wanted.get("type") == "grammar":
        syntax = wanted.get("syntax")
        text["description"] = f"A text of this {syntax} grammar:\n{wanted.get('definition')}"
    parameters = {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
    described = {"description": fields["description"]} if "description" in fields else {}
    return {**described, "parameters": parameters}


def choice_in_chat(given: object, tools: Toolbox) -> object:
    """`tool_choice` in the form of a chat."""
    if not isinstance(given, Mapping):
        return given
    kind = given.get("type")
    if kind in ("function", "custom"):
        return _named(given)
    if kind == "allowed_tools":
        entries = given.get("tools")
        chosen = entries if isinstance(entries, list) else []
        allowed = [_named(each) for each in chosen if _is_ours(each)]
        return {
            "type": "allowed_tools",
            "allowed_tools": {"mode": given.get("mode"), "tools": allowed},
        }
    raise RequestError(
        f"tool_choice: {str(kind)[:100]!r} is a tool that this server does not run",
        param="tool_choice",
    )


def _is_ours(tool: object) -> bool:
    return isinstance(tool, Mapping) and tool.get("type") in ("function", "custom")


def _named(given: Mapping[str, Any]) -> Json:
    name = given.get("name")
    flat = flat_name(name, given.get("namespace")) if isinstance(name, str) else None
    return {"type": "function", "function": {"name": flat}}
