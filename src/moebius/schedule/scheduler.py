"""What to compute next: plain data in and out, no tensors, no clock, no I/O.

A step is `plan(now)`, then the engine computes the plan's chunks, then `update(plan, tokens)`; or
`rollback(plan)` where the step failed. `add`, `abort` and `fail` may come at any time between two
of these calls.

There is no prefill phase and no decode phase: each request has a counter, `num_computed_tokens`,
that catches up with `num_tokens`, by at most what is left of the step's token budget. Requests are
served in the order (priority, arrival), the running ones first; among those that wait, owners take
turns (schedule/turns.py). Why nobody starves:

- A running request that needs a block takes it from the last running one in the order; the last
  itself waits with what it holds. So the first is never a victim, and always gets what it needs.
- A waiting request starts only when all its tokens fit beside what is promised to the running ones,
  and none behind it, in the order of turns, starts before it does. The one exception is a request
  whose next block is being computed by a running one (`prefix_in_flight`): it waits only in steps
  in which that one moves towards this very block, so at most as many steps as its prompt has
  tokens. Nothing has to wake it: each plan looks anew.
- What could not run in an empty pool was refused by `add`, by the function that allocates.
"""

import heapq
from array import array
from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

from moebius.errors import ContextLengthError
from moebius.request.engine_request import in_use
from moebius.request.finish import FinishReason
from moebius.schedule.blocks import BlockPool
from moebius.schedule.config import SchedulerConfig
from moebius.schedule.groups import GroupSpec, StateSlots
from moebius.schedule.request import Request, RequestStatus
from moebius.schedule.turns import service_order
from moebius.schedule.waiting import WaitingQueue

WaitReason = Literal["no_budget", "no_blocks", "no_seats", "prefix_in_flight", "prefix_on_disk"]
"""Why a request has no chunk: it waits for budget, a block, a seat, or its prefix."""


class Chunk(NamedTuple):
    """Positions start to start + num_tokens - 1 of one request, to be computed in this step.

    samples            the logits of the last position are wanted, to draw the next token
    tables             for each group of layers the blocks of positions 0 to start + num_tokens - 1,
                       in order; NO_BLOCK where none of the chunk's rows sees them
    states             where the sequence's recurrent state is, if the model has one
    drafts             what may follow, to be verified: each is one more row, held by `tables`
    """

    request_id: str
    start: int
    num_tokens: int
    samples: bool
    tables: "tuple[array[int], ...]"
    states: StateSlots | None = None
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what to compute, in the order of service.

    preempted  lost their blocks in favour of earlier ones; they wait again, and will recompute
    expired    their deadline passed: already finished, with FinishReason.DEADLINE
    waiting    request id -> reason, for all other unfinished requests without a chunk
    moved      who has left the queue since the last plan (False), or come back to it (True)
    """

    step: int
    chunks: tuple[Chunk, ...]
    preempted: tuple[str, ...]
    expired: tuple[str, ...]
    waiting: Mapping[str, WaitReason]
    moved: Mapping[str, bool]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens + len(chunk.drafts) for chunk in self.chunks)


@dataclass(slots=True)
class UnfinishedPlan:
    """A step's plan in the making: what is left of its budget, and what was decided so far."""

    now: float
    budget: int
    chunks: dict[str, Chunk] = field(default_factory=dict)
    preempted: list[str] = field(default_factory=list)
    waiting: dict[str, WaitReason] = field(default_factory=dict)


