"""Watches a scheduler from outside and proves it right or wrong, step by step.

The invariants:

I1   a block is either free, or held by requests, or cached and evictable
I2   a reference count equals the references
I3   free and used blocks are all blocks
I4   a cached block or snapshot holds what its hash says
I5   no two requests may write to one block or state
I6   a table has the blocks of its request's tokens; those that a window has passed are empty
I7   an unfinished request has a named reason to go on or to wait
I8   work that is pending makes progress within some steps
I9   the oldest request is not preempted for ever
I10  an admitted request ends once, and its tokens come without gap or repeat
I11  a token depends on no other request: the fake model draws it from its request's own secret
I12  when all is quiet, pool, queue and states equal the start
I13  snapshots are taken where docs/prefix-cache.md says, and nowhere else; each can be found once
     its step was computed; the one of least use is evicted first, and none without need; a hit is
     the longest that there is
I14  what is computed ahead of a plan is what the plan then wants of that request

Counts alone do not see wrong content, so this keeps an oracle: it remembers what was truly written
to each block and to each slot of a state, and computes every expected prefix hash and every
expected token a second time, from the request alone. A state is a hash chained over all tokens, so
that one that starts at a wrong place, or takes a token twice, never comes right again.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, takewhile
from typing import NamedTuple, NoReturn

from moebius.request.finish import FinishReason
from moebius.schedule.blocks import BlockPool
from moebius.schedule.drafts import DraftingScheduler
from moebius.schedule.groups import NO_BLOCK, GroupSpec
from moebius.schedule.request import Request, RequestStatus
from moebius.schedule.scheduler import Chunk, Scheduler, StepPlan
from schedule.ahead_watch import AheadWatch
from schedule.books import check_books
from schedule.snapshot_watch import SnapshotWatch
from schedule.turn_watch import TurnWatch


class Violation(AssertionError):
    """A broken invariant: which, in which run and step, and how to see it again."""

    def __init__(self, invariant: str, message: str, *, seed: int, step: int) -> None:
        super().__init__(
            f"{invariant} violated in step {step} of the episode with seed {seed}: {message} "
            f"(again: PYTHONPATH=tests python -m schedule.simulate --seed {seed} --steps {step})"
        )
        self.invariant = invariant
        self.message = message
        self.seed = seed
        self.step = step

    def __reduce__(self) -> tuple[Callable[..., Violation], tuple[str, str, int, int]]:
        return _violation, (self.invariant, self.message, self.seed, self.step)


def _violation(invariant: str, message: str, seed: int, step: int) -> Violation:
    return Violation(invariant, message, seed=seed, step=step)


def advance(value: int, token: int) -> int:
    """What the fake model's cache holds at a position, from what it holds at the one before and its
    token."""
    return hash((value, token))


def _origin(request: Request) -> int:
    """What the fake model starts from, before the first token."""
    return int.from_bytes(request.asked.salt, "little")


def draw(secret: int, value: int, vocab_size: int) -> int:
    """The fake model's next token after a position whose cache holds `value`, for a request with
    this secret."""
    return hash((secret, value)) % vocab_size


def first_seen(spec: GroupSpec, position: int) -> int:
    """The first position that a row at `position` sees, in a group of layers."""
    return 0 if spec.window is None else max(0, position - spec.window + 1)


@dataclass(slots=True)
class Track:
    """What is known of one unfinished request without asking the scheduler.

    values    values[p] is what the cache must hold at position p: a function of the salt and of
              tokens 0 to p
    hashes    the prefix hashes of its full blocks
    expected  all tokens that it will ever draw, and with what reason it then ends
    start     where its next chunk has to begin; None while it does not run
    blocks    how many blocks it held after the last plan, and what follows that
    """

    request: Request
    secret: int
    values: list[int]
    expected: list[int]
    reason: FinishReason
    hashes: list[bytes] = field(default_factory=list)
    start: int | None = None
    outputs: int = 0
    blocks: int = 0


class Held(NamedTuple):
    """What truly lies in a block or in a slot, and who has written what it derives from."""

    tokens: list[int]
    state: int | None
    writers: frozenset[str]


class Checker:
    """One scheduler's observer. Tell it what happens; it raises Violation as soon as something is
    wrong."""

    def __init__(self, scheduler: Scheduler, key: bytes, vocab_size: int, seed: int) -> None:
        self.scheduler = scheduler
        self.pool: BlockPool = scheduler.pool
        self.vocab_size = vocab_size
        self.seed = seed
        self.step = 0
        self.tracks: dict[str, Track] = {}
        self.ends: dict[str, FinishReason] = {}
        self._key = key
        self._contents: list[list[int]] = [[] for _ in range(self.pool.num_blocks)]
        self._writers: list[frozenset[str]] = [frozenset()] * self.pool.num_blocks
        self._groups = [-1] * self.pool.num_blocks
        slots = self.pool.states.num_places if self.pool.states is not None else 0
        self._states: list[int | None] = [None] * slots
        self._state_writers: list[frozenset[str]] = [frozenset()] * slots
        self._failed: set[str] = set()
        self._truth: dict[bytes, list[int]] = {}
        self._sharers: Counter[bytes] = Counter()
        self._snapshots = SnapshotWatch(self)
        self._turns = TurnWatch(self.broken)
        self.ahead = AheadWatch(scheduler, self.broken)
        # Until when requests wait at most for a prefix that another tier has.
        self.fetching: dict[str, float] = {}

    def broken(self, invariant: str, message: str) -> NoReturn:
        raise Violation(invariant, message, seed=self.seed, step=self.step)

    def admitted(self, request: Request, secret: int) -> None:
        """`add` took the request."""
        if request.id in self.tracks or request.id in self.ends:
            self.broken("I10", f"{request.id} was admitted twice")
        expected, reason = self.solo(request, secret)
        track = Track(request, secret, [], expected, reason, outputs=len(request.output_ids))
        self.tracks[request.id] = track
        self._turns.waits(request)
        self._learn(track)

    def solo(self, request: Request, secret: int) -> tuple[list[int], FinishReason]:
        """The whole output when the request runs alone, by the plainest loop: the answer to compare
        with."""
        value = _origin(request)
        for token in (*request.prompt_ids, *request.output_ids):
            value = advance(value, token)
        output = list(request.output_ids)
        room = self.scheduler.config.max_model_len - len(request.prompt_ids)
        while len(output) < min(request.max_tokens, room):
            output.append(draw(secret, value, self.vocab_size))
            value = advance(value, output[-1])
            if len(output) > request.params.min_tokens and output[-1] in request.stop_ids:
                return output, FinishReason.STOP
        return output, FinishReason.LENGTH

    def planned(self, plan: StepPlan, now: float) -> None:
        """`plan(now)` returned this: budget, order, reasons (I7), progress (I8), victims (I9),
        deadlines."""
        for request_id in plan.expired:
            track = self.tracks.get(request_id)
            if (
                track is None
                or track.request.asked.deadline is None
                or track.request.asked.deadline > now
            ):
                self.broken("I10", f"{request_id} expired without cause")
            self.ended(track.request, FinishReason.DEADLINE)
        for track in self.tracks.values():
            if track.request.asked.deadline is not None and track.request.asked.deadline <= now:
                self.broken("I8", f"{track.request.id} is unfinished after its deadline")
        self.fetching = {name: until for name, until in self.fetching.items() if until > now}
        self._check_victims(plan)
        self._turns.planned(plan)
        self._check_bounds(plan)
        self._check_chunks(plan)
        self._check_reasons(plan)
        self._snapshots.planned(plan)
        self._count_blocks()

    def _count_blocks(self) -> None:
        for track in self.tracks.values():
            request = track.request
            track.blocks = sum(map(len, request.tables)) - sum(request.num_passed)

    def _check_bounds(self, plan: StepPlan) -> None:
        """A step has no more tokens and sequences than it may."""
        config = self.scheduler.config
        if plan.num_tokens > config.max_num_batched_tokens:
            self.broken("budget", f"{plan.num_tokens} tokens of {config.max_num_batched_tokens}")
        running = sum(t.request.status is RequestStatus.RUNNING for t in self.tracks.values())
        if running > config.max_num_seqs or len({c.request_id for c in plan.chunks}) != len(
            plan.chunks
        ):
            self.broken("budget", f"{running} sequences of {config.max_num_seqs}")

    def _check_chunks(self, plan: StepPlan) -> None:
        """Each chunk goes on where the last one ended."""
        config = self.scheduler.config
        for chunk in plan.chunks:
            track = self.tracks.get(chunk.request_id)
            if track is None or track.request.status is not RequestStatus.RUNNING:
                self.broken("I10", f"{chunk.request_id} is computed, but does not run")
            request = track.request
            if request.id in self.fetching:
                self.broken("I7", f"{request.id} is computed, and its prefix is being fetched")
            if track.start is None:
                self._check_hit(request, chunk.start)
            elif chunk.start != track.start:
                self.broken(
                    "I10", f"{request.id} goes on at {chunk.start} instead of {track.start}"
                )
            wanted = request.num_tokens - chunk.start
            if not 1 <= chunk.num_tokens <= wanted or request.num_computed_tokens != chunk.end:
                self.broken("I10", f"{request.id} computes {chunk.num_tokens} of {wanted} tokens")
            source = len(request.asked.prompt_ids) if request.start_ids else 0
            if chunk.start < source and not chunk.start == 0 < source <= chunk.end:
                self.broken("budget", f"the prompt of {request.id} is not read in one step")
            if (
                not config.enable_chunked_prefill
                and chunk.num_tokens < wanted <= config.max_num_batched_tokens
            ):
                self.broken("budget", f"{request.id} was split without chunked prefill")
            if chunk.samples != (
                chunk.num_tokens == wanted and len(request.output_ids) < request.max_tokens
            ):
                self.broken("I10", f"{request.id} samples at the wrong time")
            self._check_tables(chunk, request)
            if chunk.drafts:
                self._check_drafts(chunk, request, plan)
            track.start = chunk.end

    def _check_drafts(self, chunk: Chunk, request: Request, plan: StepPlan) -> None:
        """Drafts stand behind all tokens, never beyond what may be drawn, and get what is left."""
        if self.pool.states is not None:
            self.broken("I4", f"{request.id} has drafts, but a state that cannot be undone")
        if not chunk.samples or chunk.num_tokens > 1:
            self.broken("I10", f"{request.id} has drafts, but does not decode")
        room = self.scheduler.config.max_model_len - request.num_tokens
        left = min(request.max_tokens - len(request.output_ids), room)
        if len(chunk.drafts) >= left:
            self.broken("I10", f"{request.id} has {len(chunk.drafts)} drafts, and {left} to draw")
        assert isinstance(self.scheduler, DraftingScheduler)
        logits = sum(each.samples + len(each.drafts) for each in plan.chunks)
        if logits > self.scheduler.most_rows:
            self.broken("budget", f"{logits} rows with logits of {self.scheduler.most_rows}")
        if "no_budget" in plan.waiting.values() and self.scheduler.config.enable_chunked_prefill:
            wholes = [self.tracks[id].request.source for id in plan.waiting]
            if not any(wholes):
                self.broken("I8", f"{request.id} has drafts, but others wait for budget")

    def _check_tables(self, chunk: Chunk, request: Request) -> None:
        """Each group has the blocks that the chunk reads and writes, and none before its window."""
        size, specs = self.pool.block_size, self.pool.groups.blocks
        if chunk.tables != request.tables or len(chunk.tables) != len(specs):
            self.broken("I6", f"{request.id} is not computed in its own blocks")
        for table, spec in zip(chunk.tables, specs, strict=True):
            end = chunk.end + len(chunk.drafts)
            if len(table) != -(-end // size):
                self.broken("I6", f"{request.id} has {len(table)} blocks for {end} tokens")
            passed = first_seen(spec, chunk.start) // size
            if table.count(NO_BLOCK) != passed:
                self.broken(
                    "I6",
                    f"{request.id} gave back {table.count(NO_BLOCK)} of {passed} blocks before "
                    f"its window of {spec.window}",
                )

    def _check_hit(self, request: Request, start: int) -> None:
        size = self.pool.block_size
        if start % size or start > (request.num_tokens - 1) // size * size:
            self.broken(
                "I5", f"the hit of {request.id} covers {start} of {request.num_tokens} tokens"
            )
        if start and request.start_ids:
            self.broken("I4", f"{request.id} shares what depends on all of another's prompt")
        reads = request.params.prompt_logprobs is None and self.pool.enable_prefix_caching
        if start and not reads:
            self.broken("I10", f"{request.id} read the cache, but may not")
        best = self._longest_hit(self.tracks[request.id]) if reads else 0
        if start < best:
            self.broken("I13", f"the hit of {request.id} covers {start} tokens, but could {best}")

    def _longest_hit(self, track: Track) -> int:
        """By what is cached once the step was planned; more can only have been there before."""
        size, pool = self.pool.block_size, self.pool
        for count in range((track.request.num_tokens - 1) // size, 0, -1):
            if pool.states is None or track.hashes[count - 1] in pool.states.cached[0]:
                needed = (
                    (cached, track.hashes[first_seen(spec, count * size) // size : count])
                    for cached, spec in zip(pool.cached, pool.groups.blocks, strict=True)
                )
                if all(digest in cached for cached, digests in needed for digest in digests):
                    return count * size
        return 0

    def _check_victims(self, plan: StepPlan) -> None:
        """The victims are the last in the order, never the first, and none is preempted without
        need (I9)."""
        if not plan.preempted:
            return
        tracks = [self.tracks.get(request_id) for request_id in plan.preempted]
        victims = [
            track for track in tracks if track and track.request.status is RequestStatus.PREEMPTED
        ]
        if len(victims) != len(tracks):
            self.broken("I9", "a victim is not preempted")
        served = [
            self.tracks[c.request_id].request.order
            for c in plan.chunks
            if c.request_id in self.tracks
        ]
        if not served or min(track.request.order for track in victims) < max(served):
            self.broken("I9", "a victim comes before one that is served")
        stalled = [
            self.tracks[i].request for i, reason in plan.waiting.items() if reason == "no_blocks"
        ]
        still_short = any(request.status is RequestStatus.RUNNING for request in stalled)
        if self.pool.num_free >= victims[-1].blocks and not still_short:
            self.broken("I9", f"{victims[-1].request.id} was preempted without need")
        for track in victims:
            track.start = None
            self._turns.waits(track.request)

    def _check_reasons(self, plan: StepPlan) -> None:
        """Every unfinished request has a chunk or a true reason (I7); the first gets on (I8)."""
        computed = {chunk.request_id for chunk in plan.chunks}
        if self.tracks.keys() != self.scheduler.requests.keys():
            self.broken(
                "I10",
                f"{self.tracks.keys() ^ self.scheduler.requests.keys()} are lost, or not gone",
            )
        if computed & plan.waiting.keys() or computed | plan.waiting.keys() != self.tracks.keys():
            self.broken("I7", "some requests have neither chunk nor reason, or both")
        for_disk = {name for name, why in plan.waiting.items() if why == "prefix_on_disk"}
        if not for_disk <= self.fetching.keys():
            self.broken("I7", f"{for_disk - self.fetching.keys()} wait for what nobody fetches")
        if self.tracks.keys() > for_disk and not computed:
            self.broken(
                "I8", f"nothing is computed for {len(self.tracks)} requests: {dict(plan.waiting)}"
            )
        running = [
            t.request for t in self.tracks.values() if t.request.status is RequestStatus.RUNNING
        ]
        if running and min(running, key=lambda r: r.order).id not in computed:
            self.broken("I8", "the first running request gets nothing")
        for request_id, reason in plan.waiting.items():
            track = self.tracks[request_id]
            if reason == "prefix_in_flight":
                self._check_in_flight(track, plan)
            if reason == "no_seats" and len(running) < self.scheduler.config.max_num_seqs:
                self.broken("I7", f"{request_id} waits for a seat that is there")

    def _check_in_flight(self, waiting: Track, plan: StepPlan) -> None:
        """Some chunk of this plan moves towards a block that the waiting request can use; or, with
        states, does not pass the last one."""
        size = self.pool.block_size
        usable = waiting.hashes[: (waiting.request.num_tokens - 1) // size]
        for chunk in plan.chunks:
            coming = self.tracks[chunk.request_id].hashes
            shared = sum(a == b for a, b in zip(coming, usable, strict=False))
            if shared > chunk.start // size and (
                chunk.states is None
                or shared * size > chunk.end
                or (shared * size == chunk.end and chunk.states.save is not None)
            ):
                return
        self.broken("I7", f"{waiting.request.id} waits for a prefix that nobody computes")

    def computed(self, plan: StepPlan, covered: Collection[str] = ()) -> dict[str, int]:
        """The step ran: read all tables, then write all chunks, but for those of requests that are
        `covered`: these were written before. Returns what the last position of each chunk holds."""
        chunks = [chunk for chunk in plan.chunks if chunk.request_id not in covered]
        for chunk in chunks:
            self._read(chunk)
        self._load_states(chunks)
        self._write_all(chunks)
        self._advance_states(chunks)
        self._save_states(plan)
        return {c.request_id: self.tracks[c.request_id].values[c.end - 1] for c in plan.chunks}

    def computed_ahead(
        self, plan: StepPlan, chunks: Sequence[Chunk], tokens: Mapping[str, int]
    ) -> None:
        """The step behind the plan ran, with its tokens: read and written before they are known."""
        self.ahead.begun(plan, chunks)
        self._snapshots.followed()
        self._count_blocks()
        for chunk in chunks:
            values = self.tracks[chunk.request_id].values
            values.append(advance(values[-1], tokens[chunk.request_id]))
            self._read(chunk)
        self._write_all(chunks)
        for chunk in chunks:
            self.tracks[chunk.request_id].values.pop()
            if chunk.states is not None:
                value = self._states[chunk.states.slot]
                assert value is not None
                self._states[chunk.states.slot] = advance(value, tokens[chunk.request_id])

    def _write_all(self, chunks: Sequence[Chunk]) -> None:
        holders = Counter(
            chain.from_iterable(t for r in self.tracks.values() for t in r.request.tables)
        )
        cached = {block for found in self.pool.cached for block in found.values()}
        for chunk in chunks:
            self._write(chunk, holders, cached)

    def held(self, group: int | None, place: int) -> Held:
        """What a block holds, or, without a group, a slot of states."""
        if group is None:
            return Held([], self._states[place], self._state_writers[place])
        return Held(list(self._contents[place]), None, self._writers[place])

    def landed(self, group: int | None, place: int, held: Held) -> None:
        """This was put into a place by another tier."""
        if group is None:
            self._states[place] = held.state
            self._state_writers[place] = held.writers
        else:
            self._contents[place] = held.tokens
            self._groups[place] = group
            self._writers[place] = held.writers

    def fetched(self) -> None:
        """Pieces came from another tier between two steps, and others went for them."""
        self._snapshots.fetched()
        self.books()

    def _read(self, chunk: Chunk) -> None:
        size, values = self.pool.block_size, self.tracks[chunk.request_id].values
        for group, (table, spec) in enumerate(
            zip(chunk.tables, self.pool.groups.blocks, strict=True)
        ):
            for i in range(first_seen(spec, chunk.start) // size, -(-chunk.start // size)):
                wanted = values[i * size : min((i + 1) * size, chunk.start)]
                found = self._contents[table[i]][: len(wanted)]
                if found != wanted or self._groups[table[i]] != group or table[i] == NO_BLOCK:
                    self.broken(
                        "I4",
                        f"block {table[i]} holds something else than {chunk.request_id} reads",
                    )

    def _write(self, chunk: Chunk, holders: Mapping[int, int], cached: set[int]) -> None:
        size, values = self.pool.block_size, self.tracks[chunk.request_id].values[: chunk.end]
        for draft in chunk.drafts:
            values.append(advance(values[-1], draft))
        first = chunk.start // size
        lineage = frozenset((chunk.request_id,))
        for table in chunk.tables if first else ():
            if table[first - 1] != NO_BLOCK:
                lineage |= self._writers[table[first - 1]]
        if chunk.states is not None:
            lineage |= self._state_writers[chunk.states.slot]
            self._state_writers[chunk.states.slot] = lineage
        for group, table in enumerate(chunk.tables):
            for i, block in enumerate(table[first:], first):
                if holders[block] != 1 or block in cached:
                    self.broken(
                        "I5", f"{chunk.request_id} writes to block {block}, which is shared"
                    )
                self._contents[block] = values[i * size : (i + 1) * size]
                self._groups[block] = group
                self._writers[block] = lineage

    def _load_states(self, chunks: Sequence[Chunk]) -> None:
        """Slots are cleared and snapshots copied in, in whatever order; then each sequence finds
        the state behind its tokens so far."""
        states, writers = self._states, self._state_writers
        for chunk in chunks:
            if (chunk.states is None) != (self.pool.states is None):
                self.broken("I6", f"{chunk.request_id} has no slot for its state, or needs none")
            if chunk.states is not None and not chunk.start:
                states[chunk.states.slot] = _origin(self.tracks[chunk.request_id].request)
                writers[chunk.states.slot] = frozenset()
        for chunk in reversed(chunks):
            if chunk.states is not None and chunk.states.restore is not None:
                states[chunk.states.slot] = states[chunk.states.restore]
                writers[chunk.states.slot] = writers[chunk.states.restore]
        for chunk in chunks:
            if chunk.states is None:
                continue
            track = self.tracks[chunk.request_id]
            truth = track.values[chunk.start - 1] if chunk.start else _origin(track.request)
            if states[chunk.states.slot] != truth:
                self.broken(
                    "I4",
                    f"slot {chunk.states.slot} holds something else than the state of "
                    f"{chunk.request_id} behind {chunk.start} tokens",
                )

    def _advance_states(self, chunks: Sequence[Chunk]) -> None:
        """Each sequence's state takes in the chunk's tokens, one by one."""
        for chunk in chunks:
            if chunk.states is not None:
                value = self._states[chunk.states.slot]
                request = self.tracks[chunk.request_id].request
                for token in request.tokens(chunk.start, chunk.end):
                    value = advance(value, token)
                self._states[chunk.states.slot] = value

    def _save_states(self, plan: StepPlan) -> None:
        """Snapshots are taken."""
        states = self._states
        for chunk in plan.chunks:
            if chunk.states is not None and chunk.states.save is not None:
                if chunk.end % self.pool.block_size:
                    self.broken("I4", f"{chunk.request_id} takes a snapshot inside a block")
                states[chunk.states.save] = states[chunk.states.slot]
                self._state_writers[chunk.states.save] = self._state_writers[chunk.states.slot]

    def rolled_back(self, plan: StepPlan) -> None:
        """The step failed, after `rollback`: whatever it was to write is garbage now."""
        self.ahead.rolled_back(plan)
        size = self.pool.block_size
        for chunk in plan.chunks:
            track = self.tracks.get(chunk.request_id)
            values = track.values if track else []
            first = chunk.start // size
            for table in chunk.tables:
                for i, block in enumerate(table[first:], first):
                    self._contents[block] = values[i * size : chunk.start]
            if chunk.states is not None:
                for slot in (chunk.states.slot, chunk.states.save, *chunk.states.scratch):
                    if slot is not None:
                        self._states[slot] = None
            if track:
                track.start = self._goes_on(track, chunk.start)

    def _goes_on(self, track: Track, position: int) -> int | None:
        """Where a request that was sent back to `position` is to go on: a state cannot be undone,
        and so it waits to start again."""
        if self.pool.states is None:
            return position
        if track.request.status is not RequestStatus.PREEMPTED:
            self.broken("I4", f"{track.request.id} goes on with a state that cannot be undone")
        self._turns.waits(track.request)
        return None

    def updated(
        self, plan: StepPlan, drawn: Mapping[str, Sequence[int]], finished: Sequence[Request]
    ) -> None:
        """`update(plan, drawn)` returned `finished`: tokens come without gap or repeat, and end
        where they should."""
        ended = {request.id: request for request in finished}
        self._snapshots.updated(plan, drawn)
        for chunk in plan.chunks:
            track = self.tracks.get(chunk.request_id)
            if track is None:
                continue
            request = track.request
            got = min(track.outputs + len(drawn.get(request.id, ())), len(track.expected))
            if request.output_ids != track.expected[:got]:
                self.broken(
                    "I10",
                    f"{request.id} has tokens {request.output_ids}, not {track.expected[:got]}",
                )
            if chunk.samples and not drawn.get(request.id):
                track.start = self._goes_on(track, chunk.end - 1)
            elif chunk.drafts:  # all of them that were right, but for the last token drawn
                truth = track.expected[track.outputs : got - 1]
                pairs = zip(chunk.drafts, truth, strict=False)
                alike = list(takewhile(lambda pair: pair[0] == pair[1], pairs))
                track.start = chunk.end + len(alike)
            over = (
                got == len(track.expected) and chunk.end == len(request.prompt_ids) + track.outputs
            )
            if over != (request.id in ended):
                self.broken(
                    "I10",
                    f"{request.id} {'goes on after' if over else 'ends before'} its last token",
                )
            track.outputs = got
            self._learn(track)
        for request in finished:
            if request.id not in self.tracks:
                self.broken("I10", f"{request.id} ends a second time")
            self.ended(request, self.tracks[request.id].reason)

    def ended(self, request: Request, reason: FinishReason) -> None:
        """The request got its terminal event, and it has to be this one."""
        if request.id in self.ends:
            self.broken("I10", f"{request.id} ends with {reason} after {self.ends[request.id]}")
        if request.finish_reason is not reason or not request.finished:
            self.broken(
                "I10", f"{request.id} ends with {request.finish_reason} instead of {reason}"
            )
        held = sum(map(len, request.tables))
        if held or request.states or request.id in self.scheduler.requests:
            self.broken("I12", f"{request.id} is over, but has {held} blocks or is in the books")
        if reason is FinishReason.ERROR:
            self._failed.add(request.id)
            self._snapshots.withdrawn()
        self.ends[request.id] = reason
        self._turns.ended(request)
        del self.tracks[request.id]

    def books(self) -> None:
        """I1 to I6 by recount, I4 by content, and no cached block derives from a request whose
        numbers went wrong."""
        try:
            check_books(self.scheduler, self.ahead.requests)
        except AssertionError as error:
            invariant, _, message = str(error).partition(": ")
            self.broken(invariant, message)
        for group, cached in enumerate(self.pool.cached):
            for digest, block in cached.items():
                if self._truth.get(digest) != self._contents[block]:
                    self.broken("I4", f"block {block} does not hold what its hash says")
                if self._groups[block] != group:
                    self.broken("I4", f"block {block} is found as another group's")
                if self._failed and not self._writers[block].isdisjoint(self._failed):
                    self.broken(
                        "I4", f"block {block} is cached, but derives from a request that failed"
                    )
        if self.pool.states is not None:
            self._check_snapshots(self.pool.states.cached[0])
            self._snapshots.nothing_lost()

    def _check_snapshots(self, cached: Mapping[bytes, int]) -> None:
        for digest, slot in cached.items():
            if not all(digest in blocks for blocks in self.pool.cached):
                self.broken("I13", f"snapshot {slot} outlived the blocks before it")
            if digest not in self._truth or self._truth[digest][-1] != self._states[slot]:
                self.broken("I4", f"snapshot {slot} is not the state that its hash says")
            if self._failed and not self._state_writers[slot].isdisjoint(self._failed):
                self.broken("I4", f"snapshot {slot} derives from a request that failed")

    def quiet(self) -> None:
        """All requests are over: everything equals the start (I12), each had its one event
        (I10)."""
        self.books()
        if self.tracks:
            self.broken("I10", f"{sorted(self.tracks)} never ended")
        states = self.pool.states
        back = states is None or states.num_free == states.num_places
        if not self.scheduler.drained or self.pool.num_free != self.pool.num_blocks or not back:
            self.broken("I12", f"{self.pool.num_used} blocks are held by nobody")

    def _learn(self, track: Track) -> None:
        """Take in the request's new tokens: what the cache has to hold for them, and under which
        hashes."""
        request, values, size = track.request, track.values, self.pool.block_size
        value = values[-1] if values else _origin(request)
        for token in request.tokens(len(values), request.num_tokens):
            value = advance(value, token)
            values.append(value)
        for i in range(len(track.hashes), len(values) // size):
            tokens = struct.pack(f"<{size}I", *request.tokens(i * size, (i + 1) * size))
            parent = track.hashes[-1] if i else self._digest(b"", b"", request.asked.salt)
            track.hashes.append(self._digest(parent, tokens))
            self._truth[track.hashes[-1]] = values[i * size : (i + 1) * size]
            self._sharers[track.hashes[-1]] += 1

    def _digest(self, *parts: bytes) -> bytes:
        digest = blake2b(key=self._key, digest_size=16)
        for part in parts:
            digest.update(struct.pack("<Q", len(part)))
            digest.update(part)
        return digest.digest()
