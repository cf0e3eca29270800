"""Holds what a scheduler does with snapshots of states to the rule in docs/prefix-cache.md (I13),
worked out a second time, from the plans alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moebius.schedule.groups import StateSpec
from moebius.schedule.scheduler import Chunk, StepPlan

if TYPE_CHECKING:
    from schedule.checker import Checker, Track


class SnapshotWatch:
    """What the checker remembers of snapshots from one half of a step to the next.

    known    all that could be found when last looked at
    used     the step in which each was last taken or started from
    first    those that go first: on the way through a text, and nobody has started from them; or a
             sequence that did has a later one, and so on
    unsure   those of which that cannot be told: several requests have the same tokens
    odd      those whose kind cannot be told, for the same reason
    gone_on  those from which a sequence has gone on, or that were taken because several will
    starts   where each running request started
    twins    of a snapshot those around the same answer, or answers
    silent   ids of requests that have read in this step what was withdrawn
    awaited  by waiting requests: where they part from those ahead, and who these are
    """

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self._known: set[bytes] = set()
        self._used: dict[bytes, int] = {}
        self._first: set[bytes] = set()
        self._unsure: set[bytes] = set()
        self._silent: set[str] = set()
        self._awaited: dict[str, tuple[int, set[str]]] = {}
        self._odd: set[bytes] = set()
        self._gone_on: set[bytes] = set()
        self._starts: dict[str, bytes] = {}
        self._twins: dict[bytes, set[bytes]] = {}

    def _found(self) -> Mapping[bytes, int]:
        states = self._checker.pool.states
        return {} if states is None else states.cached[0]

    def planned(self, plan: StepPlan) -> None:
        pool = self._checker.pool
        if pool.states is None:
            return
        for chunk in plan.chunks:
            self._check_boundary(chunk, self._checker.tracks[chunk.request_id], plan)
        self._check_evicted(plan)
        self._check_awaited(plan)
        self._silent.clear()
        for chunk in plan.chunks:
            if not chunk.start:
                self._starts.pop(chunk.request_id, None)
            if chunk.states is not None and chunk.states.restore is not None:
                digest = self._starts[chunk.request_id] = self._digest(chunk, chunk.start)
                self._used[digest] = self._checker.step
                self._first.discard(digest)
                self._unsure.discard(digest)
        self._known = set(self._found())
        for memory in (self._gone_on, self._first, self._unsure, self._odd):
            memory &= self._known
        self._twins = {one: two for one, two in self._twins.items() if one in self._known}

    def _digest(self, chunk: Chunk, position: int) -> bytes:
        count = position // self._checker.pool.block_size
        return self._checker.tracks[chunk.request_id].hashes[count - 1]

    def _due(self, track: Track, spec: StateSpec) -> set[int]:
        """The positions at which the rule wants a snapshot of this request, whoever else is there:
        before the generation prompt, every so many tokens, and behind the last full block."""
        size = self._checker.pool.block_size
        known = track.request.num_tokens
        due = {self._turn(track)}
        due.update(p for p in range(1, known + 1) if p % (size * spec.interval) == 0)
        if known - known % size >= len(track.request.prompt_ids):
            due.add(known - known % size)
        return due - {0}

    def _turn(self, track: Track) -> int:
        """Where the next turn of a chat, or the same prompt, can start."""
        prompt = len(track.request.prompt_ids)
        start = track.request.asked.generation_start
        common = prompt - 1 if start is None else min(start, prompt - 1)
        return common - common % self._checker.pool.block_size

    def _check_boundary(self, chunk: Chunk, track: Track, plan: StepPlan) -> None:
        """A chunk ends where a snapshot is due; one is taken there, if a slot is to be had."""
        checker, pool = self._checker, self._checker.pool
        assert pool.states is not None
        if chunk.states is None:
            checker.broken("I6", f"{chunk.request_id} has no slot for its state")
        request = track.request
        caching = pool.enable_prefix_caching
        due = self._due(track, pool.states.spec)
        passed = {position for position in due if chunk.start < position < chunk.end}
        if passed and caching and checker.scheduler.config.enable_chunked_prefill:
            checker.broken("I13", f"a chunk of {request.id} passes over {passed}: {chunk}")
        whole = chunk.end % pool.block_size == 0
        decoding = whole and chunk.end >= len(request.prompt_ids)
        saves = chunk.states.save is not None
        if saves and not whole:
            checker.broken("I4", f"{request.id} takes a snapshot inside a block")
        spare = checker.scheduler.config.max_num_batched_tokens - plan.num_tokens
        if chunk.end < request.num_tokens and spare and not (whole and caching):
            checker.broken("I13", f"a chunk of {request.id} ends for nothing at {chunk.end}")
        if not whole:
            return
        digest = self._digest(chunk, chunk.end)
        shared = checker._sharers[digest] > 1 or request.num_preemptions > 0
        if saves and not (caching and (chunk.end in due or decoding or shared)):
            checker.broken("I13", f"{request.id} takes a snapshot at {chunk.end} for nobody")
        known = digest in self._known or digest in self._found()
        could = caching and request.publishes and pool.states.num_free and not plan.preempted
        if could and (chunk.end in due or decoding) and not (saves or known):
            checker.broken("I13", f"{request.id} takes no snapshot at {chunk.end}")

    def _check_evicted(self, plan: StepPlan) -> None:
        """What went was of less use than what stayed, and had to go."""
        checker = self._checker
        states = checker.pool.states
        assert states is not None
        found = self._found()
        all_gone = self._known - found.keys()
        gone = {d for d in all_gone if all(d in blocks for blocks in checker.pool.cached)}
        gone -= self._replaced(plan.chunks)
        if not gone:
            return
        if states._free and gone == all_gone and not (plan.preempted or plan.expired):
            checker.broken("I13", "a snapshot was evicted while a slot was free")
        stayed = {d for d in self._known & found.keys() if not states._refs[found[d]]}
        lasting = self._known - self._first - self._unsure
        if stayed & (self._first - self._unsure) and gone & lasting:
            checker.broken("I13", "a snapshot went before one that nobody has started from")
        oldest = min((self._used[d] for d in stayed & lasting), default=checker.step)
        if any(self._used[d] > oldest for d in gone & lasting):
            checker.broken("I13", "a snapshot went before one that was used longer ago")

    def _check_awaited(self, plan: StepPlan) -> None:
        """Who is waited for stops where the waiting one parts from it, if every block counts."""
        pool = self._checker.pool
        assert pool.states is not None
        chunks = {chunk.request_id: chunk for chunk in plan.chunks}
        for name, (end, ahead) in self._awaited.items():
            there = [chunks[one] for one in ahead & chunks.keys()]
            passed = [chunk for chunk in there if chunk.start < end < chunk.end]
            if pool.states.spec.apart == 1 and len(passed) == len(ahead):
                self._checker.broken("I13", f"a chunk passes over {end}, as {name} waits")
        self._awaited.clear()
        waiting = (name for name, why in plan.waiting.items() if why == "prefix_in_flight")
        for name in waiting:
            track = self._checker.tracks[name]
            hashes = track.hashes[: (track.request.num_tokens - 1) // pool.block_size]
            part = {one: self._shared(one, hashes) for one in chunks if one != name}
            end = max(part.values()) * pool.block_size
            ahead = {one for one in part if part[one] * pool.block_size == end}
            if all(chunks[one].end < end for one in ahead):
                self._awaited[name] = (end, ahead)

    def _shared(self, name: str, hashes: Sequence[bytes]) -> int:
        """Blocks that are alike at the beginning."""
        return sum(a == b for a, b in zip(self._checker.tracks[name].hashes, hashes, strict=False))

    def _replaced(self, chunks: Sequence[Chunk]) -> set[bytes]:
        """What was behind the prompts of sequences that take a later snapshot there."""
        replaced: set[bytes] = set()
        for chunk in chunks:
            track = self._checker.tracks.get(chunk.request_id)
            if track is not None and chunk.states is not None and chunk.states.save is not None:
                replaced.update(self._behind_prompt(track, chunk.end))
        return replaced

    def _behind_prompt(self, track: Track, end: int) -> list[bytes]:
        """Hashes of where the last full block of an answer was, before it was at `end`; but for
        the regular ones among them."""
        size = self._checker.pool.block_size
        counts = range(-(-len(track.request.prompt_ids) // size), end // size)
        return [track.hashes[count - 1] for count in counts if not self._regular(count)]

    def _regular(self, count: int) -> bool:
        """Whether there is a snapshot behind so many blocks of everything that is long enough."""
        states = self._checker.pool.states
        return states is not None and count % states.spec.interval == 0

    def updated(self, plan: StepPlan, drawn: Mapping[str, Sequence[int]]) -> None:
        """Snapshots of computed chunks can be found; none but what they replace is gone."""
        checker = self._checker
        if checker.pool.states is None:
            return
        found = self._found()
        replaced = self._replaced(plan.chunks)
        chunks = [chunk for chunk in plan.chunks if chunk.states and chunk.start]
        self._restored = {
            self._starts.get(chunk.request_id)
            for chunk in chunks
            if chunk.states.restore is not None
        }
        if self._known - found.keys() - replaced:
            checker.broken("I13", "a snapshot is gone that nothing has replaced")
        taken = Counter(
            self._digest(chunk, chunk.end)
            for chunk in plan.chunks
            if chunk.states and chunk.states.save is not None and chunk.request_id in checker.tracks
        )
        for chunk in plan.chunks:
            track = checker.tracks.get(chunk.request_id)
            saves = chunk.states is not None and chunk.states.save is not None
            given_up = chunk.samples and not drawn.get(chunk.request_id)
            if track is None or not saves or given_up or chunk.request_id in self._silent:
                continue
            digest = self._digest(chunk, chunk.end)
            if digest not in found and checker._sharers[digest] == 1:
                checker.broken("I13", f"the snapshot of {chunk.request_id} cannot be found")
            self._check_replaced(chunk, track)
            self._note(chunk, track, digest, taken[digest] == 1)
        self._known = set(found)

    def _check_replaced(self, chunk: Chunk, track: Track) -> None:
        """A sequence keeps one snapshot behind its prompt, and not a row of them."""
        size = self._checker.pool.block_size
        regular = self._regular(chunk.end // size)
        if regular or track.request.num_preemptions or track.request.asked.output_ids:
            return
        sharers = self._checker._sharers
        for digest in self._behind_prompt(track, chunk.end):
            if sharers[digest] == 1 and digest in self._found():
                self._checker.broken("I13", f"{track.request.id} keeps a snapshot it has replaced")

    def _note(self, chunk: Chunk, track: Track, digest: bytes, alone: bool) -> None:
        """What a new snapshot is, and what it makes of others. `alone`: no other sequence took the
        same in this step."""
        self._used[digest] = self._checker.step
        self._first.discard(digest)
        self._unsure.discard(digest)
        turn = self._turn(track)
        prompt = len(track.request.prompt_ids)
        start = self._starts.get(chunk.request_id)
        shared = self._checker._sharers[digest] > 1 or track.request.num_preemptions
        regular = self._regular(chunk.end // self._checker.pool.block_size)
        if chunk.end >= prompt and not regular:
            before = track.hashes[turn // self._checker.pool.block_size - 1] if turn else b""
            if before in self._found():
                self._twins.setdefault(digest, set()).add(before)
                self._twins.setdefault(before, set()).add(digest)
        if alone and chunk.end == turn:
            self._go_beyond(start)
        elif alone and chunk.end < prompt and not regular:
            self._gone_on.add(digest)  # there is no other reason for it
        elif shared or not alone:
            touched = {digest, *self._twins.get(start, ())} | ({start} if start else set())
            self._unsure |= touched
            self._odd |= touched
        elif regular:
            self._first.add(digest)

    def _go_beyond(self, start: bytes | None) -> None:
        found = self._found()
        if start not in found or start in self._gone_on:
            return
        self._gone_on.add(start)
        twins = self._twins.get(start, set())
        for digest in {start, *twins} & found.keys():
            owned = digest in self._restored
            certain = start not in self._odd and (digest == start or len(twins) == 1)
            (self._first if certain and not owned else self._unsure).add(digest)

    def fetched(self) -> None:
        """Some came from another tier, and others went for them; of which kind they are cannot be
        told."""
        found = self._found()
        new = found.keys() - self._known
        self._used |= dict.fromkeys(new, self._checker.step)
        self._unsure |= new
        self._odd |= new
        self._known = set(found)

    def followed(self) -> None:
        """What follows a plan took blocks, and what derives from these is gone; nothing else."""
        found = self._found()
        cached = self._checker.pool.cached
        if any(all(one in blocks for blocks in cached) for one in self._known - found.keys()):
            self._checker.broken("I13", "a snapshot went for what follows a plan")
        self._known &= found.keys()

    def withdrawn(self) -> None:
        """A request has failed: what derives from it is gone."""
        self._known &= self._found().keys()
        tracks = self._checker.tracks
        self._silent |= {name for name, track in tracks.items() if not track.request.publishes}

    def nothing_lost(self) -> None:
        """Between the halves of a step none goes, and none comes."""
        if self._known != set(self._found()):
            self._checker.broken("I13", "a snapshot came or went outside of a step")
