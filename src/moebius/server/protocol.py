"""The OpenAI request types: what a body may hold, and what it means as SamplingParams.

Every field of a body is one of four: ours (in a model below), harmless (accepted and without
effect), known but not supported (accepted only at its neutral value), or unknown. The last two are
refused by name, unknown ones unless the operator wants them ignored. Null means "not given".
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

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
from moebius.files import package_table
from moebius.schedule.params import LIMITS, SamplingParams
from moebius.text import EncodedPrompt, GenerationDefaults, Tokenizer

_TABLE = package_table("server/fields.toml")
HARMLESS = frozenset(_TABLE["harmless"])
UNSUPPORTED: Mapping[str, list[Any]] = _TABLE["unsupported"]
_INSTEAD: Mapping[str, str] = _TABLE["instead"]
_MESSAGE_TEXTS, _MESSAGE_UNSUPPORTED = _TABLE["message"]["texts"], _TABLE["message"]["unsupported"]
_MESSAGE_FIELDS = frozenset([*_MESSAGE_TEXTS, *_TABLE["message"]["others"]])
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# A text beyond the context is still counted up to so many times its length.
_COUNTED = 4
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
TIMEOUT_HEADER = "X-Request-Timeout"
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")

Prompts = list[str] | list[list[int]]


def _require(condition: bool, message: str, param: str | None = None) -> None:
    if not condition:
        raise RequestError(message, param=param)


def _refuse_unsupported(
    fields: Mapping[str, Any], unsupported: Mapping[str, list[Any]], at: str
) -> None:
    """Raise on the first field that is not supported, and not neutral."""
    for name in fields.keys() & unsupported.keys():
        value = fields[name]
        neutral = any(type(value) is type(no) and value == no for no in unsupported[name])
        instead = _INSTEAD.get(name, "leave it out")
        _require(neutral, f"{at}{name}: this field is not supported here; {instead}", at + name)


def _at_most(name: str) -> BeforeValidator:
    """Counts a collection before each of its values is looked at."""

    def check(value: Any) -> Any:
        size, most = len(value) if isinstance(value, (list, dict)) else 0, getattr(LIMITS, name)
        _require(size <= most, f"{name} has {size} entries; at most {most}", name)
        return value

    return BeforeValidator(check)


def _stop(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _without_nulls(value: Any) -> Any:
    return (
        {name: item for name, item in value.items() if item is not None}
        if isinstance(value, dict)
        else value
    )


def _logit_bias(value: dict[str, float]) -> dict[int, float]:
    for key in value:
        good = re.fullmatch("[0-9]{1,10}", key) is not None
        _require(good, f"logit_bias: the key {key!r} is not a token id", "logit_bias")
    return {int(key): bias for key, bias in value.items()}


def _prompts(value: Any) -> Prompts:
    """A string, a list of strings, a list of token ids, or a list of such lists, as a list of
    prompts."""
    items = [value] if isinstance(value, str) or (value and _are_ids(value)) else value
    texts_or_ids = isinstance(items, list) and (
        all(isinstance(i, str) for i in items) or all(map(_are_ids, items))
    )
    kinds = (
        "a string, a list of strings, a list of token ids, or a list of lists of token ids, not "
        "empty"
    )
    _require(bool(items) and texts_or_ids, f"prompt must be {kinds}", "prompt")
    _require(
        len(items) <= LIMITS.prompts,
        f"prompt holds {len(items)} prompts; at most {LIMITS.prompts}",
        "prompt",
    )
    return items


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _messages(value: Any) -> list[dict[str, Any]]:
    good = (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) for message in value)
    )
    _require(
        good, "messages must be a list of objects with `role` and `content`, not empty", "messages"
    )
    count = len(value)
    _require(
        count <= LIMITS.messages,
        f"messages holds {count} entries; at most {LIMITS.messages}",
        "messages",
    )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Its fields that mean something here. Clients add keys of their own and send back what they
    were sent."""
    given = _without_nulls(message)
    _refuse_unsupported(given, _MESSAGE_UNSUPPORTED, f"{at}.")
    for name in _MESSAGE_TEXTS:
        _require(
            isinstance(given.get(name, ""), str), f"{at}.{name} must be a string", f"{at}.{name}"
        )
    return {name: value for name, value in message.items() if name in _MESSAGE_FIELDS}


