"""One request: what is asked (SamplingParams), what is computed (Request), and how it is checked.

A Request is one sequence; n = 3 is three of them. It is built from `prompt_ids` and `output_ids`
(not empty after a preemption or on a replay): positions, penalties, min and max tokens are pure
functions of these two lists.
"""

import enum
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Self

from moebius.errors import ContextExceededError, RequestError
from moebius.schedule.groups import Lineage
from moebius.schedule.states import OwnedStates


@dataclass(frozen=True, slots=True)
class Limits:
    """The one table of limits that a request is held to, whichever front door it came by.

    bodies_bytes  the bodies of all requests together that a server has in memory
    json_values   values in one body; json_parts of them may be strings (names included), lists and
                  objects, each of which costs the parser ten times what a number costs
    """

    n: int = 16
    prompts: int = 64
    stop: int = 16
    stop_bytes: int = 256
    stop_token_ids: int = 256
    logit_bias: int = 1024
    logprobs: int = 20
    messages: int = 4096
    tools: int = 256
    body_bytes: int = 8 * 2**20
    bodies_bytes: int = 64 * 2**20
    header_bytes: int = 16 * 2**10
    json_depth: int = 64
    json_values: int = 2**20
    json_parts: int = 2**16
    priority: int = 2**31 - 1
    salt_bytes: int = 256


LIMITS = Limits()


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a sequence ended. The first two are OpenAI's; the others reach clients as errors."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"
    ERROR = "error"


def _check(condition: bool, param: str, message: str) -> None:
    if not condition:
        raise RequestError(message, param=param)


