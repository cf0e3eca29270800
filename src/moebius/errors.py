"""Every error that Moebius raises on purpose.

    MoebiusError                     the root; its text is one line a user can act on
    ├── UsageError  (ValueError)     the operator asked for something impossible: exit code 2
    │   ├── ConfigError              an option, a recipe or a model's config.json
    │   ├── WeightsError             a tensor that is missing, truncated, misshapen or left over
    │   ├── TokenizerError           tokenizer.json or chat template missing or broken
    │   └── MemoryPlanError          the model, its cache or its workspace does not fit
    ├── RequestError  (ValueError)   one request is wrong: HTTP 400, names the field in `param`
    │   ├── ConstraintError          its grammar, or what else holds its tokens, cannot be followed
    │   └── ContextLengthError       prompt (plus max_tokens) beyond what model or cache can hold
    │       └── ContextExceededError the model's context, in the words that clients look for
    ├── OverloadError                refused for now: HTTP 503, `retry_after` seconds
    ├── DeadlineError                a request's or a wait's time ran out: HTTP 503
    ├── NumericalError               NaN or infinite logits: HTTP 500; in training, such a loss
    ├── StorageError                 a file cannot be written: the disk is full, or not ours
    ├── CacheDataError               bytes that should be a block or state of a cache are damaged,
                                     or another cache's
    └── EngineError                  the engine failed or is gone: HTTP 500
        ├── EngineLostError          the engine is gone, and the request with it
        ├── WireError                a frame between the front and an engine cannot be read
        └── ChannelError             a connection between processes broke, or is refused
            └── ChannelClosedError   the other end has closed it
        └── PeerError                ranks of a group did not come, or are not in step

`assert` is for what can only be our own fault; these classes are for everything else.

Each class has a code that never changes, by which an error crosses from one process to another
(engine/wire.py) and comes back as what it was. A subclass without a code of its own crosses as the
class that it refines.
"""

import math
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, get_args

Fact = str | int | float | bool | None | tuple[int, ...]
"""What an error may hold beside its text, so that it can cross to another process."""

_BY_CODE: dict[str, "type[MoebiusError]"] = {}
ERRORS_BY_CODE: Mapping[str, "type[MoebiusError]"] = MappingProxyType(_BY_CODE)


