"""The OpenAI request types: what a body may hold, and what it means as SamplingParams.

Every field of a body is one of four: ours (in a model below), harmless (accepted and without effect), known but not
supported (accepted only at its neutral value), or unknown. The last two are refused by name. Null means "not given".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import from_json

from moebius.errors import RequestError
from moebius.schedule.request import LIMITS, SamplingParams
from moebius.text import GenerationDefaults

HARMLESS = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)

# Known to OpenAI's or vLLM's API, not supported here: the values that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logit_processors": ([],),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}

# Fields that are SamplingParams' own, by the same name.
_SAMPLING = (
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logit_bias",
)

_MESSAGE_TEXTS = ("name", "tool_call_id", "refusal", "reasoning", "reasoning_content")
_MESSAGE_FIELDS = frozenset({"role", "content", "tool_calls", "annotations", *_MESSAGE_TEXTS})
_MESSAGE_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {"audio": (), "function_call": ()}

Prompts = list[str] | list[list[int]]


def decode_body(body: bytes) -> dict[str, Any]:
    """A body as one JSON object. RequestError on anything else, NaN and Infinity, or nesting beyond the limit."""
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise RequestError("the body must be a JSON object")
    level: list[Any] = [found]
    depth = 0
    while level:
        depth += 1
        if depth > LIMITS.json_depth:
            raise RequestError(f"the body nests deeper than {LIMITS.json_depth} levels")
        inner = (child for value in level for child in (value.values() if isinstance(value, dict) else value))
        level = [child for child in inner if isinstance(child, (dict, list))]
    return found


def _refuse_fields(fields: Mapping[str, Any], known: Any, unsupported: Mapping[str, tuple[Any, ...]], at: str) -> None:
    """Raise on the first field that is unknown, or not supported and not neutral."""
    for name, value in fields.items():
        if name in known:
            continue
        if name not in unsupported:
            raise RequestError(f"{at}{name}: there is no such field", param=at + name)
        if not any(type(value) is type(neutral) and value == neutral for neutral in unsupported[name]):
            raise RequestError(f"{at}{name}: this field is not supported here; leave it out", param=at + name)


def _stop(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _without_nulls(value: Any) -> Any:
    return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


def _logit_bias(value: dict[str, float]) -> dict[int, float]:
    for key in value:
        if not re.fullmatch("[0-9]{1,10}", key):
            raise RequestError(f"logit_bias: the key {key!r} is not a token id", param="logit_bias")
    return {int(key): bias for key, bias in value.items()}


def _prompts(value: Any) -> Prompts:
    """A string, a list of strings, a list of token ids, or a list of such lists, as a list of prompts."""
    items = [value] if isinstance(value, str) else value
    if isinstance(items, list) and items:
        if len(items) <= LIMITS.prompts and all(isinstance(item, str) for item in items):
            return items
        if _are_ids(items):
            return [items]
        if len(items) <= LIMITS.prompts and all(isinstance(item, list) and _are_ids(item) for item in items):
            return items
        if len(items) > LIMITS.prompts and all(isinstance(item, (str, list)) for item in items):
            raise RequestError(f"prompt holds {len(items)} prompts; at most {LIMITS.prompts}", param="prompt")
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids, not empty",
        param="prompt",
    )


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise RequestError("messages must be a list of objects with `role` and `content`, not empty", param="messages")
    if len(value) > LIMITS.messages:
        raise RequestError(f"messages holds {len(value)} entries; at most {LIMITS.messages}", param="messages")
    for i, message in enumerate(value):
        fields = {name: item for name, item in message.items() if item is not None}
        _refuse_fields(fields, _MESSAGE_FIELDS, _MESSAGE_UNSUPPORTED, f"messages[{i}].")
        for name in _MESSAGE_TEXTS:
            if not isinstance(fields.get(name, ""), str):
                raise RequestError(f"messages[{i}].{name} must be a string", param=f"messages[{i}].{name}")
    return value


class _Body(BaseModel):
    """Strict: no value is converted from another type, and every number is finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(_Body):
    """What both endpoints share. Defaults of sampling fields are the model's or SamplingParams', so absent here."""

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

    def _check_together(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs is not supported with stream: true", param="prompt_logprobs")
        if len(self.cache_salt.encode()) > LIMITS.salt_bytes:
            raise RequestError(f"cache_salt has over {LIMITS.salt_bytes} bytes", param="cache_salt")

    def _sampling(self, defaults: GenerationDefaults, **endpoint: Any) -> SamplingParams:
        """The client's values over the model's defaults over OpenAI's."""
        self._check_together()
        given = {name: getattr(self, name) for name in _SAMPLING if name in self.model_fields_set}
        return SamplingParams(**{**defaults.sampling, **given, **endpoint})


class CompletionRequest(GenerationRequest):
    prompt: Annotated[Prompts, PlainValidator(_prompts)]
    echo: bool = False
    logprobs: int | None = None

    def sampling(self, defaults: GenerationDefaults) -> SamplingParams:
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        prompt_logprobs = [k for k in (self.logprobs if self.echo else None, self.prompt_logprobs) if k is not None]
        return self._sampling(
            defaults,
            max_tokens=max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=max(prompt_logprobs, default=None),
        )


class ChatRequest(GenerationRequest):
    messages: Annotated[list[dict[str, Any]], PlainValidator(_messages)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def length_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def sampling(self, defaults: GenerationDefaults) -> SamplingParams:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if max_tokens == 0:
            raise RequestError(f"{self.length_param} is 0; it must be at least 1", param=self.length_param)
        if self.top_logprobs is not None:
            if not self.logprobs:
                raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
            if not 0 <= self.top_logprobs <= LIMITS.logprobs:
                raise RequestError(
                    f"top_logprobs is {self.top_logprobs}; it must be an integer from 0 to {LIMITS.logprobs}",
                    param="top_logprobs",
                )
        try:
            return self._sampling(
                defaults,
                max_tokens=max_tokens,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                prompt_logprobs=self.prompt_logprobs,
            )
        except RequestError as error:
            if error.param == "max_tokens":
                raise RequestError(f"{self.length_param}: {error}", param=self.length_param) from error
            raise


class TokenizeRequest(_Body):
    """Text (`prompt`) or a chat (`messages`) to count; `add_special_tokens` concerns text only."""

    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]] | None, PlainValidator(_messages)] = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class DetokenizeRequest(_Body):
    tokens: list[int]


_Model = TypeVar("_Model", bound=_Body)


def parse(model: type[_Model], fields: Mapping[str, Any]) -> _Model:
    """A checked record of `model`, or RequestError naming the first field that is wrong."""
    given = {name: value for name, value in fields.items() if value is not None}
    generates = issubclass(model, GenerationRequest)
    known = model.model_fields.keys() | (HARMLESS if generates else frozenset())
    _refuse_fields(given, known, UNSUPPORTED if generates else {}, "")
    try:
        return model.model_validate({name: value for name, value in given.items() if name in model.model_fields})
    except ValidationError as error:
        raise _first_error(error) from error


_MESSAGES = {"missing": "this field is required", "extra_forbidden": "there is no such field"}


def _first_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    param = _path(first["loc"])
    message = _MESSAGES.get(first["type"], first["msg"])
    return RequestError(f"{param}: {message}", param=param)


def _path(location: Sequence[int | str]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")