def _check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False
) -> None:
    """low and high are finite, so that neither NaN nor infinity is within; an integer may be beyond
    every float."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    ok = ok and (low < value if open_low else low <= value) and value <= high  # type: ignore[operator]
    bracket = "(" if open_low else "["
    _check(ok, name, f"{name} is {value!r}; it must be a number in {bracket}{low:g}, {high:g}]")


def _check_integer(name: str, value: object, low: int, high: int, *, none: bool = False) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _check(
        ok or (none and value is None),
        name,
        f"{name} is {value!r}; it must be an integer from {low} to {high}",
    )


def _check_tokens(ids: Sequence[int], vocab_size: int) -> None:
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return  # as a rule; a loop over a long prompt would take ten times as long
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            message = f"token id {token!r} is not an integer from 0 to {vocab_size - 1}"
            raise RequestError(message, param="prompt")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Names are the field's; every value is checked here and nowhere else.

    Order of the samplers: logit_bias, penalties, min_tokens, temperature, top_k, top_p, min_p.
    Log-probabilities are the model's own log-softmax, before any of these.

    n                  sequences drawn for one prompt
    max_tokens         None: up to the context
    min_tokens         no end or stop token before this many
    temperature        0 is greedy (ties to the lowest id)
    top_p              draw from the most likely tokens of this mass; 0 leaves the most likely one
                       alone
    top_k              0 or -1: all
    presence_penalty, frequency_penalty   over the output (OpenAI); repetition_penalty over prompt
                                          and output (CTRL)
    logit_bias         token id -> added to its logit, -100 to 100
    seed               None: drawn when the request is made
    stop               strings, matched in the text by the front door; stop_token_ids by the engine
    ignore_eos         do not end at the model's end tokens
    skip_special_tokens  leave special tokens out of the text; the front door's, as `stop` is
    logprobs           None: none; k: the chosen token's and the k most likely ones' at each
                       position
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
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    plain: bool = field(init=False, repr=False, compare=False)
    """Greedy and nothing else: the most likely id is all that is asked for. Every step asks it of
    every request."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", tuple(s for s in stop if s != ""))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias or {})))
        self._check_numbers()
        self._check_collections()
        plain = (
            self.greedy and self.logprobs is None and not self.shapes_logits and not self.min_tokens
        )
        object.__setattr__(self, "plain", plain)

    def _check_numbers(self) -> None:
        _check_integer("n", self.n, 1, LIMITS.n)
        _check_integer("max_tokens", self.max_tokens, 0, 2**31 - 1, none=True)
        _check_integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _check(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"min_tokens is {self.min_tokens}; it must not exceed max_tokens = {self.max_tokens}",
        )
        _check_number("temperature", self.temperature, 0, 100)
        _check_number("top_p", self.top_p, 0, 1)
        _check_integer("top_k", self.top_k, -1, 2**31 - 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_number("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        _check_integer("seed", self.seed, -(2**63), 2**64 - 1, none=True)
        _check_integer("logprobs", self.logprobs, 0, LIMITS.logprobs, none=True)
        _check_integer("prompt_logprobs", self.prompt_logprobs, 0, LIMITS.logprobs, none=True)
        for name in ("ignore_eos", "skip_special_tokens"):
            value = getattr(self, name)
            _check(isinstance(value, bool), name, f"{name} is {value!r}; it must be true or false")

    def _check_collections(self) -> None:
        for name in ("stop", "stop_token_ids", "logit_bias"):
            size = len(getattr(self, name))
            most = getattr(LIMITS, name)
            _check(size <= most, name, f"{name} has {size} entries; at most {most}")
        for s in self.stop:
            _check(
                isinstance(s, str),
                "stop",
                f"stop holds {s!r}; it must be a string or a list of strings",
            )
            try:
                size = len(s.encode())
            except UnicodeEncodeError as error:
                raise RequestError(
                    "stop holds a lone surrogate; it must be valid Unicode", param="stop"
                ) from error
            _check(
                size <= LIMITS.stop_bytes,
                "stop",
                f"a stop string has {size} bytes; at most {LIMITS.stop_bytes}",
            )
        for t in self.stop_token_ids:
            _check_integer("stop_token_ids", t, 0, 2**31 - 1)
        for token, bias in self.logit_bias.items():
            _check_integer("logit_bias", token, 0, 2**31 - 1)
            _check_number("logit_bias", bias, -100, 100)

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


def choice_seed(seed: int, index: int) -> int:
    """The 64-bit seed of choice `index` of a request with `seed`: choices differ, and repeat from
    run to run."""
    data = (seed % 2**64).to_bytes(8, "little") + index.to_bytes(4, "little")
    return int.from_bytes(blake2b(data, digest_size=8, person=b"moebius-choice").digest(), "little")


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """What the loaded model and its cache can serve; the engine publishes it, requests are checked
    against it.

    priorities   whether a request may have another priority than 0
    """

    vocab_size: int
    max_model_len: int
    priorities: bool = False


def check_asked(params: SamplingParams, limits: ServingLimits, priority: int = 0) -> None:
    """RequestError where these limits refuse what is asked, whatever the prompt: worth knowing
    before it is encoded."""
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token in ids:
            message = (
                f"{name} names token id {token}; the model's go from 0 to {limits.vocab_size - 1}"
            )
            _check(token < limits.vocab_size, name, message)
    _check_integer("priority", priority, -LIMITS.priority, LIMITS.priority)
    refused = (
        f"priority is {priority}; it must be 0, unless scheduling_policy (--scheduling-policy) is "
        "priority"
    )
    _check(priority == 0 or limits.priorities, "priority", refused)


def _check_prompt(prompt: Sequence[int], output: Sequence[int], limits: ServingLimits) -> None:
    """RequestError where there is no prompt, or where something in it, or in the output so far, is
    no token."""
    _check(len(prompt) > 0, "prompt", "the prompt is empty; it must hold at least one token")
    _check_tokens(prompt, limits.vocab_size)
    _check_tokens(output, limits.vocab_size)


def _check_salt(salt: bytes) -> None:
    """RequestError for a cache salt of another type, or a longer one than may be."""
    kind = type(salt).__name__
    _check(isinstance(salt, bytes), "cache_salt", f"cache_salt is {kind}; it must be bytes here")
    too_long = f"cache_salt has over {LIMITS.salt_bytes} bytes"
    _check(len(salt) <= LIMITS.salt_bytes, "cache_salt", too_long)


def _check_times(arrival: float, deadline: float | None) -> None:
    _check_number("arrival", arrival, -sys.float_info.max, sys.float_info.max)
    if deadline is not None:
        _check_number("deadline", deadline, -sys.float_info.max, sys.float_info.max)


@dataclass(slots=True, eq=False)
class PromptHashes:
    """Prefix hashes of a prompt's full blocks, worked out once for all its choices by `pool`, with
    its own key."""

    pool: object = None
    hashes: list[bytes] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way through the scheduler. Make it with `Request.create`.

    prompt_ids          token ids of the prompt
    output_ids          token ids drawn so far
    stop_ids            token ids that end it (end-of-sequence and stop_token_ids)
    max_tokens          resolved: most tokens to draw
    arrival, deadline   seconds on the engine's monotonic clock
    salt                separates the prefix caches of tenants
    num_computed_tokens how many leading tokens have their keys and values in the cache (or in this
    step's plan)
    num_cached_tokens   how many of these came from the prefix cache when it was first scheduled
    scheduled           when that was, on the same clock as arrival; a preemption does not change it
    tables              its block tables, one a group of layers, in order of position; replaced,
                        never changed: a plan holds them without a copy
    num_passed          how many leading entries of each table its window has left behind
    states              its slots for recurrent states, while it runs
    request_slot        its place for what is written once a request, while it runs
    lineage             what its blocks derive from
    block_hashes        prefix hashes of its leading full blocks, computed once
    prompt_hashes       those of the prompt, which its siblings share
    num_published_blocks  how many leading blocks were offered to the prefix cache, or came from it
    num_awaited_blocks  while it waits: how many leading blocks were in the cache when last looked
                        at
    publishes           False once a block it reads was withdrawn: what it computes from then on is
                        suspect
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_tokens: int
    arrival: float
    priority: int = 0
    deadline: float | None = None
    salt: bytes = b""
    output_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    scheduled: float | None = None
    num_preemptions: int = 0
    tables: "tuple[array[int], ...]" = ()
    num_passed: list[int] = field(default_factory=list)
    states: OwnedStates | None = None
    request_slot: int | None = None
    lineage: Lineage | None = None
    block_hashes: list[bytes] = field(default_factory=list)
    prompt_hashes: PromptHashes = field(default_factory=PromptHashes)
    num_published_blocks: int = 0
    num_awaited_blocks: int = 0
    publishes: bool = True

    @classmethod
    def create(
        cls,
        id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        limits: ServingLimits,
        *,
        arrival: float,
        eos_ids: frozenset[int] = frozenset(),
        seed: int | None = None,
        priority: int = 0,
        deadline: float | None = None,
        salt: bytes = b"",
        output_ids: Sequence[int] = (),
    ) -> Self:
        """The only way in. Raises RequestError naming the field; nothing is kept of a refused
        request.

        Everything here is about the prompt and what is asked of it. The choices of one prompt
        differ in id and seed alone: the first is created, the others are its siblings.

        eos_ids: the model's end tokens; those beyond its vocabulary can never be drawn, and are
        left out.
        """
        prompt = tuple(prompt_ids)
        _check_prompt(prompt, output_ids, limits)
        check_asked(params, limits, priority)
        _check_times(arrival, deadline)
        _check_salt(salt)
        room = limits.max_model_len - len(prompt)
        wanted = params.max_tokens
        if room < (1 if wanted is None else wanted):
            least = 1 if room == 0 else None
            raise ContextExceededError(
                limits.max_model_len, len(prompt), least if wanted is None else wanted
            )
        ends = frozenset() if params.ignore_eos else eos_ids
        known_ends = frozenset(token for token in ends if 0 <= token < limits.vocab_size)
        fixed_seed = seed if seed is not None else (params.seed or 0)
        return cls(
            id=id,
            prompt_ids=prompt,
            params=params,
            seed=fixed_seed % 2**64,
            stop_ids=known_ends.union(params.stop_token_ids),
            max_tokens=room if wanted is None else wanted,
            arrival=arrival,
            priority=priority,
            deadline=deadline,
            salt=salt,
            output_ids=list(output_ids),
        )

    def sibling(self, id: str, seed: int) -> Self:
        """Another choice of the same prompt, nothing of it computed yet.

        It shares what was checked when this one was created: prompt, parameters, limits and times.
        Its own are id and seed, of which every value is fine.
        """
        return type(self)(
            id=id,
            prompt_ids=self.prompt_ids,
            params=self.params,
            seed=seed % 2**64,
            stop_ids=self.stop_ids,
            max_tokens=self.max_tokens,
            arrival=self.arrival,
            priority=self.priority,
            deadline=self.deadline,
            salt=self.salt,
            prompt_hashes=self.prompt_hashes,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def order(self) -> tuple[int, float, str]:
        """Lower is served first; the last in it is preempted first."""
        return (self.priority, self.arrival, self.id)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions start to stop - 1 of prompt and output together."""
        split = len(self.prompt_ids)
        if start >= split:
            return self.output_ids[start - split : stop - split]
        return [
            *self.prompt_ids[start : min(stop, split)],
            *self.output_ids[: max(stop - split, 0)],
        ]
