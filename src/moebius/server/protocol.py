"""The OpenAI request types: what a body may hold, and what it means as SamplingParams.

Of fields that are not in a model here (fields.py tells their kinds), those that are unknown or not
supported are refused by name, unknown ones unless the operator wants them ignored. Null means "not
given".
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from moebius.errors import ContextExceededError, ContextLengthError, RequestError
from moebius.front.conversation import Conversation, Opening, ReasoningSettings
from moebius.front.tools import Tool, choice_of, tools_of
from moebius.request.params import LIMITS, SamplingParams
from moebius.server.cut import Side, cut_ids, cut_length, cut_text
from moebius.server.fields import (
    HARMLESS,
    UNSUPPORTED,
    Prompts,
    as_list,
    as_messages,
    as_prompts,
    at_most,
    bias_by_id,
    counted_documents,
    refuse_unsupported,
    without_idle_functions,
    without_nulls,
)
from moebius.server.first_error import first_error
from moebius.server.limits import HTTP_LIMITS
from moebius.server.structured import StructuredFields
from moebius.text import (
    EncodedPrompt,
    GenerationDefaults,
    Tokenizer,
    ends_anew,
    infill_prompt,
    last_text,
)

# A text beyond the context is still counted up to so many times its length.
_COUNTED = 4
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
TIMEOUT_HEADER = "X-Request-Timeout"
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")


class Body(BaseModel):
    """Strict: no value is converted from another type, and every number is finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    any_model: ClassVar[bool] = False
    """Whether the model that is served answers by whatever name it is called."""

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerationRequest(StructuredFields, Body):
    """What both endpoints share.

    Defaults of sampling fields are absent here: they are the model's, or SamplingParams'.
    """

    id_prefix: ClassVar[str]
    prompt_param: ClassVar[str]
    continues: ClassVar[bool]
    """Whether the answer's text continues the prompt's, rather than standing alone."""
    clamps: ClassVar[bool] = False
    """Whether more tokens than there is room for behind the prompt mean as many as there is."""

    stream: bool = False
    stream_options: Annotated[StreamOptions | None, BeforeValidator(without_nulls)] = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[list[str], at_most("stop"), BeforeValidator(as_list)] = Field(
        default_factory=list
    )
    stop_token_ids: Annotated[list[int], at_most("stop_token_ids")] = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Annotated[dict[str, float], AfterValidator(bias_by_id), at_most("logit_bias")] = (
        Field(default_factory=dict)
    )
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: str = ""
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    """Log-probabilities name each token by its id, as token_id:5, for its text may be no
    characters."""
    timeout: float | None = None
    """Seconds after which the client wants no answer any more; the server's own deadline stays."""
    request_id: str | None = None
    """The client's name for the call: the answer's id ends in it, and nothing else is made of
    it."""

    def seconds(self, in_headers: Sequence[str]) -> float:
        """How long the client will wait, by its body or by its headers: the shorter; infinity where
        it does not say.

        RequestError where its headers, the values of X-Request-Timeout, are no number of seconds.
        """
        in_body = self.timeout or math.inf
        if not in_headers:
            return in_body
        shown = in_headers[0].strip()
        if len(in_headers) > 1 or _SECONDS.fullmatch(shown) is None or float(shown) == 0:
            raise RequestError(
                f"{TIMEOUT_HEADER} must be one number of seconds above 0, such as 2.5",
                param=TIMEOUT_HEADER,
            )
        return min(float(shown), in_body)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def length_param(self) -> str:
        """What the client calls the most tokens that it wants."""
        return "max_tokens"

    def as_written(self, error: RequestError) -> RequestError:
        """The same error, naming prompt and length as this endpoint's client calls them."""
        if error.param == "max_tokens":
            return RequestError(
                str(error).replace("max_tokens", self.length_param), param=self.length_param
            )
        if isinstance(error, ContextExceededError):
            return error.named(self.prompt_param)
        param = self.prompt_param if error.param == "prompt" else error.param
        return RequestError(str(error), param=param, code=error.code)

    def _check_together(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs is not supported with stream: true", param="prompt_logprobs"
            )
        if len(self.cache_salt.encode()) > LIMITS.salt_bytes:
            raise RequestError(f"cache_salt has over {LIMITS.salt_bytes} bytes", param="cache_salt")
        if self.timeout is not None and self.timeout <= 0:
            raise RequestError("timeout must be a number of seconds above 0", param="timeout")
        if self.request_id is not None and _REQUEST_ID.fullmatch(self.request_id) is None:
            raise RequestError(
                "request_id must be 1 to 128 of the characters A-Z a-z 0-9 . _ -",
                param="request_id",
            )

    def _sampling(self, defaults: GenerationDefaults, **endpoint: Any) -> SamplingParams:
        """What the endpoint makes of its own fields, over the client's values, the model's defaults
        and OpenAI's."""
        self._check_together()
        names = self.model_fields_set & SamplingParams.__dataclass_fields__.keys()
        given = {name: getattr(self, name) for name in names}
        wanted = {"structured": self.structured, **endpoint}
        return SamplingParams(**{**defaults.sampling, **given, **wanted})