class Body(BaseModel):
    """Strict: no value is converted from another type, and every number is finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Body):
    """What both endpoints share. Defaults of sampling fields are the model's or SamplingParams', so
    absent here."""

    id_prefix: ClassVar[str]
    prompt_param: ClassVar[str]
    continues: ClassVar[bool]
    """Whether the answer's text continues the prompt's, rather than standing alone."""

    stream: bool = False
    stream_options: Annotated[StreamOptions | None, BeforeValidator(_without_nulls)] = None
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
    stop: Annotated[list[str], _at_most("stop"), BeforeValidator(_stop)] = Field(
        default_factory=list
    )
    stop_token_ids: Annotated[list[int], _at_most("stop_token_ids")] = Field(default_factory=list)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: Annotated[dict[str, float], AfterValidator(_logit_bias), _at_most("logit_bias")] = (
        Field(default_factory=dict)
    )
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: str = ""
    return_token_ids: bool = False
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
        shown = in_headers[0].strip() if len(in_headers) == 1 else ""
        good = not in_headers or (_SECONDS.fullmatch(shown) is not None and float(shown) > 0)
        _require(
            good,
            f"{TIMEOUT_HEADER} must be one number of seconds above 0, such as 2.5",
            TIMEOUT_HEADER,
        )
        return min(float(shown) if in_headers else math.inf, self.timeout or math.inf)

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
        _require(
            self.stream or self.stream_options is None,
            "stream_options needs stream: true",
            "stream_options",
        )
        scored = self.prompt_logprobs is not None
        _require(
            not (self.stream and scored),
            "prompt_logprobs is not supported with stream: true",
            "prompt_logprobs",
        )
        short = len(self.cache_salt.encode()) <= LIMITS.salt_bytes
        _require(short, f"cache_salt has over {LIMITS.salt_bytes} bytes", "cache_salt")
        _require(
            self.timeout is None or self.timeout > 0,
            "timeout must be a number of seconds above 0",
            "timeout",
        )
        good = self.request_id is None or _REQUEST_ID.fullmatch(self.request_id) is not None
        _require(
            good, "request_id must be 1 to 128 of the characters A-Z a-z 0-9 . _ -", "request_id"
        )

    def _sampling(self, defaults: GenerationDefaults, **endpoint: Any) -> SamplingParams:
        """What the endpoint makes of its own fields, over the client's values, the model's defaults
        and OpenAI's."""
        self._check_together()
        names = self.model_fields_set & SamplingParams.__dataclass_fields__.keys()
        given = {name: getattr(self, name) for name in names}
        return SamplingParams(**{**defaults.sampling, **given, **endpoint})


class CompletionRequest(GenerationRequest):
    id_prefix = "cmpl"
    prompt_param = "prompt"
    continues = True

    prompt: Annotated[Prompts, PlainValidator(_prompts)]
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True

    def encode(self, tokenizer: Tokenizer, most: int) -> list[EncodedPrompt]:
        """The ids of each prompt. ContextExceededError where one has more than `most`."""
        return [EncodedPrompt(self._ids(tokenizer, prompt, most)) for prompt in self.prompt]

    def _ids(self, tokenizer: Tokenizer, prompt: str | list[int], most: int) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, self.add_special_tokens, at_most=most)
        if len(prompt) > most:
            raise ContextExceededError(most, len(prompt))
        return prompt

    def sampling(self, defaults: GenerationDefaults) -> SamplingParams:
        prompt_logprobs = [
            k for k in (self.logprobs if self.echo else None, self.prompt_logprobs) if k is not None
        ]
        scored, length = (
            max(prompt_logprobs, default=None),
            16 if self.max_tokens is None else self.max_tokens,
        )
        return self._sampling(
            defaults, max_tokens=length, logprobs=self.logprobs, prompt_logprobs=scored
        )


