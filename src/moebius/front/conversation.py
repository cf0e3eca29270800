"""Conversation: a chat that is to be answered, as every front door asks for it; it knows no
protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moebius.errors import RequestError
from moebius.request.params import SamplingParams
from moebius.text import Asked, EncodedPrompt, ReplyFormat, Tokenizer

Messages = Sequence[Mapping[str, Any]]
Mode = Literal["none", "auto", "required"]

_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}
# What bans a token: no logit outweighs it.
_BAN = -100.0


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


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools a reply may call, and whether it must.

    names   of those that it may; None: all
    one     the client has named the one tool that must be called
    """

    mode: Mode = "auto"
    names: frozenset[str] | None = None
    one: bool = False

    def allows(self, tool: Tool) -> bool:
        return self.names is None or tool.name in self.names


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat, and what may be answered.

    messages    in OpenAI's form for chats
    tools       all of which the model is shown
    parallel    whether a reply may make more than one call
    variables   of the chat template, beside the messages: enable_thinking, reasoning_effort, ...
    """

    messages: Messages
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice()
    parallel: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)

    def prompt(
        self, tokenizer: Tokenizer, replies: ReplyFormat, *, at_most: int | None = None
    ) -> EncodedPrompt:
        """The prompt. RequestError where the template refuses it; ContextLengthError for more than
        `at_most` ids."""
        tools = [tool.shown for tool in self.tools] if self._shows_tools(replies) else None
        return tokenizer.chat_prompt(self.messages, self.variables, tools, at_most=at_most)

    def _shows_tools(self, replies: ReplyFormat) -> bool:
        """Tools that may not be called are shown all the same where the model can be kept from
        calling: the prompt stays the same from turn to turn, and its beginning in the cache."""
        return self.choice.mode != "none" or replies.starter_id is not None

    def asked(self, replies: ReplyFormat) -> Asked:
        """What is to be looked for in the reply. RequestError where the model's format of tool
        calls is not known."""
        if not self.tools or self.choice.mode == "none":
            return Asked()
        if replies.tools is None:
            raise RequestError(
                "this model's chat template shows no format of tool calls that is known here; "
                'leave tools out, send "tool_choice": "none" beside them, or start the server with '
                "--tool-format",
                param="tools",
            )
        allowed = {tool.name: tool.parameters for tool in self.tools if self.choice.allows(tool)}
        return Asked(tools=allowed, parallel=self.parallel)

    def params(self, params: SamplingParams, replies: ReplyFormat) -> SamplingParams:
        """How the reply's tokens are drawn, where the client wants them drawn so.

        This is the one place where a constraint is to be made: of the tools, their choice, and the
        format (`required`, a named tool, `strict`).
        """
        if not self.tools:
            return params
        if self.choice.mode == "required":
            raise RequestError(
                "tool_choice: a reply that must call a tool needs a grammar of the model's format, "
                'which is not supported yet; use "auto" or "none"',
                param="tool_choice",
            )
        if self.choice.mode == "none" and replies.starter_id is not None:
            bias = {**params.logit_bias, replies.starter_id: _BAN}
            return params.with_(logit_bias=bias)
        return params
