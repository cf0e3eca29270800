"""Every error that Moebius raises on purpose.

    MoebiusError                     the root; its text is one line a user can act on
    ├── UsageError  (ValueError)     the operator asked for something impossible: exit code 2
    │   ├── ConfigError              an option, a recipe or a model's config.json
    │   ├── WeightsError             a safetensors file: missing, truncated, misshapen or left-over
                                     tensor
    │   ├── TokenizerError           tokenizer.json or chat template missing or broken
    │   └── MemoryPlanError          the model, its cache or its workspace does not fit
    ├── RequestError  (ValueError)   one request is wrong: HTTP 400, names the field in `param`
    │   └── ContextLengthError       prompt (plus max_tokens) beyond what the model or the cache can
                                     hold
    │       └── ContextExceededError the model's context, in the words that clients look for
    ├── OverloadError                refused for now: HTTP 503, `retry_after` seconds
    ├── DeadlineError                a request's or a wait's time ran out: HTTP 503
    ├── NumericalError               NaN or infinite logits end that one request, HTTP 500; such a
                                     loss the training
    ├── StorageError                 a file cannot be written: the disk is full, or not ours
    ├── CacheDataError               bytes that should be a block or state of a cache are damaged,
                                     or another cache's
    └── EngineError                  the engine failed or is gone: HTTP 500

`assert` is for what can only be our own fault; these classes are for everything else.
"""

import math
import traceback
from typing import Any, get_args


class MoebiusError(Exception):
    """Root of all errors raised on purpose."""


class UsageError(MoebiusError, ValueError):
    """The operator's input is wrong. Commands print it as one line and exit with 2."""


class ConfigError(UsageError):
    """An option, a recipe or a model configuration is wrong or unsupported."""


class WeightsError(UsageError):
    """A checkpoint's tensors are not what the configuration needs."""


class TokenizerError(UsageError):
    """The tokenizer or the chat template is missing or broken."""


class MemoryPlanError(UsageError):
    """The plan does not fit into memory."""


class RequestError(MoebiusError, ValueError):
    """One request is wrong.

    `param` names the field as the client wrote it; `code` is OpenAI's machine-readable code, where
    it has one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """The prompt, or prompt plus max_tokens, can never fit."""

    def __init__(self, message: str, *, param: str | None = "prompt") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ContextExceededError(ContextLengthError):
    """More tokens than the model's context has, in the sentences by which clients know OpenAI's
    error.

    context         the model's, in tokens
    prompt_tokens   what the prompt has; with `at_least` it has that many or more, and was not
                    tokenised
    max_tokens      what was asked for beside it; None or 0 where the prompt alone is too long
    param           the field that holds the prompt, as this client calls it
    """

    def __init__(
        self,
        context: int,
        prompt_tokens: int,
        max_tokens: int | None = None,
        *,
        at_least: bool = False,
        param: str = "prompt",
    ) -> None:
        self._facts = context, prompt_tokens, max_tokens, at_least
        some = "at least " if at_least else ""
        if max_tokens:
            asked = (
                f"you requested {some}{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the "
                f"{param}, {max_tokens} in the completion). Please reduce the length of the "
                f"{param} or completion."
            )
        else:
            asked = (
                f"your {param} resulted in {some}{prompt_tokens} tokens. Please reduce the length "
                f"of the {param}."
            )
        super().__init__(
            f"This model's maximum context length is {context} tokens. However, {asked}",
            param=param,
        )

    def named(self, param: str) -> "ContextExceededError":
        """The same, of a prompt that the client sent as `param`."""
        context, prompt_tokens, max_tokens, at_least = self._facts
        return ContextExceededError(
            context, prompt_tokens, max_tokens, at_least=at_least, param=param
        )


class OverloadError(MoebiusError):
    """The queue is full or the server is draining; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(MoebiusError):
    """A deadline passed before the work was done."""


class NumericalError(MoebiusError):
    """The model produced NaN or infinite logits for one request, or training a loss that is no
    number."""


class StorageError(MoebiusError):
    """A file cannot be written. What was there before is as it was."""


class CacheDataError(MoebiusError):
    """Bytes that should be a block or a state of a cache are damaged, or another cache's."""


class EngineError(MoebiusError):
    """The engine failed or has stopped. `error_id` names the failure in the log, where it is there
    already."""

    def __init__(self, message: str, *, error_id: str | None = None) -> None:
        super().__init__(message)
        self.error_id = error_id


def frames(error: BaseException) -> str:
    """What a log says of an exception: its kind and the places it came from, those of its causes
    first.

    It holds none of its words, as these may quote what a request said.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    told = (
        f"{type(each).__name__}\n{''.join(traceback.format_tb(each.__traceback__))}"
        for each in reversed(chain)
    )
    return "".join(told).rstrip()


def require(condition: bool, message: str, error: type[UsageError] = ConfigError) -> None:
    """Raise an error with the message unless the condition holds."""
    if not condition:
        raise error(message)


def require_word(name: str, value: Any, words: Any) -> None:
    """ConfigError where a value is none of the words of a Literal, as `words`."""
    known = get_args(words)
    require(value in known, f"{name} is {value!r}; it must be one of {', '.join(known)}")


def require_seconds(name: str, value: float) -> None:
    """ConfigError where an option is no positive, finite time."""
    require(0 < value < math.inf, f"{name} is {value}; it must be a positive number of seconds")
