"""EngineRequest: one sequence as a front asks for it, and the one constructor that checks it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from moebius.errors import ContextExceededError, RequestError, check_integer, check_number
from moebius.request.constraint import Constraint
from moebius.request.hashes import BlockHasher, PromptHashes
from moebius.request.params import LIMITS, SamplingParams, ServingLimits, check_asked, check_tokens
from moebius.request.share import NOBODY, Share


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What a front asks of an engine: one sequence, never changed. Make it with `create`.

    The front keeps it for as long as it may have to ask again; an engine's `Request` holds it.

    prompt_ids          token ids of the prompt
    stop_ids            token ids that end it (end-of-sequence and stop_token_ids)
    max_tokens          resolved: most tokens to draw
    arrival, deadline   seconds on the engine's monotonic clock
    salt                separates the prefix caches of tenants
    share               whose it is: those that wait take turns
    generation_start    how many leading tokens of the prompt come before the generation prompt, the
                        part that a chat template adds for the answer; None where that is not known
    output_ids          token ids that an earlier engine has drawn
    prompt_hashes       those of the prompt's full blocks, where the front has made them
    constraint          what its tokens are held to beside params, if anything
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
    share: Share = NOBODY
    generation_start: int | None = None
    output_ids: tuple[int, ...] = ()
    prompt_hashes: PromptHashes | None = None
    constraint: Constraint | None = None

    @property
    def order(self) -> tuple[int, float, str]:
        """Lower is served first; the last in it is preempted first."""
        return (self.priority, self.arrival, self.id)

    @property
    def num_tokens(self) -> int:
        """Those that an engine has to hold of it when it takes it."""
        return len(self.prompt_ids) + len(self.output_ids)

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
        share: Share = NOBODY,
        generation_start: int | None = None,
        output_ids: Sequence[int] = (),
        hasher: BlockHasher | None = None,
        constraint: Constraint | None = None,
    ) -> Self:
        """The only way in. Raises RequestError naming the field.

        Everything here is about the prompt and what is asked of it. The choices of one prompt
        differ in id and seed alone: the first is created, the others are its siblings.

        eos_ids: the model's end tokens; those beyond its vocabulary can never be drawn, and are
        left out. hasher: the launch's; without it the engine hashes the prompt.
        """
        prompt = tuple(prompt_ids)
        ends = frozenset() if params.ignore_eos else eos_ids
        room = limits.max_model_len - len(prompt)
        asked = cls(
            id=id,
            prompt_ids=prompt,
            params=params,
            seed=(seed if seed is not None else params.seed or 0) % 2**64,
            stop_ids=frozenset(params.stop_token_ids).union(
                token for token in ends if 0 <= token < limits.vocab_size
            ),
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            arrival=arrival,
            priority=priority,
            deadline=deadline,
            salt=salt,
            share=share,
            generation_start=generation_start,
            output_ids=tuple(output_ids),
            constraint=constraint,
        )
        asked.check(limits)
        if hasher is not None:  # only now: what was refused cannot be hashed
            asked = replace(asked, prompt_hashes=hasher.of_prompt(prompt, salt))
        return asked

    def check(self, limits: ServingLimits) -> None:
        """RequestError where an engine with these limits cannot serve it, naming the field."""
        if not self.prompt_ids:
            raise RequestError(
                "the prompt is empty; it must hold at least one token", param="prompt"
            )
        check_tokens(self.prompt_ids, limits.vocab_size)
        check_tokens(self.output_ids, limits.vocab_size)
        check_tokens(self.stop_ids, limits.vocab_size, "stop_token_ids")
        check_integer("seed", self.seed, 0, 2**64 - 1)
        check_asked(self.params, limits, self.priority)
        check_number("arrival", self.arrival, -sys.float_info.max, sys.float_info.max)
        if self.deadline is not None:
            check_number("deadline", self.deadline, -sys.float_info.max, sys.float_info.max)
        if not isinstance(self.salt, bytes):
            raise RequestError(
                f"cache_salt is {type(self.salt).__name__}; it must be bytes here",
                param="cache_salt",
            )
        if len(self.salt) > LIMITS.salt_bytes:
            raise RequestError(f"cache_salt has over {LIMITS.salt_bytes} bytes", param="cache_salt")
        self.share.check()
        check_integer("generation_start", self.generation_start, 0, len(self.prompt_ids), none=True)
        if self.constraint is not None:
            self.constraint.check(limits.vocab_size)
        room = limits.max_model_len - len(self.prompt_ids)
        unlimited = self.params.max_tokens is None
        if room < (1 if unlimited else self.max_tokens):
            wanted: int | None = self.max_tokens
            if unlimited:
                wanted = 1 if room == 0 else None
            raise ContextExceededError(limits.max_model_len, len(self.prompt_ids), wanted)
        check_integer("max_tokens", self.max_tokens, 0, 2**31 - 1)

    def sibling(self, id: str, seed: int) -> Self:
        """Another choice of the same prompt, nothing of it drawn yet.

        It shares what was checked when this one was created: prompt, parameters, limits and times.
        Its own are id and seed, of which every value is fine.
        """
        return replace(self, id=id, seed=seed % 2**64, output_ids=())


def in_use(request_id: str) -> RequestError:
    """The error of a request whose id an unfinished one has."""
    message = f"request id {request_id!r} is in use; ids must be unique"
    return RequestError(message, param="request_id")
