"""Follower: one request on its way through what its tokens are held to.

What may be drawn next is a function of the constraint and of the tokens drawn so far. A follower
only remembers how far it has read these; where they have become fewer, as after a step that was
rolled back, it begins again.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from copy import copy, deepcopy
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import fill_next_token_bitmask

from moebius.engine.faults import failure
from moebius.engine.restriction import Bits, Restriction
from moebius.errors import ConstraintError, MoebiusError
from moebius.request.constraint import BudgetWatch, Constraint, Finder, Grammar, completing
from moebius.schedule.request import Request
from moebius.text.grammar import first_line

MOST_SECONDS = 20.0
"""A grammar that is not compiled by then ends its request."""


class CompiledGrammar(NamedTuple):
    """matcher: at its beginning, to be copied; ends: ids that it takes for the end of a text."""

    matcher: LLMatcher
    ends: tuple[int, ...]


Found = Restriction | MoebiusError


class Follower:
    """grammar: the request's, once it is compiled; its error where it cannot be."""

    def __init__(
        self,
        request: Request,
        grammar: "Future[CompiledGrammar] | None",
        eos_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        self.request = request
        self.grammar = grammar
        constraint = request.asked.constraint or Constraint()
        self._constraint = constraint
        self._eos_ids = eos_ids
        self._words = -(-vocab_size // 32)
        self._late = time.monotonic() + MOST_SECONDS
        self._busy = threading.Lock()
        self._found: tuple[int, Found] | None = None
        self._later: tuple[Follower, ...] = ()
        self._begin()

    @property
    def ready(self) -> bool:
        """Its grammar is compiled, or has taken too long to."""
        return self.grammar is None or self.grammar.done() or time.monotonic() > self._late

    @property
    def found(self) -> Found | None:
        """What the next draw is held to, or why there can be none; None: not known yet."""
        known = self._found
        return known[1] if known is not None and known[0] == len(self.request.output_ids) else None

    def find(self, later: Sequence[Request] = ()) -> None:
        """Find that out, unless another thread is about it. May be called from any.

        later: the request as it would be behind each of its drafts, for which it is found out too.
        """
        if self.found is not None or not self.ready or not self._busy.acquire(blocking=False):
            return
        try:
            self._later = ()
            self._found = (len(self.request.output_ids), self._find())
            last = self
            for request in later:
                last = last._copy(request)
                last.find()
                self._later += (last,)
                if not isinstance(
                    last.found, Restriction
                ):  # a draft that the grammar does not take
                    break
        finally:
            self._busy.release()

    def at(self, row: Request) -> "Follower | None":
        """The follower of a row: this one, or that behind the row's drafts; None: not there yet."""
        if row is self.request:
            return self
        ahead = len(row.output_ids) - len(self.request.output_ids)
        later = self._later
        if not 0 < ahead <= len(later):
            return None
        found = later[ahead - 1]
        return found if found.request.output_ids == row.output_ids else None

    def _copy(self, request: Request) -> "Follower":
        """One that has read what this one has, for the request as it would be further on."""
        later = copy(self)
        later.request = request
        later._busy = threading.Lock()
        later._found = None
        later._later = ()
        later._finder = copy(self._finder)
        later._budget = deepcopy(self._budget)
        later._matcher = None if self._matcher is None else self._matcher.deep_copy()
        return later

    def _find(self) -> Found:
        try:
            matcher = self.follow()
            if matcher is None:
                return self.restriction(None)
            mask = self._mask(matcher)
            self.check()
            return self.restriction(mask)
        except MoebiusError as error:
            return error
        except Exception as error:
            return failure("following a grammar", error)

    def _mask(self, matcher: LLMatcher) -> Bits:
        """What the matcher takes next; where it is in error by then, this means nothing."""
        mask = np.zeros((1, self._words), dtype=np.int32)
        fill_next_token_bitmask(matcher, mask)
        allowed: Bits = mask[0].view(np.uint32)
        return allowed

    def _begin(self) -> None:
        constraint = self._constraint
        grammar = constraint.grammar
        self._finder = Finder(() if grammar is None else grammar.after)
        self._budget = None if constraint.budget is None else BudgetWatch(constraint.budget)
        self._matcher: LLMatcher | None = None
        self._read = 0
        self._consumed = 0

    def follow(self) -> LLMatcher | None:
        """Read what was drawn; the matcher, where the next token is the grammar's. Raises
        ConstraintError where the grammar cannot be compiled, or followed."""
        output = self.request.output_ids
        if len(output) < self._read:
            self._begin()
        self._read = max(self._read, len(output))
        grammar = self._constraint.grammar
        if grammar is None:
            return None
        if self._matcher is None:
            start = self._start(grammar, output)
            if start is None:
                return None
            assert self.grammar is not None, "a grammar is compiled before it is followed"
            if not self.grammar.done():
                raise ConstraintError(
                    f"the grammar takes over {MOST_SECONDS:g} s to compile; make it simpler"
                )
            self._matcher = self.grammar.result().matcher.deep_copy()
            self._consumed = start
        self._matcher.consume_tokens(output[self._consumed :])
        self._consumed = len(output)
        self.check()
        return self._matcher

    def check(self) -> None:
        """ConstraintError where the matcher has met one: what it allows then means nothing."""
        if self._matcher is not None and self._matcher.is_error():
            raise ConstraintError(
                f"the grammar cannot be followed any further: "
                f"{first_line(self._matcher.get_error())}"
            )

    def restriction(self, allowed: Bits | None) -> Restriction:
        """Of the next draw. allowed: what the grammar takes next, which is changed."""
        request = self.request
        output = request.output_ids
        forced = None if self._budget is None else self._budget.forced(output)
        if forced is not None:
            return Restriction(self._only((forced,)))
        grammar = self._constraint.grammar
        banned = set(completing(self._constraint.bad_words, output))
        if allowed is not None:
            assert grammar is not None and self.grammar is not None
            _clear(allowed, set(self.grammar.result().ends) - request.stop_ids)
            if not output and grammar.after:
                _set(allowed, grammar.openers)
        elif grammar is not None:
            banned |= self._eos_ids | set(grammar.banned)
        if request.params.allowed_token_ids:
            only = self._only(request.params.allowed_token_ids)
            allowed = only if allowed is None else allowed & only
        return self._with_min_tokens(allowed, banned)

    def took(self, token: int) -> bool:
        """Read a token that was just drawn; whether the grammar takes nothing behind it.

        A token that ends the request is none of the grammar's. Raises as `follow`.
        """
        request = self.request
        self._found = None
        drawn = len(request.output_ids)
        grammar = self._constraint.grammar
        if self._matcher is None or grammar is None:
            return False
        if token in request.stop_ids and drawn + 1 > request.params.min_tokens:
            return False
        self._read = drawn + 1
        if not drawn and grammar.after and token in grammar.openers:
            self._matcher = None
            return False
        self._matcher.consume_token(token)
        self._consumed = drawn + 1
        self.check()
        return self._matcher.is_stopped()

    def _start(self, grammar: Grammar, output: Sequence[int]) -> int | None:
        """How many tokens are drawn before the grammar's first one; None: it is not its turn."""
        if not grammar.after:
            return 0
        if grammar.openers and (not output or output[0] not in grammar.openers):
            return 0
        return self._finder.end_in(output)

    def _with_min_tokens(self, allowed: Bits | None, banned: set[int]) -> Restriction:
        """Below min_tokens a grammar's only ways on may be tokens that would stop the request:
        then these are drawn, and do not stop it. Those that end a text are not among them."""
        request = self.request
        too_short = len(request.output_ids) < request.params.min_tokens
        if allowed is None or not too_short:
            return Restriction(allowed, tuple(banned))
        going_on = allowed.copy()
        _clear(going_on, request.stop_ids | banned)
        if going_on.any():
            return Restriction(allowed, tuple(banned))
        _clear(allowed, self._eos_ids)
        return Restriction(allowed, tuple(banned), shortens=True)

    def _only(self, ids: Iterable[int]) -> Bits:
        bits = np.zeros(self._words, dtype=np.uint32)
        _set(bits, ids)
        return bits


def _set(bits: Bits, ids: Iterable[int]) -> None:
    for token in ids:
        bits[token >> 5] |= np.uint32(1 << (token & 31))


def _clear(bits: Bits, ids: Iterable[int]) -> None:
    for token in ids:
        bits[token >> 5] &= ~np.uint32(1 << (token & 31))
