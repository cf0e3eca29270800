"""Constraints: what the requests of an engine are held to, step by step.

Grammars are compiled on threads beside the engine's. While one is, its request draws no token, and
nobody waits for it: its last position is computed again with the next step. What may be drawn is
found out while a step computes, on another thread, and applied where the tokens are drawn.

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

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par
from torch import Tensor

from moebius.engine.faults import failure
from moebius.engine.follower import CompiledGrammar, Follower
from moebius.engine.restriction import Bits, Restriction
from moebius.engine.sampler import Sampled, sample
from moebius.errors import ConstraintError, MoebiusError
from moebius.ops.sampling import SamplerOps
from moebius.request.constraint import Constraint
from moebius.schedule.request import Request
from moebius.schedule.scheduler import StepPlan
from moebius.text import Tokenizer
from moebius.text.masks import Vocabulary

log = logging.getLogger(__name__)

_CACHED = 32
"""Compiled grammars that are kept; each may hold some tens of MB of states."""
_WAIT_SECONDS = 0.05

Outcome = Sampled | MoebiusError | None
"""A token; why the request ends without one; or nothing yet: its grammar is being compiled."""
_Found = Restriction | MoebiusError | None


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
            raise ConstraintError(
                "this engine has no tokenizer, and takes no grammar", param="structured_outputs"
            )
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer(), self._vocab_size, self._eos_ids)
            vocabulary = self._vocabulary
        return CompiledGrammar(vocabulary.matcher(text), vocabulary.ends)


class Constraints:
    """On the engine's thread: `add` for each request; `fill` and then `draw` in each step.

    threads   that fill masks beside a step
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
        self._filler: ThreadPoolExecutor | None = None
        self._executor: LLExecutor | None = None
        self._filling: Future[dict[str, _Found]] | None = None

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
        self._found()  # of a step that failed
        if not self._followers:
            return
        for request_id in [id for id in self._followers if id not in requests]:
            del self._followers[request_id]
        drawing = [chunk.request_id for chunk in plan.chunks if chunk.samples]
        held = [self._followers[id] for id in drawing if id in self._followers]
        if not held:
            return
        compiling = [each.grammar for each in held if each.grammar and not each.ready]
        if len(compiling) == len(plan.chunks):  # else the step would be made for nothing
            wait(compiling, _WAIT_SECONDS, FIRST_COMPLETED)
        self._filler = self._filler or ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._filling = self._filler.submit(self._fill, held)

    def draw(
        self, logits_LV: Tensor, requests: Sequence[Request], ops: SamplerOps
    ) -> list[Outcome]:
        """A token a row, as `sample`, each held to what its request is."""
        found = self._found()
        if not found:
            return list(sample(logits_LV, requests, ops))
        held = [found.get(request.id, Restriction()) for request in requests]
        restrictions = [each if isinstance(each, Restriction) else None for each in held]
        drawn = sample(logits_LV, requests, ops, restrictions)
        return [
            self._taken(request, outcome) if isinstance(each, Restriction) else each
            for request, each, outcome in zip(requests, held, drawn, strict=True)
        ]

    def close(self) -> None:
        self._grammars.close()
        if self._filler is not None:
            self._filler.shutdown(wait=False)

    def _taken(self, request: Request, outcome: Sampled | MoebiusError) -> Outcome:
        """The same, told to the request's follower."""
        follower = self._followers.get(request.id)
        if follower is None or not isinstance(outcome, Sampled):
            return outcome
        try:
            return outcome._replace(complete=follower.took(outcome.token_id))
        except MoebiusError as error:
            return error
        except Exception as error:
            return failure("following a grammar", error)

    def _found(self) -> dict[str, _Found]:
        """What `fill` has begun to find out; nothing where it had nothing to."""
        filling = self._filling
        self._filling = None
        return {} if filling is None else filling.result()

    def _fill(self, held: Sequence[Follower]) -> dict[str, _Found]:
        """By request, what its next draw is held to."""
        found: dict[str, _Found] = {}
        matching: list[tuple[Follower, LLMatcher]] = []
        for follower in held:
            request_id = follower.request.id
            if not follower.ready:
                found[request_id] = None
                continue
            try:
                matcher = follower.follow()
                if matcher is None:
                    found[request_id] = follower.restriction(None)
                else:
                    matching.append((follower, matcher))
            except Exception as error:
                found[request_id] = _error(error)
        for (follower, _), bits in zip(matching, self._masks(matching), strict=True):
            try:
                follower.check()
                found[follower.request.id] = follower.restriction(bits)
            except Exception as error:
                found[follower.request.id] = _error(error)
        return found

    def _masks(self, matching: Sequence[tuple[Follower, LLMatcher]]) -> Sequence[Bits]:
        """What each matcher takes next; of one in error, anything."""
        if not matching:
            return ()
        masks = np.zeros((len(matching), -(-self._vocab_size // 32)), dtype=np.int32)
        rows = [(matcher, row) for row, (_, matcher) in enumerate(matching)]
        self._executor = self._executor or LLExecutor(num_threads=self._threads)
        fill_next_token_bitmask_par(self._executor, rows, masks)
        return list(masks.view(np.uint32))


def _error(error: Exception) -> MoebiusError:
    return error if isinstance(error, MoebiusError) else failure("following a grammar", error)