class ChatRequest(GenerationRequest):
    id_prefix = "chatcmpl"
    prompt_param = "messages"
    continues = False

    messages: Annotated[list[dict[str, Any]], PlainValidator(_messages)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: str | None = None

    @property
    def length_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the template hears besides the messages. An effort also switches thinking, by the
        names it goes by."""
        effort = self.reasoning_effort
        if effort is None:
            return self.chat_template_kwargs
        thinks = effort != "none"
        effects = {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks}
        return {**effects, **self.chat_template_kwargs}

    def encode(self, tokenizer: Tokenizer, most: int) -> list[EncodedPrompt]:
        """The one prompt that the messages are. ContextExceededError for more than `most` ids."""
        return [tokenizer.chat_prompt(self.messages, self.template_variables, at_most=most)]

    def sampling(self, defaults: GenerationDefaults) -> SamplingParams:
        max_tokens = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        _require(max_tokens != 0, "max_tokens is 0; it must be at least 1", "max_tokens")
        effort = self.reasoning_effort
        known = effort is None or effort in _EFFORTS
        _require(
            known, f"reasoning_effort must be one of {', '.join(_EFFORTS)}", "reasoning_effort"
        )
        top, most = self.top_logprobs or 0, LIMITS.logprobs
        _require(
            self.logprobs or not self.top_logprobs,
            "top_logprobs needs logprobs: true",
            "top_logprobs",
        )
        _require(
            0 <= top <= most,
            f"top_logprobs is {top}; it must be an integer from 0 to {most}",
            "top_logprobs",
        )
        logprobs = top if self.logprobs else None
        return self._sampling(
            defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=self.prompt_logprobs
        )


class TokenizeRequest(Body):
    """Text (`prompt`) or a chat (`messages`) to count; `add_special_tokens` concerns text only."""

    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]] | None, PlainValidator(_messages)] = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def encode(self, tokenizer: Tokenizer, context: int) -> list[int]:
        """The ids, of what has up to _COUNTED times the tokens of the context; ContextLengthError
        beyond."""
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        most = max(context, min(_COUNTED * context, LIMITS.json_values))
        try:
            if self.messages is None:
                return tokenizer.encode(self.prompt or "", self.add_special_tokens, at_most=most)
            return tokenizer.encode_chat(
                self.messages,
                add_generation_prompt=self.add_generation_prompt,
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
    given = _without_nulls(fields)
    own = model.model_fields.keys()
    others: Mapping[str, list[Any]] = UNSUPPORTED if issubclass(model, GenerationRequest) else {}
    harmless = HARMLESS if issubclass(model, GenerationRequest) else frozenset()
    unknown = [
        name for name in given if name not in own and name not in others and name not in harmless
    ]
    if unknown and ignore is None:
        message = (
            f"{unknown[0][:200]}: there is no such field (--unknown-fields warn has the server "
            "ignore such)"
        )
        raise RequestError(message, param=unknown[0])
    if unknown and ignore is not None:
        ignore(unknown)
    given = _without_idle_tools(given)
    _refuse_unsupported(
        {name: value for name, value in given.items() if name not in own}, others, ""
    )
    try:
        return model.model_validate({name: value for name, value in given.items() if name in own})
    except ValidationError as error:
        raise first_error(error) from error


def _without_idle_tools(given: dict[str, Any]) -> dict[str, Any]:
    """Tools that the model is told not to call ask for nothing: they are not shown to it, so that
    it calls none."""
    for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if tools in given and given.get(choice) == "none":
            found = given[tools]
            good = isinstance(found, list) and all(isinstance(tool, dict) for tool in found)
            _require(good, f"{tools} must be a list of objects", tools)
            _require(
                len(found) <= LIMITS.tools,
                f"{tools} has {len(found)} entries; at most {LIMITS.tools}",
                tools,
            )
            given = {name: value for name, value in given.items() if name != tools}
    return given


_MESSAGES = {"missing": "this field is required", "extra_forbidden": "there is no such field"}


def first_error(error: ValidationError) -> RequestError:
    """What is wrong with the first wrong field, and its name."""
    first = error.errors(include_url=False, include_input=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    param = _path(first["loc"])
    message = _MESSAGES.get(first["type"], first["msg"])
    return RequestError(f"{param}: {message}".removeprefix(": "), param=param)


def _path(location: Sequence[int | str]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")
