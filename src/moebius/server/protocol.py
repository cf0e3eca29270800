"""The OpenAI request types: what a body may hold, and what it means as SamplingParams.

Every field of a body is one of four: ours (in a model below), harmless (accepted and without effect), known but not
supported (accepted only at its neutral value), or unknown. The last two are refused by name. Null means "not given".
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from moebius.config import package_table
from moebius.errors import RequestError
from moebius.schedule.request import LIMITS, SamplingParams
from moebius.text import GenerationDefaults, Tokenizer

_TABLE = package_table("server/fields.toml")
HARMLESS = frozenset(_TABLE["harmless"])
UNSUPPORTED: Mapping[str, list[Any]] = _TABLE["unsupported"]
_MESSAGE_TEXTS, _MESSAGE_UNSUPPORTED = _TABLE["message"]["texts"], _TABLE["message"]["unsupported"]
_MESSAGE_FIELDS = frozenset([*_MESSAGE_TEXTS, *_TABLE["message"]["others"]])

Prompts = list[str] | list[list[int]]


def _require(condition: bool, message: str, param: str | None = None) -> None:
    if not condition:
        raise RequestError(message, param=param)


def _refuse_fields(fields: Mapping[str, Any], known: Any, unsupported: Mapping[str, list[Any]], at: str) -> None:
    """Raise on the first field that is unknown, or not supported and not neutral."""
    for name, value in fields.items():
        if name not in known:
            _require(name in unsupported, f"{at}{name}: there is no such field", at + name)
            neutral = any(type(value) is type(no) and value == no for no in unsupported[name])
            _require(neutral, f"{at}{name}: this field is not supported here; leave it out", at + name)


def _stop(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _without_nulls(value: Any) -> Any:
    return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


def _logit_bias(value: dict[str, float]) -> dict[int, float]:
    for key in value:
        good = re.fullmatch("[0-9]{1,10}", key) is not None
        _require(good, f"logit_bias: the key {key!r} is not a token id", "logit_bias")
    return {int(key): bias for key, bias in value.items()}


def _prompts(value: Any) -> Prompts:
    """A string, a list of strings, a list of token ids, or a list of such lists, as a list of prompts."""
    items = [value] if isinstance(value, str) or (value and _are_ids(value)) else value
    texts_or_ids = isinstance(items, list) and (all(isinstance(i, str) for i in items) or all(map(_are_ids, items)))
    kinds = "a string, a list of strings, a list of token ids, or a list of lists of token ids, not empty"
    _require(bool(items) and texts_or_ids, f"prompt must be {kinds}", "prompt")
    _require(len(items) <= LIMITS.prompts, f"prompt holds {len(items)} prompts; at most {LIMITS.prompts}", "prompt")
    return items


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _messages(value: Any) -> list[dict[str, Any]]:
    good = isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    _require(good, "messages must be a list of objects with `role` and `content`, not empty", "messages")
    count = len(value)
    _require(count <= LIMITS.messages, f"messages holds {count} entries; at most {LIMITS.messages}", "messages")
    for i, message in enumerate(value):
        fields = _without_nulls(message)
        _refuse_fields(fields, _MESSAGE_FIELDS, _MESSAGE_UNSUPPORTED, f"messages[{i}].")
        for name in _MESSAGE_TEXTS:
            at = f"messages[{i}].{name}"
            _require(isinstance(fields.get(name, ""), str), f"{at} must be a string", at)
    return list(value)


class Body(BaseModel):
    """Strict: no value is converted from another type, and every number is finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Body):
    """What both endpoints share. Defaults of sampling fields are the model's or SamplingParams', so absent here."""

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
    stop: Annotated[list[str], BeforeValidator(_stop)] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    logit_bias: Annotated[dict[str, float], AfterValidator(_logit_bias)] = Field(default_factory=dict)
    prompt_logprobs: int | None = None
    priority: int = 0
    cache_salt: str = ""
    return_token_ids: bool = False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def length_param(self) -> str:
        """What the client calls the most tokens that it wants."""
        return "max_tokens"

    def as_written(self, error: RequestError) -> RequestError:
        """The same error, naming prompt and length as this endpoint's client calls them."""
        if error.param == "max_tokens":
            return RequestError(str(error).replace("max_tokens", self.length_param), param=self.length_param)
        param = self.prompt_param if error.param == "prompt" else error.param
        return RequestError(str(error), param=param, code=error.code)

    def _check_together(self) -> None:
        _require(self.stream or self.stream_options is None, "stream_options needs stream: true", "stream_options")
        scored = self.prompt_logprobs is not None
        _require(not (self.stream and scored), "prompt_logprobs is not supported with stream: true", "prompt_logprobs")
        short = len(self.cache_salt.encode()) <= LIMITS.salt_bytes
        _require(short, f"cache_salt has over {LIMITS.salt_bytes} bytes", "cache_salt")

    def _sampling(self, defaults: GenerationDefaults, **endpoint: Any) -> SamplingParams:
        """What the endpoint makes of its own fields, over the client's values, the model's defaults and OpenAI's."""
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

    def encode(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The ids of each prompt."""
        return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in self.prompt]

    def sampling(self, defaults: GenerationDefaults) -> SamplingParams:
        prompt_logprobs = [k for k in (self.logprobs if self.echo else None, self.prompt_logprobs) if k is not None]
        scored, length = max(prompt_logprobs, default=None), 16 if self.max_tokens is None else self.max_tokens
        return self._sampling(defaults, max_tokens=length, logprobs=self.logprobs, prompt_logprobs=scored)


class ChatRequest(GenerationRequest):
    id_prefix = "chatcmpl"
    prompt_param = "messages"
    continues = False

    messages: Annotated[list[dict[str, Any]], PlainValidator(_messages)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def length_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def encode(self, tokenizer: Tokenizer) -> list[list[int]]:
        """The ids of the one prompt that the messages are."""
        return [tokenizer.encode_chat(self.messages, variables=self.chat_template_kwargs)]

    def sampling(self, defaults: GenerationDefaults) -> SamplingParams:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        _require(max_tokens != 0, "max_tokens is 0; it must be at least 1", "max_tokens")
        top, most = self.top_logprobs or 0, LIMITS.logprobs
        _require(self.logprobs or self.top_logprobs is None, "top_logprobs needs logprobs: true", "top_logprobs")
        _require(0 <= top <= most, f"top_logprobs is {top}; it must be an integer from 0 to {most}", "top_logprobs")
        logprobs = top if self.logprobs else None
        return self._sampling(defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=self.prompt_logprobs)


class TokenizeRequest(Body):
    """Text (`prompt`) or a chat (`messages`) to count; `add_special_tokens` concerns text only."""

    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]] | None, PlainValidator(_messages)] = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class DetokenizeRequest(Body):
    tokens: list[int]


_Model = TypeVar("_Model", bound=Body)


def parse(model: type[_Model], fields: Mapping[str, Any]) -> _Model:
    """A checked record of `model`, or RequestError naming the first field that is wrong."""
    given = _without_nulls(fields)
    generates = issubclass(model, GenerationRequest)
    known = model.model_fields.keys() | (HARMLESS if generates else frozenset())
    _refuse_fields(given, known, UNSUPPORTED if generates else {}, "")
    try:
        return model.model_validate({name: value for name, value in given.items() if name in model.model_fields})
    except ValidationError as error:
        raise first_error(error) from error


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
