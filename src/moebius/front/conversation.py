"""Conversation: a chat that is to be answered, as every front door asks for it; it knows no
protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moebius.errors import RequestError
from moebius.front.tools import Tool, ToolChoice
from moebius.request.params import SamplingParams
from moebius.request.structured import StructuredOutput
from moebius.text import EncodedPrompt, Expected, ReplyFormat, Tokenizer, ends_anew
from moebius.text.replies import EFFORTS, HeldTool

Messages = Sequence[Mapping[str, Any]]

# Variables of a template that are not a client's to set.
_RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
)


@dataclass(frozen=True, slots=True)
class ReasoningSettings:
    """What a client wants of a model's reasoning; None: as the model has it.

    effort   one of EFFORTS
    thinks   whether there is to be any
    budget   most tokens of it
    lenient  where no tokens tell the end of a model's reasoning a budget counts for nothing; else
             it is an error there
    """

    effort: str | None = None
    thinks: bool | None = None
    budget: int | None = None
    lenient: bool = False

    def variables(self, efforts: Sequence[str]) -> dict[str, Any]:
        """What templates hear of it, by the names that they know; the nearest of the efforts that
        they know."""
        found: dict[str, Any] = {}
        thinks = self.thinks
        if self.effort is not None:
            found["reasoning_effort"] = _nearest(self.effort, efforts)
            thinks = self.effort != "none" if thinks is None else thinks
        if thinks is not None:
            found |= {"enable_thinking": thinks, "thinking": thinks}
        return found


def _nearest(effort: str, known: Sequence[str]) -> str:
    at = EFFORTS.index(effort)
    return min(known, key=lambda each: (abs(EFFORTS.index(each) - at), -EFFORTS.index(each)))


@dataclass(frozen=True, slots=True)
class Opening:
    """How the prompt of a chat ends, and begins.

    generation_prompt   whether an answer is begun; None: unless the last message is continued
    continues           the answer goes on with the text of the last message, the assistant's
    special_tokens      begin it as any text is begun (BOS), unless the template does so itself
    """

    generation_prompt: bool | None = None
    continues: bool = False
    special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat, and what may be answered.

    messages    in OpenAI's form for chats
    tools       all of which the model is shown
    parallel    whether a reply may make more than one call
    variables   of the chat template, beside the messages, as the client sets them
    documents   for templates that take some
    """

    messages: Messages
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    parallel: bool = True
    reasoning: ReasoningSettings = field(default_factory=ReasoningSettings)
    variables: Mapping[str, Any] = field(default_factory=dict)
    documents: Sequence[Mapping[str, Any]] = ()
    opening: Opening = field(default_factory=Opening)

    def __post_init__(self) -> None:
        for name in self.variables:
            if name in _RESERVED or name.endswith("_token"):
                raise RequestError(
                    f"chat_template_kwargs: {name[:100]!r} is not a client's to set",
                    param="chat_template_kwargs",
                )
        effort = self.reasoning.effort
        if effort is not None and effort not in EFFORTS:
            raise RequestError(
                f"reasoning_effort must be one of {', '.join(EFFORTS)}", param="reasoning_effort"
            )

    def prompt(
        self, tokenizer: Tokenizer, replies: ReplyFormat, *, at_most: int | None = None
    ) -> EncodedPrompt:
        """The prompt. RequestError where the template refuses it; ContextLengthError for more than
        `at_most` ids."""
        tools = [tool.shown for tool in self.tools] if self._shows_tools(replies) else None
        documents = {"documents": list(self.documents)} if self.documents else {}
        variables = {**documents, **self.reasoning.variables(replies.efforts), **self.variables}
        opening = self.opening
        return tokenizer.chat_prompt(
            self.messages,
            variables,
            tools,
            add_generation_prompt=ends_anew(opening.generation_prompt, opening.continues),
            continue_final_message=opening.continues,
            add_special_tokens=opening.special_tokens,
            at_most=at_most,
        )

    def _shows_tools(self, replies: ReplyFormat) -> bool:
        """Tools that may not be called are shown all the same where the model can be kept from
        calling: the prompt stays the same from turn to turn, and its beginning in the cache."""
        return self.choice.mode != "none" or replies.starter_id is not None

    def expected(self, replies: ReplyFormat) -> Expected:
        """What is to be looked for in the reply. RequestError where the model's format of tool
        calls is not known."""
        budget = self.reasoning.budget
        if self.reasoning.lenient and not replies.bounds_reasoning:
            budget = None
        if not self.tools or self.choice.mode == "none":
            silent = bool(self.tools) and self._shows_tools(replies)
            return Expected(silent=silent, budget=budget)
        if replies.tools is None:
            raise RequestError(
                "tools: no format is known in which this model calls them; leave them out, send "
                '"tool_choice": "none" beside them, or name a format with tool_format '
                "(--tool-format)",
                param="tools",
            )
        return Expected(
            tools={tool.name: tool.parameters for tool in self.tools},
            barred=frozenset(tool.name for tool in self.tools if not self.choice.allows(tool.name)),
            parallel=self._several,
            held=self._holds,
            budget=budget,
        )

    @property
    def _holds(self) -> bool:
        """Whether the reply's calls are held to a grammar."""
        may = [tool for tool in self.tools if self.choice.allows(tool.name)]
        return self.choice.mode == "required" or (
            self.choice.mode == "auto" and any(tool.strict for tool in may)
        )

    @property
    def _several(self) -> bool:
        """Whether a reply may make more than one call: not where the client has named the one."""
        return self.parallel and not self.choice.one

    def params(self, params: SamplingParams, replies: ReplyFormat) -> SamplingParams:
        """How the reply's tokens are drawn, where the client wants them drawn so.

        A reply that must call a tool, or may call one that is strict, is held to a grammar in the
        model's own format. One that must is not held to what its text was to be: it has none.
        RequestError for what cannot be held.
        """
        if not self._holds or replies.tools is None:
            return params
        must = self.choice.mode == "required"
        if params.structured is not None and not must:
            raise RequestError(
                f"{params.structured.param} is not supported beside a tool that is strict, unless "
                'it must be called (tool_choice: "required")',
                param=params.structured.param,
            )
        tools = [
            HeldTool(tool.name, tool.parameters, tool.strict)
            for tool in self.tools
            if self.choice.allows(tool.name)
        ]
        grammar, whole = replies.held(tools, must=must, several=self._several)
        return params.with_(structured=StructuredOutput(calls=grammar, whole=whole, param="tools"))
