"""SamplingParams: how a request's tokens are drawn; and the limits that each request is held to."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Self

from moebius.errors import RequestError, check_integer, check_number
from moebius.request.structured import StructuredOutput


@dataclass(frozen=True, slots=True)
class Limits:
    """The one table of limits that a request is held to, whichever front door it came by.

    structured_bytes   of a schema, regular expression or grammar, as the client writes it
    grammar_bytes      of what is made of it
    bad_sequences      what bad words become, as token ids; each has at most sequence_tokens
    """

    n: int = 16
    stop: int = 16
    stop_bytes: int = 256
    stop_token_ids: int = 256
    logit_bias: int = 1024
    logprobs: int = 20
    priority: int = 2**31 - 1
    salt_bytes: int = 256
    tools: int = 256
    allowed_token_ids: int = 8192
    bad_words: int = 128
    bad_word_bytes: int = 256
    bad_sequences: int = 512
    sequence_tokens: int = 256
    structured_bytes: int = 2**17
    grammar_bytes: int = 2**20


LIMITS = Limits()
MOST_DRAFTS = 7
"""Drafted tokens of one request that a step verifies at most."""


def check_tokens(ids: Collection[int], vocab_size: int, param: str = "prompt") -> None:
    """RequestError, naming `param`, unless all are token ids of the model."""
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return  # as a rule; a loop over a long prompt would take ten times as long
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            message = f"token id {token!r} is not an integer from 0 to {vocab_size - 1}"
            raise RequestError(message, param=param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Names are the field's; every value is checked here and nowhere else.

    Order of the samplers: logit_bias, penalties, min_tokens and what else bans tokens, temperature,
    top_k, top_p, min_p.
    Log-probabilities are the model's own log-softmax, before any of these.

    n                  sequences drawn for one prompt
    max_tokens         None: up to the context
    min_tokens         no end or stop token before this many
    temperature        0 is greedy (ties to the lowest id)
    top_p              draw from the most likely tokens of this mass; at 0 the most likely alone
    top_k              0 or -1: all
    presence_penalty, frequency_penalty   over the output (OpenAI); repetition_penalty over prompt
                                          and output (CTRL)
    logit_bias         token id -> added to its logit, -100 to 100
    allowed_token_ids  no others are drawn; empty: all may be
    bad_words          texts that are not written, as the tokens that they are encoded in
    structured         what the text is to be: JSON by a schema, a regular expression, ...
    seed               None: drawn when the request is made
    stop               strings, matched in the text by the front door; stop_token_ids by the engine
    ignore_eos         do not end at the model's end tokens
    skip_special_tokens  leave special tokens out of the text; the front door's, as `stop` is
    include_stop_str_in_output   the text ends with the stop string, or the text of the token of
                                 stop_token_ids, that ended it; the front door's, too
    logprobs           None: none; k: at each position the chosen token's and the k likeliest ones'
    prompt_logprobs    the same for the prompt's tokens
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    structured: StructuredOutput | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    plain: bool = field(init=False, default=False, repr=False, compare=False)
    """Greedy and nothing else; worked out once, as every step asks it of every request."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self._made("stop", tuple)
        object.__setattr__(self, "stop", tuple(s for s in stop if s != ""))
        object.__setattr__(self, "stop_token_ids", self._made("stop_token_ids", tuple))
        object.__setattr__(self, "logit_bias", MappingProxyType(self._made("logit_bias", dict)))
        object.__setattr__(self, "allowed_token_ids", self._made("allowed_token_ids", tuple))
        words = self.bad_words
        words = (words,) if isinstance(words, str) else self._made("bad_words", tuple)
        object.__setattr__(self, "bad_words", words)
        self._check_numbers()
        self._check_collections()
        plain = (
            self.greedy and self.logprobs is None and not self.shapes_logits and not self.min_tokens
        )
        object.__setattr__(self, "plain", plain)

    def _made(self, name: str, kind: Callable[..., Any]) -> Any:
        """A field as a tuple or a dictionary of its own; RequestError where it is no such thing."""
        value = getattr(self, name)
        try:
            return kind() if value is None else kind(value)
        except (TypeError, ValueError):
            what = "a mapping" if kind is dict else "a list"
            raise RequestError(f"{name} is {value!r}; it must be {what}", param=name) from None

    def _check_numbers(self) -> None:
        check_integer("n", self.n, 1, LIMITS.n)
        check_integer("max_tokens", self.max_tokens, 0, 2**31 - 1, none=True)
        check_integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; it must not exceed max_tokens = "
                f"{self.max_tokens}",
                param="min_tokens",
            )
        check_number("temperature", self.temperature, 0, 100)
        check_number("top_p", self.top_p, 0, 1)
        check_integer("top_k", self.top_k, -1, 2**31 - 1)
        check_number("min_p", self.min_p, 0, 1)
        check_number("presence_penalty", self.presence_penalty, -2, 2)
        check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        check_number("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        check_integer("seed", self.seed, -(2**63), 2**64 - 1, none=True)
        check_integer("logprobs", self.logprobs, 0, LIMITS.logprobs, none=True)
        check_integer("prompt_logprobs", self.prompt_logprobs, 0, LIMITS.logprobs, none=True)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise RequestError(f"{name} is {value!r}; it must be true or false", param=name)

    def _check_collections(self) -> None:
        for name in ("stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words"):
            size = len(getattr(self, name))
            most = getattr(LIMITS, name)
            if size > most:
                raise RequestError(f"{name} has {size} entries; at most {most}", param=name)
        for string in self.stop:
            _check_text("stop", "a stop string", string, LIMITS.stop_bytes)
        for word in self.bad_words:
            _check_text("bad_words", "a bad word", word, LIMITS.bad_word_bytes, least=1)
        for token in self.allowed_token_ids:
            check_integer("allowed_token_ids", token, 0, 2**31 - 1)
        if not isinstance(self.structured, StructuredOutput | None):
            raise RequestError(
                f"structured is {type(self.structured).__name__}; it must be a StructuredOutput",
                param="structured",
            )
        for token in self.stop_token_ids:
            check_integer("stop_token_ids", token, 0, 2**31 - 1)
        for token, bias in self.logit_bias.items():
            check_integer("logit_bias", token, 0, 2**31 - 1)
            check_number("logit_bias", bias, -100, 100)

    @property
    def greedy(self) -> bool:
        """The most likely token is the only one that can be drawn."""
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    @property
    def shapes_logits(self) -> bool:
        """Bias or penalties come before the draw."""
        return bool(
            self.logit_bias
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
        )

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def _check_text(name: str, what: str, string: object, most: int, least: int = 0) -> None:
    if not isinstance(string, str):
        raise RequestError(
            f"{name} holds {string!r}; it must be a string or a list of strings", param=name
        )
    try:
        size = len(string.encode())
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} holds a lone surrogate; it must be valid Unicode", param=name
        ) from error
    if size > most:
        raise RequestError(f"{what} has {size} bytes; at most {most}", param=name)
    if size < least:
        raise RequestError(f"{what} is empty", param=name)


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """What the loaded model and its cache can serve: requests are checked against it.

    priorities   whether a request may have another priority than 0
    """

    vocab_size: int
    max_model_len: int
    priorities: bool = False


def check_asked(params: SamplingParams, limits: ServingLimits, priority: int = 0) -> None:
    """RequestError where these limits refuse what is asked, whatever the prompt is.

    Worth knowing before the prompt is encoded.
    """
    for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
        for token in getattr(params, name):
            if token >= limits.vocab_size:
                most = limits.vocab_size - 1
                raise RequestError(
                    f"{name} names token id {token}; the model's go from 0 to {most}", param=name
                )
    check_integer("priority", priority, -LIMITS.priority, LIMITS.priority)
    if priority != 0 and not limits.priorities:
        raise RequestError(
            f"priority is {priority}; it must be 0, unless scheduling_policy "
            "(--scheduling-policy) is priority",
            param="priority",
        )