class Scheduler:
    """Decides which tokens of which requests each step computes, and in which blocks.

    Of `config` it reads the bounds of a step and of the queue; max_model_len must be given.
    prefix_queries and prefix_hits count tokens looked up and found in the prefix cache; preemptions
    counts requests; num_deferred is how many the last plan let wait for a prefix in flight.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        assert config.max_model_len is not None, "the context is settled before requests come"
        self.config = config
        self.max_model_len = config.max_model_len
        self.pool = pool
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0
        self.num_deferred = 0
        self._one_table = pool.groups.blocks == (GroupSpec(),)
        self._windowed = pool.groups.windowed
        self._step = 0
        self._pending: int | None = None
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []
        self._waiting = WaitingQueue(config.max_queue_requests, config.max_queue_tokens)
        self._deadlines: list[tuple[float, str]] = []
        self.requests: Mapping[str, Request] = MappingProxyType(self._requests)
        """All unfinished requests by id; read-only."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def drained(self) -> bool:
        """Nothing is left to do and every block is back."""
        return self.pool.idle and not (self._requests or self._running or self._waiting.turns)

    def add(self, request: Request) -> None:
        """Queue a new request.

        RequestError (ContextLengthError) if it could never run, OverloadError if the queue is full;
        nothing is kept of a refused request.
        """
        assert request.status is RequestStatus.WAITING and not request.tables, (
            "a request is added once"
        )
        if request.id in self._requests:
            raise in_use(request.id)
        self._check_can_run(request)
        self._waiting.check_room(request)
        request.block_hashes.clear()  # another pool's key may have made them
        self._waiting.push(request)  # first: should it fail, nothing was kept
        self._requests[request.id] = request
        if request.asked.deadline is not None:
            heapq.heappush(self._deadlines, (request.asked.deadline, request.id))

    def plan(self, now: float) -> StepPlan:
        """Decide the next step; `now` is in seconds on the clock of the requests' deadlines.

        `num_computed_tokens` advances here. A plan with chunks must be updated or rolled back
        before the next.
        """
        assert self._pending is None, "the last step was neither updated nor rolled back"
        self._waiting.backlog.observe(now)
        expired = self._expire(now)
        if self._windowed:  # before anybody is preempted for want of a block
            for request in self._running:
                self.pool.leave(request)
        step = UnfinishedPlan(now, self.config.max_num_batched_tokens)
        self._serve_running(step)
        self.num_deferred = 0
        self._serve_waiting(step)
        chunks = tuple(step.chunks.values())
        self._step += 1
        self._pending = self._step if chunks else None
        moved = self._waiting.take_moved()
        waiting = MappingProxyType(step.waiting)
        return StepPlan(self._step, chunks, tuple(step.preempted), expired, waiting, moved)

    def following(self, plan: StepPlan) -> tuple[Chunk, ...]:
        """Of a plan whose chunks all draw: one more token of each request that has a block for it,
        which is what the next plan will want of it, unless the drawn token ends the request."""
        chunks = []
        for chunk in plan.chunks:
            request = self._requests[chunk.request_id]
            length = chunk.end + 1
            ends = len(request.output_ids) + 1 >= request.max_tokens or length >= self.max_model_len
            if not ends and self.pool.extend(request, length):
                states = chunk.states and chunk.states._replace(restore=None, save=None)
                chunks.append(Chunk(request.id, chunk.end, 1, True, request.tables, states))
        return tuple(chunks)

    def update(self, plan: StepPlan, tokens: Mapping[str, Sequence[int]]) -> list[Request]:
        """Take a computed step's tokens, publish full blocks, stop; the requests that finished.

        `tokens` has 0, 1 or several for each chunk that samples; with none, its last position is
        computed once more. Requests ended since the plan, and tokens beyond a stop, are dropped.
        """
        self._close(plan)
        finished = []
        for chunk in plan.chunks:
            request = self._requests.get(chunk.request_id)
            if request is None or request.status is not RequestStatus.RUNNING:
                continue
            drawn = tokens.get(chunk.request_id, ())
            assert chunk.samples or not drawn, f"{request.id} drew, but its chunk does not sample"
            if chunk.samples and not drawn and not self._rewind(request, chunk.end - 1):
                continue
            self.pool.publish(request, request.num_computed_tokens)
            reason = self._append(request, drawn)
            if reason is not None:
                finished.append(self._finish(request, reason))
        return finished

    def rollback(self, plan: StepPlan) -> None:
        """Forget a failed step: all is computed again, a rewritten state is given up."""
        self._close(plan)
        for chunk in plan.chunks:
            request = self._requests.get(chunk.request_id)
            if request is not None and request.status is RequestStatus.RUNNING:
                self._rewind(request, chunk.start)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> Request | None:
        """End a request in any state, between plan and update too; None if it is not here."""
        request = self._requests.get(request_id)
        return None if request is None else self._finish(request, reason)

    def fail(self, request_id: str) -> Request | None:
        """End a request whose numbers went wrong, and withdraw all that may derive from them.

        Best called before `update`, so that nothing of the failed step is published at all.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self.pool.withdraw(request, self._running)
        return self._finish(request, FinishReason.ERROR)

    def _check_can_run(self, request: Request) -> None:
        config = self.config
        prompt = len(request.prompt_ids)
        if request.num_tokens + (len(request.output_ids) < request.max_tokens) > self.max_model_len:
            raise ContextLengthError(
                f"the request has {request.num_tokens} tokens and max_tokens is "
                f"{request.max_tokens}, but the context is {self.max_model_len}; shorten the "
                "prompt or ask for fewer tokens"
            )
        if not config.enable_chunked_prefill and prompt > config.max_num_batched_tokens:
            raise ContextLengthError(
                f"the prompt has {prompt} tokens, but without chunked prefill at most "
                f"max_num_batched_tokens = {config.max_num_batched_tokens} can be computed; "
                "shorten the prompt or enable chunked prefill"
            )
        if request.source > config.max_num_batched_tokens:
            raise ContextLengthError(
                f"the prompt has {request.source} tokens, which an encoder reads in one step, of "
                f"at most max_num_batched_tokens = {config.max_num_batched_tokens}; shorten the "
                "prompt, or raise --max-num-batched-tokens"
            )
        longest = self._longest(request)
        chunk = config.max_num_batched_tokens
        if not self.pool.fits(longest, chunk):
            raise ContextLengthError(
                f"the prompt has {prompt} tokens and max_tokens is {request.max_tokens}: up to "
                f"{self.pool.most_blocks(longest, chunk)} blocks of {self.pool.block_size} tokens, "
                f"but the KV cache has {self.pool.num_blocks}; shorten the prompt or ask for fewer "
                "tokens"
            )

    def _longest(self, request: Request) -> int:
        """Most of its tokens that will ever be cached: the last one drawn is not computed."""
        prompt = len(request.prompt_ids)
        return max(request.num_tokens, min(prompt + request.max_tokens, self.max_model_len) - 1)

    def _expire(self, now: float) -> tuple[str, ...]:
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            request = self._requests.get(request_id)
            if request is not None and request.asked.deadline == deadline:
                self._finish(request, FinishReason.DEADLINE)
                expired.append(request_id)
        # Where most of them ended before their deadline:
        if len(self._deadlines) > 2 * len(self._requests) + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._requests]
            heapq.heapify(self._deadlines)
        return tuple(expired)

    def _serve_running(self, step: UnfinishedPlan) -> None:
        running = self._running
        position = 0
        while position < len(running):  # preemption shortens the list, from its end
            request = running[position]
            position += 1
            computed = request.num_computed_tokens
            num_tokens = self._grant(request, request.num_tokens - computed, step.budget)
            if self.pool.states is not None and num_tokens > 1:
                num_tokens = self._to_boundary(request, num_tokens)
            if not num_tokens:
                step.waiting[request.id] = "no_budget"
            elif not self._make_room(request, computed + num_tokens, step):
                step.waiting[request.id] = "no_blocks"
            else:
                self._compute(request, num_tokens, step)

    def _make_room(self, request: Request, num_tokens: int, step: UnfinishedPlan) -> bool:
        """Extend the request's tables, if need be at the cost of the last running ones."""
        while not self.pool.extend(request, num_tokens):
            victim = self._running[-1]
            if victim is request:
                return False
            self._preempt(victim)
            step.preempted.append(victim.id)
        return True

    def _preempt(self, victim: Request) -> None:
        self._running.remove(victim)
        self.pool.free(victim)
        victim.status = RequestStatus.PREEMPTED
        victim.num_computed_tokens = 0
        victim.num_preemptions += 1
        self.preemptions += 1
        self._waiting.push(victim)

    def _serve_waiting(self, step: UnfinishedPlan) -> None:
        if not len(self._waiting):
            return
        promised = sum(map(self._promised, self._running))
        for request in self._waiting.turns.in_turn():
            reason = self._admit(request, promised, step)
            if reason in ("prefix_in_flight", "prefix_on_disk"):
                step.waiting[request.id] = reason
                self.num_deferred += 1
            elif reason is not None:
                for other in self._waiting:
                    step.waiting.setdefault(other.id, reason)
                return
            else:
                promised += self._promised(request)

    def _promised(self, request: Request) -> int:
        """Blocks it will soon need: for all its tokens so far, and one a group to go on."""
        pool = self.pool
        soon = min(pool.blocks_for(request.num_tokens) + 1, pool.blocks_for(self._longest(request)))
        if self._one_table:
            return soon - len(request.tables[0])
        size = pool.block_size
        chunk = self.config.max_num_batched_tokens
        chunk = max(1, min(chunk, request.num_tokens - request.num_computed_tokens))
        promised = 0
        for spec, table, passed in zip(
            pool.groups.blocks, request.tables, request.num_passed, strict=True
        ):
            most = spec.most_blocks(soon * size, chunk, size)
            promised += max(0, most - (len(table) - passed))
        return promised

    def _admit(self, request: Request, promised: int, step: UnfinishedPlan) -> WaitReason | None:
        """Start a waiting request and plan its first chunk, or say why not."""
        if step.preempted:
            return "no_blocks"
        if len(self._running) >= self.config.max_num_seqs:
            return "no_seats"
        computing = self.pool.claimant(request)  # with states it is asked to stop for this one
        if not step.budget:
            return "no_budget"
        if computing is not None and computing.id in step.chunks:
            return "prefix_in_flight"
        # At least one new block a group is needed, whatever the cache holds.
        if self.pool.num_free - promised < len(self.pool.groups.blocks):
            return "no_blocks"
        hit = self.pool.match(request)
        hit_tokens = hit.num_blocks * self.pool.block_size
        num_tokens = self._grant(request, request.num_tokens - hit_tokens, step.budget)
        if not num_tokens:
            return "no_budget"
        chunk = self.config.max_num_batched_tokens
        if not self.pool.open(request, hit, chunk, reserved=promised):
            return "no_blocks"
        self._start(request, hit_tokens, step.now)
        num_tokens = self._to_boundary(request, num_tokens)
        grown = self.pool.extend(request, hit_tokens + num_tokens)
        assert grown, "a request was admitted without room"
        self._compute(request, num_tokens, step)
        return None

    def _start(self, request: Request, hit_tokens: int, now: float) -> None:
        self._waiting.start(request, hit_tokens)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = hit_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = hit_tokens
            request.scheduled = now
        if self.pool.enable_prefix_caching and request.params.prompt_logprobs is None:
            self.prefix_queries += request.num_tokens
            self.prefix_hits += hit_tokens
        insort(self._running, request, key=service_order)

    def _grant(self, request: Request, remaining: int, budget: int) -> int:
        """Tokens to compute of those remaining; what an encoder reads of them is not split.

        Without chunked prefill all or none; only what exceeds a whole step's budget, a preempted
        request with a long output, is split.
        """
        whole = not self.config.enable_chunked_prefill
        if whole and budget < remaining <= self.config.max_num_batched_tokens:
            return 0
        unread = request.source - request.num_computed_tokens
        return 0 if budget < unread else min(remaining, budget)

    def _to_boundary(self, request: Request, num_tokens: int) -> int:
        """So many tokens, or fewer: a chunk ends where a snapshot of a state is wanted."""
        snapshots = self.pool.enable_prefix_caching and self.config.enable_chunked_prefill
        if self.pool.states is None or request.states is None or not snapshots:
            return num_tokens
        computed = request.num_computed_tokens
        end = self.pool.states.next_boundary(request.states, computed, request.num_tokens)
        return min(num_tokens, end - computed)

    def _compute(self, request: Request, num_tokens: int, step: UnfinishedPlan) -> None:
        start = request.num_computed_tokens
        end = start + num_tokens
        request.num_computed_tokens = end
        step.budget -= num_tokens
        samples = end == request.num_tokens and len(request.output_ids) < request.max_tokens
        chunk = Chunk(request.id, start, num_tokens, samples, request.tables)  # hundreds a step
        if self.pool.states is not None:
            chunk = chunk._replace(states=self.pool.state_slots(request, end))
        step.chunks[request.id] = chunk

    def _close(self, plan: StepPlan) -> None:
        assert self._pending in (None, plan.step), (
            f"step {self._pending} is under way, not {plan.step}"
        )
        assert self._pending is not None or not plan.chunks, f"step {plan.step} is over"
        self._pending = None

    def _rewind(self, request: Request, num_tokens: int) -> bool:
        """Go back to where `num_tokens` tokens were computed; whether the request still runs.

        A state cannot be undone: its sequence starts again, from the last snapshot.
        """
        if request.states is not None:
            self._preempt(request)
            return False
        request.num_computed_tokens = num_tokens
        self.pool.trim(request, num_tokens)
        return True

    def _append(self, request: Request, drawn: Iterable[int]) -> FinishReason | None:
        """Append tokens up to a stop; whether, and why, the request is finished."""
        output = request.output_ids
        for token in drawn:
            output.append(token)
            if token in request.stop_ids and len(output) > request.params.min_tokens:
                return FinishReason.STOP
            if len(output) >= request.max_tokens or request.num_tokens >= self.max_model_len:
                return FinishReason.LENGTH
        if len(output) >= request.max_tokens and request.num_computed_tokens == request.num_tokens:
            return FinishReason.LENGTH
        return None

    def _finish(self, request: Request, reason: FinishReason) -> Request:
        assert not request.finished, f"request {request.id} ends twice"
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        self._waiting.turns.finished(request)
        self.pool.free(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        del self._requests[request.id]
        return request
