"""Bodies of Anthropic's Messages API, and what they ask for in OpenAI's words."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moebius.errors import ContextExceededError, RequestError
from moebius.front.tools import Tool
from moebius.server.fields import without_nulls
from moebius.server.first_error import first_error
from moebius.server.messages_history import chat_messages
from moebius.server.protocol import ChatRequest, parse
from moebius.server.renamed import renamed
from moebius.server.told_once import left_out

Json = dict[str, Any]
Ignore = Callable[[Sequence[str]], None]

# What a field of a chat is called here.
_NAMES = {
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
}
# This server's own, which mean what they mean in a chat.
_OWN = (
    "cache_salt",
    "chat_template_kwargs",
    "frequency_penalty",
    "min_p",
    "presence_penalty",
    "priority",
    "repetition_penalty",
    "seed",
    "timeout",
)


class CountTokensBody(BaseModel):
    """POST /v1/messages/count_tokens. Fields that nobody knows count for nothing, here and in their
    objects: Claude Code adds some every few weeks."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    model: str | None = None
    messages: list[Json]
    system: str | list[Json] | None = None
    tools: list[Json] = Field(default_factory=list)
    tool_choice: Json | None = None
    thinking: Json | None = None
    output_config: Json = Field(default_factory=dict)
    output_format: Json | None = None

    def chat(self) -> Json:
        """The body of a chat, without what concerns its answer alone."""
        messages = chat_messages(self.system, self.messages)
        return {
            "model": self.model,
            "messages": messages,
            "continue_final_message": _is_prefill(messages),
            **self._reasoning(),
            **self._tools(),
        }

    def _reasoning(self) -> Json:
        """There is none unless it is asked for, as at Anthropic's."""
        given = self.thinking or {}
        kind = given.get("type")
        if kind not in (None, "enabled", "adaptive", "disabled"):
            raise RequestError(
                "thinking.type must be enabled, adaptive or disabled", param="thinking.type"
            )
        effort = self.output_config.get("effort")
        found: Json = {} if effort is None else {"reasoning_effort": effort}
        if kind is None and effort is None:
            kind = "disabled"
        if kind is not None:
            found["thinking"] = {"type": kind}
        if kind != "disabled" and given.get("budget_tokens") is not None:
            found["thinking_token_budget"] = given["budget_tokens"]
        return found

    def _tools(self) -> Json:
        tools = [
            _function(tool, f"tools[{i}]") for i, tool in enumerate(self.tools) if _is_ours(tool)
        ]
        if self.tools and not tools:
            raise RequestError(
                "tools: none of these is a tool of the client's own; this server runs none",
                param="tools",
            )
        return {"tools": tools, **_choice(self.tool_choice)}


class MessagesBody(CountTokensBody):
    """POST /v1/messages."""

    max_tokens: int
    stream: bool = False
    stop_sequences: list[str] = Field(default_factory=list)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def chat(self) -> Json:
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        body = {
            **super().chat(),
            **given,
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "stop": [stop for stop in self.stop_sequences if stop],
            "shows_thinking": (self.thinking or {}).get("display") != "omitted",
        }
        wanted = self.output_config.get("format") or self.output_format
        if wanted is not None:
            body["response_format"] = _response_format(wanted)
        return body


class MessagesChat(ChatRequest):
    """What a body of this API asks for.

    shows_thinking   whether the client wants to read the reasoning
    """

    id_prefix: ClassVar[str] = "msg"
    any_model: ClassVar[bool] = True
    clamps: ClassVar[bool] = True
    # Claude Code and others like it send one to whatever model there is.
    lenient_budget: ClassVar[bool] = True

    shows_thinking: bool = True

    def as_written(self, error: RequestError) -> RequestError:
        if isinstance(error, ContextExceededError):
            # Claude Code looks for these words, and makes the conversation shorter.
            facts = error.facts
            message = f"{facts['prompt_tokens']} tokens > {facts['context']} maximum"
            return RequestError(
                f"prompt is too long: {message}", param="messages", code="context_length_exceeded"
            )
        return renamed(super().as_written(error), _NAMES)


def read_messages(fields: Mapping[str, Any], ignore: Ignore | None = None) -> MessagesChat:
    """What a body of /v1/messages asks for; RequestError names what is wrong. Nothing is refused
    for being unknown, so that `ignore` is not needed."""
    return _read(MessagesBody, fields)


def read_count(fields: Mapping[str, Any], ignore: Ignore | None = None) -> MessagesChat:
    """The same of /v1/messages/count_tokens."""
    return _read(CountTokensBody, fields)


def _read(kind: type[CountTokensBody], fields: Mapping[str, Any]) -> MessagesChat:
    given: Json = without_nulls(fields)
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        raise first_error(error) from error
    own = {name: given[name] for name in _OWN if name in given}
    for name in given.keys() - kind.model_fields.keys() - own.keys():
        left_out("field", name)
    try:
        return parse(MessagesChat, {**own, **body.chat()})
    except RequestError as error:
        raise renamed(error, _NAMES) from error


def _is_prefill(messages: Sequence[Json]) -> bool:
    """Whether the answer goes on with what the assistant has begun to say."""
    last = messages[-1] if messages else {}
    return bool(last.get("role") == "assistant" and last["content"] and not last.get("tool_calls"))


def _is_ours(tool: Mapping[str, Any]) -> bool:
    """Whether the client runs it, and says what it takes; else it is Anthropic's own."""
    kind = tool.get("type")
    if kind in (None, "custom") or "input_schema" in tool:
        return True
    left_out("tool of type", kind)
    return False


def _function(tool: Mapping[str, Any], at: str) -> Json:
    """A tool in OpenAI's form."""
    schema = tool.get("input_schema")
    if not isinstance(schema, Mapping | None):
        raise RequestError(
            f"{at}.input_schema: it must be a JSON Schema, an object", param=f"{at}.input_schema"
        )
    fields = {name: tool.get(name) for name in ("name", "description", "strict")}
    function = without_nulls({**fields, "parameters": schema})
    Tool.named(function, at)
    return {"type": "function", "function": function}


_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _choice(given: Mapping[str, Any] | None) -> Json:
    if given is None:
        return {}
    kind = given.get("type")
    choice: str | Json
    if kind == "tool":
        choice = {"type": "function", "function": {"name": given.get("name")}}
    elif kind in _CHOICES:
        choice = _CHOICES[kind]
    else:
        raise RequestError(
            "tool_choice.type must be auto, any, tool or none", param="tool_choice.type"
        )
    parallel = given.get("disable_parallel_tool_use") is not True
    return {"tool_choice": choice, "parallel_tool_calls": parallel}


def _response_format(given: Mapping[str, Any]) -> Json:
    if given.get("type") != "json_schema" or not isinstance(given.get("schema"), Mapping):
        raise RequestError(
            'output_config.format must be {"type": "json_schema", "schema": {...}}',
            param="output_config.format",
        )
    schema = {"name": "output", "schema": given["schema"], "strict": True}
    return {"type": "json_schema", "json_schema": schema}