class CompletionRequest(GenerationRequest):
    id_prefix = "cmpl"
    prompt_param = "prompt"
    continues = True

    prompt: Annotated[Prompts, PlainValidator(as_prompts)]
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True
    suffix: str = ""
    truncate_prompt_tokens: int | None = None
    truncation_side: Side = "left"

    def encode(self, tokenizer: Tokenizer, most: int) -> list[EncodedPrompt]:
        """The ids of each prompt. ContextExceededError where one has more than `most`."""
        return [self._encoded(tokenizer, prompt, most) for prompt in self.prompt]

    def _encoded(self, tokenizer: Tokenizer, prompt: str | list[int], most: int) -> EncodedPrompt:
        special = self.add_special_tokens
        if self.suffix and isinstance(prompt, str):
            return infill_prompt(
                tokenizer, prompt, self.suffix, add_special_tokens=special, at_most=most
            )
        if self.truncate_prompt_tokens is None:
            return EncodedPrompt(self._ids(tokenizer, prompt, most))
        length = cut_length(self.truncate_prompt_tokens, self._max_tokens, most)
        side = self.truncation_side
        if isinstance(prompt, str):
            ids = cut_text(
                tokenizer, prompt, length, side, add_special_tokens=special, context=most
            )
        else:
            ids = cut_ids(prompt, length, side)
        return EncodedPrompt(ids)

    def _ids(self, tokenizer: Tokenizer, prompt: str | list[int], most: int) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, self.add_special_tokens, at_most=most)
        if len(prompt) > most:
            raise ContextExceededError(most, len(prompt))
        return prompt

    @property
    def _max_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def _check_suffix(self) -> None:
        if not self.suffix:
            return
        if not all(isinstance(prompt, str) for prompt in self.prompt):
            raise RequestError("suffix needs a prompt that is text", param="suffix")
        for name in ("echo", "truncate_prompt_tokens"):
            if getattr(self, name):
                raise RequestError(
                    f"{name} is not supported beside suffix; leave one of them out", param=name
                )

    def sampling(self, defaults: GenerationDefaults) -> SamplingParams:
        self._check_suffix()
        wanted = (self.logprobs if self.echo else None, self.prompt_logprobs)
        return self._sampling(
            defaults,
            max_tokens=self._max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=max((k for k in wanted if k is not None), default=None),
        )


