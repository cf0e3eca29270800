"""Constraints: what the requests of an engine are held to, step by step.

Grammars are compiled on threads beside the engine's. What may be drawn is found out while a step
computes, on others, and applied where the tokens are drawn. As a rule both are there in time. Where
one is not, its request draws no token, and nobody waits for it: its last position is computed again
with the next step.

The engine's process has no text otherwise. A grammar is matched here all the same, because a mask
is as wide as the logits: a front in another process would have to send 19 kB a token of a large
vocabulary, and to wait for each token before it could say what may follow. The tokenizer is read
when the first grammar comes.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

from moebius.engine.client import EngineInfo
from moebius.engine.faults import failure
from moebius.engine.follower import CompiledGrammar, Follower, Found
from moebius.engine.restriction import Restriction
from moebius.engine.sampler import Sampled, sample
from moebius.engine.verify import ahead
from moebius.errors import ConstraintError, MoebiusError
from moebius.ops.sampling import SamplerOps
from moebius.request.constraint import Constraint
from moebius.schedule.request import Request
from moebius.schedule.scheduler import StepPlan
from moebius.text import Tokenizer, load_text
from moebius.text.masks import Vocabulary

log = logging.getLogger(__name__)

_CACHED = 32
"""Compiled grammars that are kept; each may hold some tens of MB of states."""
_COMPILING_SECONDS = 0.05
_FINDING_SECONDS = 0.02
"""What a step that is computed waits for masks, most of which were made meanwhile."""
_SLOW = 3
_FREE = Restriction()

Outcome = Sampled | MoebiusError | None
"""A token; why the request ends without one; or nothing yet."""


class Grammars:
    """Compiles grammars on two threads, each once while it is remembered.

    tokenizer   reads the model's; None: an engine without text, which takes no grammar
    """

    def __init__(
        self, tokenizer: Callable[[], Tokenizer] | None, vocab_size: int, eos_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._known: OrderedDict[str, Future[CompiledGrammar]] = OrderedDict()

    def compiled(self, text: str) -> "Future[CompiledGrammar]":
        """On the engine's thread; the error where it cannot be had is the future's."""
        known = self._known.pop(text, None)
        if known is None or (known.done() and known.exception() is not None):
            self._pool = self._pool or ThreadPoolExecutor(2, thread_name_prefix="grammar")
            known = self._pool.submit(self._compile, text)
        self._known[text] = known
        if len(self._known) > _CACHED:
            self._known.popitem(last=False)
        return known

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, text: str) -> CompiledGrammar:
        if self._tokenizer is None:
            raise ConstraintError("this engine has no tokenizer, and takes no grammar")
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer(), self._vocab_size, self._eos_ids)
            vocabulary = self._vocabulary
        return CompiledGrammar(vocabulary.matcher(text), vocabulary.ends)


class Constraints:
    """On the engine's thread: `add` for each request; `fill` and then `draw` in each step.

    threads   that find out beside a step what may be drawn
    """

    def __init__(
        self,
        tokenizer: Callable[[], Tokenizer] | None,
        vocab_size: int,
        eos_ids: frozenset[int],
        threads: int = 1,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._threads = threads
        self._grammars = Grammars(tokenizer, vocab_size, eos_ids)
        self._followers: dict[str, Follower] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._finding: list[Future[None]] = []

    def add(self, request: Request) -> None:
        """Begin to compile its grammar. What is wrong with that, `draw` says."""
        constraint = request.asked.constraint
        if constraint is None and not request.params.allowed_token_ids:
            return
        grammar = (constraint or Constraint()).grammar
        compiled = None if grammar is None else self._grammars.compiled(grammar.text)
        self._followers[request.id] = Follower(request, compiled, self._eos_ids, self._vocab_size)

    def fill(self, plan: StepPlan, requests: Mapping[str, Request]) -> None:
        """Begin to find out what this plan's draws are held to."""
        self._finding = []
        if not self._followers:
            return
        for request_id in [id for id in self._followers if id not in requests]:
            del self._followers[request_id]
        held = [
            (self._followers[chunk.request_id], chunk.drafts)
            for chunk in plan.chunks
            if chunk.samples and chunk.request_id in self._followers
        ]
        if not held:
            return
        compiling = [each.grammar for each, _ in held if each.grammar and not each.ready]
        if len(compiling) == len(plan.chunks):  # else the step would be made for nothing
            wait(compiling, _COMPILING_SECONDS, FIRST_COMPLETED)
        # More threads than work for one step: some masks take longer than many steps.
        self._pool = self._pool or ThreadPoolExecutor(self._threads + _SLOW, "masks")
        for part in range(min(self._threads, len(held))):
            self._finding.append(self._pool.submit(_find, held[part :: self._threads]))

    def draw(
        self, logits_LV: Tensor, requests: Sequence[Request], ops: SamplerOps
    ) -> list[Outcome]:
        """A token a row, as `sample`, each held to what its request is."""
        if not self._finding:
            return list(sample(logits_LV, requests, ops))
        wait(self._finding, _FINDING_SECONDS)
        held = [self._held(request) for request in requests]
        restrictions = [found if isinstance(found, Restriction) else None for _, found in held]
        drawn = sample(logits_LV, requests, ops, restrictions)
        return [
            _taken(follower, outcome) if isinstance(found, Restriction) else found
            for (follower, found), outcome in zip(held, drawn, strict=True)
        ]

    def _held(self, row: Request) -> tuple[Follower | None, Found | None]:
        """Who follows a row, if anybody does, and what it is held to; None: not known yet."""
        follower = self._followers.get(row.id)
        if follower is None:
            return None, _FREE
        follower = follower.at(row)
        return follower, None if follower is None else follower.found

    def close(self) -> None:
        self._grammars.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _find(held: Sequence[tuple[Follower, Sequence[int]]]) -> None:
    """For each of them, and behind each of its drafts."""
    for follower, drafts in held:
        follower.find(ahead(follower.request, drafts)[1:])


def _taken(follower: Follower | None, outcome: Sampled | MoebiusError) -> Outcome:
    """What was drawn, once the follower has read it."""
    if follower is None or not isinstance(outcome, Sampled):
        return outcome
    try:
        return outcome._replace(complete=follower.took(outcome.token_id))
    except MoebiusError as error:
        return error
    except Exception as error:
        return failure("following a grammar", error)


def constraints_of_model(
    directory: Path, info: EngineInfo, threads: int, tokenizer: Callable[[], Tokenizer] | None
) -> Constraints:
    """Of an engine with the model in `directory`, that computes on so many threads.

    tokenizer: reads another one than the model's.
    """
    few = max(1, threads // 4)
    own = tokenizer or (lambda: load_text(directory).tokenizer)
    return Constraints(own, info.limits.vocab_size, info.eos_ids, few)
