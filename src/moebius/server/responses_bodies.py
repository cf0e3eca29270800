"""Bodies of OpenAI's Responses API, and what they ask for in the words of a chat."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from moebius.errors import RequestError
from moebius.server.fields import without_nulls
from moebius.server.first_error import first_error
from moebius.server.protocol import Body, ChatRequest, StreamOptions, parse
from moebius.server.renamed import renamed
from moebius.server.responses_input import chat_messages
from moebius.server.responses_tools import Toolbox, choice_in_chat, toolbox_of

Json = dict[str, Any]
Ignore = Callable[[Sequence[str]], None]

SEALED = "reasoning.encrypted_content"
"""What a client that keeps no text of reasoning asks to be included."""
LOGPROBS = "message.output_text.logprobs"
"""What a client asks to be included that wants its text's log-probabilities."""

# What a field of a chat is called here.
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
}
# Fields of a chat that this API has by other names, or not at all.
_OF_CHATS = (
    "add_generation_prompt", "continue_final_message", "echo", "include_reasoning", "logprobs",
    "max_completion_tokens", "max_tokens", "messages", "n", "prompt_logprobs", "reasoning_effort",
    "response_format", "return_token_ids", "return_tokens_as_token_ids", "thinking",
)  # fmt: skip
# What needs a server that keeps what it has answered.
_KEPT = ("previous_response_id", "conversation", "prompt")


class ResponsesBody(Body):
    """POST /v1/responses; fields that a chat has too, and are not here, mean what they mean
    there."""

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[Json] = Field(default_factory=list)
    tool_choice: str | Json = "auto"
    parallel_tool_calls: bool = True
    text: Json = Field(default_factory=dict)
    reasoning: Json = Field(default_factory=dict)
    include: list[str] = Field(default_factory=list)
    store: bool = False
    background: bool = False
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: Json = Field(default_factory=dict)

    def chat(self, tools: Toolbox) -> Json:
        """The body of a chat."""
        self._check()
        body: Json = {
            "model": self.model,
            "messages": chat_messages(self.instructions, self.input),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "tools": tools.functions,
            "tool_choice": choice_in_chat(self.tool_choice, tools),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.get("effort"),
            "logprobs": LOGPROBS in self.include,
            "top_logprobs": self.top_logprobs,
        }
        wanted = self.text.get("format")
        if wanted is not None:
            body["response_format"] = _response_format(wanted)
        return body

    def _check(self) -> None:
        if self.background:
            raise RequestError(
                "background: this server keeps no answers; wait for it, or stream it",
                param="background",
                code="unsupported_parameter",
            )
        if self.top_logprobs and LOGPROBS not in self.include:
            raise RequestError(
                f'top_logprobs needs include: ["{LOGPROBS}"]; without it no token\'s '
                "log-probability is told",
                param="top_logprobs",
            )


class ResponsesChat(ChatRequest):
    """What a body of this API asks for.

    sent      the body
    toolbox   its tools
    """

    id_prefix: ClassVar[str] = "resp"
    prompt_param: ClassVar[str] = "input"

    sent: ResponsesBody
    toolbox: Toolbox

    @property
    def length_param(self) -> str:
        return "max_output_tokens"

    def as_written(self, error: RequestError) -> RequestError:
        return renamed(super().as_written(error), _NAMES)


def read_responses(fields: Mapping[str, Any], ignore: Ignore | None = None) -> ResponsesChat:
    """What a body asks for. RequestError names what is wrong; `ignore` gets the names of fields
    that nobody knows, which are refused without it."""
    given: Json = without_nulls(fields)
    for name in _KEPT:
        if name in given:
            raise RequestError(
                f"{name}: this server keeps no answers; send the whole conversation as `input`: "
                "what was computed of it before comes from the prefix cache",
                param=name,
                code="unsupported_parameter",
            )
    for name in _OF_CHATS:
        if name in given:
            raise RequestError(f"{name}: the Responses API has no such field", param=name)
    own = {name: value for name, value in given.items() if name in ResponsesBody.model_fields}
    others = {name: value for name, value in given.items() if name not in own}
    try:
        body = ResponsesBody.model_validate(own)
    except ValidationError as error:
        raise first_error(error) from error
    toolbox = toolbox_of(body.tools)
    try:
        asked = {**others, **body.chat(toolbox), "sent": body, "toolbox": toolbox}
        return parse(ResponsesChat, asked, ignore)
    except RequestError as error:
        raise renamed(error, _NAMES) from error


def _response_format(given: object) -> object:
    """The flat form of this API as a chat has it."""
    if not isinstance(given, Mapping) or given.get("type") != "json_schema":
        return given
    inner = {name: value for name, value in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": inner}