class Thinking(BaseModel):
    """As Anthropic's, DeepSeek's and GLM's own APIs have it."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None


class ChatRequest(GenerationRequest):
    """lenient_budget: see ReasoningSettings."""

    id_prefix = "chatcmpl"
    prompt_param = "messages"
    continues = False
    lenient_budget: ClassVar[bool] = False

    messages: Annotated[list[dict[str, Any]], PlainValidator(as_messages)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: Annotated[tuple[Tool, ...], PlainValidator(tools_of)] = ()
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None
    documents: Annotated[list[dict[str, Any]], AfterValidator(counted_documents)] = Field(
        default_factory=list
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    echo: bool = False
    thinking: Annotated[Thinking | None, BeforeValidator(without_nulls)] = None
    thinking_token_budget: int | None = None
    include_reasoning: bool = True

    @property
    def length_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def conversation(self) -> Conversation:
        """What is asked, without the protocol. RequestError names what contradicts itself."""
        thinks = None if self.thinking is None else self.thinking.type != "disabled"
        budget = self.thinking_token_budget
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            if budget not in (None, self.thinking.budget_tokens):
                raise RequestError(
                    "thinking_token_budget and thinking.budget_tokens say two things; give one of "
                    "them",
                    param="thinking_token_budget",
                )
            budget = self.thinking.budget_tokens
        return Conversation(
            self.messages,
            self.tools,
            choice_of(self.tool_choice, self.tools),
            self.parallel_tool_calls,
            ReasoningSettings(self.reasoning_effort, thinks, budget, self.lenient_budget),
            self.chat_template_kwargs,
            self.documents,
            Opening(
                self.add_generation_prompt, self.continue_final_message, self.add_special_tokens
            ),
        )

    @property
    def echoed(self) -> str:
        """What the client wants back before what is new: the text that the answer goes on with."""
        return last_text(self.messages) if self.echo else ""

    def sampling(self, defaults: GenerationDefaults) -> SamplingParams:
        max_tokens = self.max_completion_tokens
        if max_tokens is None:
            max_tokens = self.max_tokens
        if self.echo and not self.continue_final_message:
            raise RequestError(
                "echo gives back the message that the answer goes on with; it needs "
                "continue_final_message: true",
                param="echo",
            )
        if max_tokens == 0:
            raise RequestError("max_tokens is 0; it must be at least 1", param="max_tokens")
        return self._sampling(
            defaults,
            max_tokens=max_tokens,
            logprobs=self._most_likely(),
            prompt_logprobs=self.prompt_logprobs,
        )

    def _most_likely(self) -> int | None:
        """How many of the most likely tokens are shown; None for no log-probabilities at all."""
        top = self.top_logprobs or 0
        if top and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if not 0 <= top <= LIMITS.logprobs:
            raise RequestError(
                f"top_logprobs is {top}; it must be an integer from 0 to {LIMITS.logprobs}",
                param="top_logprobs",
            )
        return top if self.logprobs else None


def counted_up_to(context: int) -> int:
    """The most tokens of a prompt that is not to be answered, with a model of this context."""
    return max(context, min(_COUNTED * context, HTTP_LIMITS.json_values))


class TokenizeRequest(Body):
    """Text (`prompt`) or a chat (`messages`) to count; `add_special_tokens` concerns text only."""

    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]] | None, PlainValidator(as_messages)] = None
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def encode(self, tokenizer: Tokenizer, context: int) -> list[int]:
        """The ids, of what has up to _COUNTED times the tokens of the context; ContextLengthError
        beyond."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        most = counted_up_to(context)
        try:
            if self.messages is None:
                return tokenizer.encode(self.prompt or "", self.add_special_tokens, at_most=most)
            return tokenizer.encode_chat(
                self.messages,
                add_generation_prompt=ends_anew(
                    self.add_generation_prompt, self.continue_final_message
                ),
                continue_final_message=self.continue_final_message,
                variables=self.chat_template_kwargs,
                at_most=most,
            )
        except ContextLengthError as error:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, {error.param} "
                f"has over {most}: no more are counted",
                param=error.param,
            ) from error


class DetokenizeRequest(Body):
    tokens: list[int]


_Model = TypeVar("_Model", bound=Body)


def parse(
    model: type[_Model],
    fields: Mapping[str, Any],
    ignore: Callable[[Sequence[str]], None] | None = None,
) -> _Model:
    """A checked record of `model`, or RequestError naming the first field that is wrong.

    ignore   gets the names of unknown fields, which then count for nothing; without it the first is
             refused
    """
    given: dict[str, Any] = without_nulls(fields)
    own = model.model_fields.keys()
    generates = issubclass(model, GenerationRequest)
    unsupported: Mapping[str, list[Any]] = UNSUPPORTED if generates else {}
    known = own | unsupported.keys() | (HARMLESS if generates else frozenset())
    unknown = [name for name in given if name not in known]
    if unknown and ignore is None:
        raise RequestError(
            f"{unknown[0][:200]}: there is no such field (--unknown-fields warn has the server "
            "ignore such)",
            param=unknown[0],
        )
    if unknown and ignore is not None:
        ignore(unknown)
    given = without_idle_functions(given)
    others = {name: value for name, value in given.items() if name not in own}
    refuse_unsupported(others, unsupported)
    try:
        return model.model_validate({name: value for name, value in given.items() if name in own})
    except ValidationError as error:
        raise first_error(error) from error