class MoebiusError(Exception):
    """Root of all errors raised on purpose."""

    wire_code: ClassVar[str] = "moebius"

    def __init_subclass__(cls, *, wire_code: str | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if wire_code is not None:
            assert wire_code not in _BY_CODE, f"two errors have the code {wire_code!r}"
            cls.wire_code = wire_code
            _BY_CODE[wire_code] = cls

    @property
    def facts(self) -> dict[str, Fact]:
        """Its fields: with its text all that `again` needs to make the same error."""
        return {}

    @classmethod
    def again(cls, text: str, facts: Mapping[str, Any]) -> Self:
        """The error that had this text and these facts, whose types are those of `__init__`."""
        return cls(text, **facts)


_BY_CODE[MoebiusError.wire_code] = MoebiusError


class UsageError(MoebiusError, ValueError, wire_code="usage"):
    """The operator's input is wrong. Commands print it as one line and exit with 2."""


class ConfigError(UsageError, wire_code="config"):
    """An option, a recipe or a model configuration is wrong or unsupported."""


class WeightsError(UsageError, wire_code="weights"):
    """A checkpoint's tensors are not what the configuration needs."""


class TokenizerError(UsageError, wire_code="tokenizer"):
    """The tokenizer or the chat template is missing or broken."""


class MemoryPlanError(UsageError, wire_code="memory_plan"):
    """The plan does not fit into memory."""


class RequestError(MoebiusError, ValueError, wire_code="request"):
    """One request is wrong.

    `param` names the field as the client wrote it; `code` is OpenAI's machine-readable code, where
    it has one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    @property
    def facts(self) -> dict[str, Fact]:
        return {"param": self.param, "code": self.code}


class ConstraintError(RequestError, wire_code="constraint"):
    """What a request's tokens are held to cannot be followed, or not any further.

    An engine does not know in which field its grammar came, so that its `param` is None; the front
    names the field (front/constraints.py: named).
    """


class ContextLengthError(RequestError, wire_code="context_length"):
    """The prompt, or prompt plus max_tokens, can never fit."""

    def __init__(self, message: str, *, param: str | None = "prompt") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")

    @property
    def facts(self) -> dict[str, Fact]:
        return {"param": self.param}


class ContextExceededError(ContextLengthError, wire_code="context_exceeded"):
    """More tokens than the model's context has, in the words by which clients know OpenAI's error.

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
        self._facts: dict[str, Fact] = {
            "context": context,
            "prompt_tokens": prompt_tokens,
            "max_tokens": max_tokens,
            "at_least": at_least,
            "param": param,
        }
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

    @property
    def facts(self) -> dict[str, Fact]:
        return self._facts

    @classmethod
    def again(cls, text: str, facts: Mapping[str, Any]) -> Self:
        return cls(**facts)

    def named(self, param: str) -> "ContextExceededError":
        """The same, of a prompt that the client sent as `param`."""
        return ContextExceededError.again("", {**self._facts, "param": param})


class OverloadError(MoebiusError, wire_code="overload"):
    """The queue is full or the server is draining; `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    @property
    def facts(self) -> dict[str, Fact]:
        return {"retry_after": self.retry_after}


class DeadlineError(MoebiusError, wire_code="deadline"):
    """A deadline passed before the work was done."""


class NumericalError(MoebiusError, wire_code="numerical"):
    """NaN or infinite logits for one request, or, in training, a loss that is no number."""


class StorageError(MoebiusError, wire_code="storage"):
    """A file cannot be written. What was there before is as it was."""


class CacheDataError(MoebiusError, wire_code="cache_data"):
    """Bytes that should be a block or a state of a cache are damaged, or another cache's."""


class EngineError(MoebiusError, wire_code="engine"):
    """The engine failed or has stopped; `error_id` names the failure, if the log has it already."""

    def __init__(self, message: str, *, error_id: str | None = None) -> None:
        super().__init__(message)
        self.error_id = error_id

    @property
    def facts(self) -> dict[str, Fact]:
        return {"error_id": self.error_id}


class EngineLostError(EngineError, wire_code="engine_lost"):
    """The engine is gone, and not for this request's sake: another may be asked for the same."""


class WireError(EngineError, wire_code="wire"):
    """A frame between the front and an engine cannot be read: damaged, or of another version."""


class ChannelError(EngineError, wire_code="channel"):
    """A connection between two processes broke, or one of them refuses it."""


class ChannelClosedError(ChannelError, wire_code="channel_closed"):
    """The other end of a connection has closed it."""


class PeerError(EngineError, wire_code="peer"):
    """Ranks of a group did not come in time, have left, or are not in step with this one.

    ranks   which: all that it can be, where the transport does not say; this rank itself, where the
            others have given it up

    The exchange that raised it is over. A step that it ends is rolled back, and made again in the
    group's next epoch.
    """

    def __init__(
        self, message: str, *, ranks: tuple[int, ...], error_id: str | None = None
    ) -> None:
        super().__init__(message, error_id=error_id)
        self.ranks = ranks

    @property
    def facts(self) -> dict[str, Fact]:
        return {"ranks": self.ranks, "error_id": self.error_id}


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


_LONGEST_LINE = 600
_PACKAGE = Path(__file__).parent


def in_one_line(error: BaseException) -> str:
    """What a person is told of an error that ended a command; of one that nobody foresaw, where."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE - 3]}..."
    match error:
        case MoebiusError():
            return text or type(error).__name__
        case OSError(strerror=str(why)):
            return why if error.filename is None else f"{error.filename}: {why}"
        case MemoryError():
            return "out of memory" + (f": {text}" if text else "")
    kind = type(error).__name__
    what = f"{kind}: {text}" if text else kind
    return f"unexpected {what}{_place(error)}; MOEBIUS_TRACEBACK=1 shows how it came to that"


def _place(error: BaseException) -> str:
    """The last line of ours that was running."""
    trace = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in trace if Path(frame.filename).is_relative_to(_PACKAGE)]
    if not ours:
        return ""
    name = Path(ours[-1].filename).relative_to(_PACKAGE.parent)
    return f" (at {name}:{ours[-1].lineno})"


def wants_traceback() -> bool:
    """Whether whoever started this process wants to see where errors come from, too."""
    return os.environ.get("MOEBIUS_TRACEBACK", "0") not in ("", "0")


def require(condition: bool, message: str, error: type[UsageError] = ConfigError) -> None:
    """Raise an error with the message unless the condition holds."""
    if not condition:
        raise error(message)


def require_word(name: str, value: Any, words: Any) -> None:
    """ConfigError where a value is none of the words of a Literal, as `words`."""
    known = get_args(words)
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


def require_seconds(name: str, value: float) -> None:
    """ConfigError where an option is no positive, finite time."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value}; it must be a positive number of seconds")


def check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    """RequestError unless value is a number from low (with open_low: above it) to high.

    low and high are finite, so that neither NaN nor infinity is within; an integer may be beyond
    every float.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        high_enough = low < value if open_low else low <= value
        if high_enough and value <= high:
            return
    bracket = "(" if open_low else "["
    raise RequestError(
        f"{name} is {value!r}; it must be a number in {bracket}{low:g}, {high:g}]", param=name
    )


def check_integer(name: str, value: object, low: int, high: int, *, none: bool = False) -> None:
    """RequestError unless value is an integer from low to high, or None where `none` allows it."""
    if none and value is None:
        return
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return
    raise RequestError(
        f"{name} is {value!r}; it must be an integer from {low} to {high}", param=name
    )
