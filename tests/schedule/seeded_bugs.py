"""Bugs seeded one at a time into the scheduler and the block pool: the simulation has to find every
one of them. Those of snapshots are in a file of their own.

Each is a subclass with one method done wrong, the way it could be written by mistake.
"""

from __future__ import annotations

from array import array
from dataclasses import replace

from moebius.request.finish import FinishReason
from moebius.schedule.blocks import BlockPool, Hit
from moebius.schedule.groups import NO_BLOCK, CacheGroups, GroupSpec, StateSlots
from moebius.schedule.places import Entry
from moebius.schedule.request import RequestStatus
from moebius.schedule.scheduler import Scheduler
from schedule import (
    seeded_ahead_bugs,
    seeded_draft_bugs,
    seeded_snapshot_bugs,
    seeded_source_bugs,
    seeded_turn_bugs,
)
from schedule.seeding import BUGS, bug

__all__ = [
    "BUGS",
    "seeded_ahead_bugs",
    "seeded_draft_bugs",
    "seeded_snapshot_bugs",
    "seeded_source_bugs",
    "seeded_turn_bugs",
]


def live(hit: Hit) -> list[int]:
    return [block for table in hit.tables for block in table if block != NO_BLOCK]


# ---------------------------------------------------------------------------------------------------- the block pool


@bug("a shared block's reference is forgotten")
class _(BlockPool):
    def open(self, request, hit, chunk, *, reserved=0):
        opened = super().open(request, hit, chunk, reserved=reserved)
        if opened and hit.num_blocks and hit.tables:
            self._refs[hit.tables[0][-1]] -= 1
        return opened


@bug("a shared block stays evictable")
class _(BlockPool):
    def open(self, request, hit, chunk, *, reserved=0):
        idle = [block for block in live(hit) if not self._refs[block]]
        opened = super().open(request, hit, chunk, reserved=reserved)
        if opened:
            self._evictable.update(dict.fromkeys(idle))
        return opened


@bug("a table's last block is never given back")
class _(BlockPool):
    def free(self, request):
        request.tables = tuple(table[:-1] for table in request.tables)
        super().free(request)


@bug("blocks are freed twice")
class _(BlockPool):
    def free(self, request):
        self._release_tables(request.tables)
        super().free(request)


@bug("a private block is freed although another table holds it")
class _(BlockPool):
    def _release(self, blocks):
        for block in blocks:
            if block != NO_BLOCK:
                self._refs[block] = 1
        super()._release(blocks)


@bug("the salt is left out of the hash")
class _(BlockPool):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        digest = self.hasher.digest
        self.hasher.digest = lambda *parts: digest(*(parts[:2] if len(parts) == 3 else parts))


@bug("the hash is not chained")
class _(BlockPool):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        digest = self.hasher.digest
        self.hasher.digest = lambda *parts: digest(
            *(parts if len(parts) == 3 else (bytes(16), parts[1]))
        )


@bug("the hash sees only a block's first token")
class _(BlockPool):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        pack = self.hasher._pack
        self.hasher._pack = lambda *tokens: pack(*([tokens[0]] * len(tokens)))


@bug("a block keeps its hash when it is evicted")
class _(BlockPool):
    def _take(self):
        if self._free:
            return super()._take()
        block, _ = self._evictable.popitem(last=False)
        self._refs[block] = 1
        return block


@bug("a forgotten block can still be found")
class _(BlockPool):
    def _forget(self, block):
        self._entries[block] = None


@bug("a hit covers the last token")
class _(BlockPool):
    def _readable_blocks(self, request):
        return request.num_tokens // self.block_size if super()._readable_blocks(request) else 0


@bug("a hit goes on beyond a gap")
class _(BlockPool):
    def match(self, request):
        hit = super().match(request)
        if len(hit.tables) != 1 or self._windowed or self.states:
            return hit
        limit, cached = self._readable_blocks(request), self._cached[0]
        found = [cached[h] for h in self._hash_blocks(request, limit)[:limit] if h in cached]
        return Hit(len(found), (array("i", found),))


@bug("a request with prompt log-probabilities reads the cache")
class _(BlockPool):
    def _readable_blocks(self, request):
        return (request.num_tokens - 1) // self.block_size if self.enable_prefix_caching else 0


@bug("a partly filled block is published")
class _(BlockPool):
    def publish(self, request, num_tokens):
        known = request.num_tokens // self.block_size * self.block_size
        super().publish(request, min(num_tokens + self.block_size - 1, known))


@bug("a second publisher takes the hash over")
class _(BlockPool):
    def _enter(self, group, digest, place, lineage):
        self._cached[group][digest] = place
        self._entries[place] = Entry(group, digest, lineage)


@bug("what a failed request published stays")
class _(BlockPool):
    def withdraw(self, request, running):
        pass


@bug("what derives from a failed request's blocks stays")
class _(BlockPool):
    def withdraw(self, request, running):
        own = [place for place, entry in enumerate(self._entries) if entry]
        lineages = self.lineages(own)
        self._withdraw({one for one in lineages if one.publisher == request.id})


@bug("requests that read withdrawn blocks go on publishing", "full attention")
class _(BlockPool):
    def withdraw(self, request, running):
        super().withdraw(request, ())


@bug("a failed step's blocks stay in the table")
class _(BlockPool):
    def trim(self, request, num_tokens):
        pass


@bug("a failed step's blocks are freed but stay in the table")
class _(BlockPool):
    def trim(self, request, num_tokens):
        keep = self.blocks_for(num_tokens)
        self._release_tables(tuple(table[keep:] for table in request.tables))


@bug("one block too many for a full last block")
class _(BlockPool):
    def blocks_for(self, num_tokens):
        return num_tokens // self.block_size + 1


@bug("a partly filled block is not counted")
class _(BlockPool):
    def blocks_for(self, num_tokens):
        return max(1, num_tokens // self.block_size)


@bug("claims outlive their request")
class _(BlockPool):
    def _drop_claims(self, request):
        pass


@bug("room is counted twice: shared idle blocks and free blocks")
class _(BlockPool):
    def open(self, request, hit, chunk, *, reserved=0):
        idle = sum(not self._refs[block] for block in live(hit))
        return super().open(request, hit, chunk, reserved=reserved - idle)


# -------------------------------------------------------------------------------------------------- windows and states


@bug("a window gives its blocks back one row too early")
class _(BlockPool):
    def leave(self, request):
        request.num_computed_tokens += self.block_size
        super().leave(request)
        request.num_computed_tokens -= self.block_size


@bug("a window's blocks are kept")
class _(BlockPool):
    def leave(self, request):
        pass


@bug("a window's blocks stay in the table when they are given back")
class _(BlockPool):
    def leave(self, request):
        tables = request.tables
        super().leave(request)
        request.tables = tables


@bug("blocks are given back by where a step will end, not by where it starts")
class _(Scheduler):
    def _compute(self, request, num_tokens, step):
        request.num_computed_tokens += num_tokens
        self.pool.leave(request)
        request.num_computed_tokens -= num_tokens
        super()._compute(request, num_tokens, step)


@bug("a hit asks for a window's last block alone")
class _(BlockPool):
    def match(self, request):
        windowed, self._windowed = self._windowed, [(g, GroupSpec(1)) for g, _ in self._windowed]
        best = super()._resumable(
            self._hash_blocks(request, self._readable_blocks(request)),
            self._readable_blocks(request),
        )
        self._windowed = windowed
        if self._full or self.states or not best:
            return super().match(request)
        hashes = self._hash_blocks(request, best)[:best]
        tables = [[cached.get(digest, 0) for digest in hashes] for cached in self._cached]
        for table, spec in zip(tables, self.groups.blocks, strict=True):
            first = spec.first_block(best * self.block_size, self.block_size)
            table[:first] = [NO_BLOCK] * first
        return Hit(best, tuple(array("i", table) for table in tables))


@bug("what is found for one group is read by another")
class _(BlockPool):
    def _enter(self, group, digest, place, lineage):
        super()._enter(0, digest, place, lineage)
        for cached in self._cached[1:]:
            cached.setdefault(digest, place)


@bug("a window is planned without the step's own tokens")
class _(BlockPool):
    def most_blocks(self, num_tokens, chunk):
        return super().most_blocks(num_tokens, 1)


@bug("a window is planned as if it kept everything", "gpt-oss")
class _(BlockPool):
    def __init__(self, *args, groups, **kwargs):
        super().__init__(*args, groups=groups, **kwargs)
        everything = CacheGroups((GroupSpec(),) * len(groups.blocks), groups.states)
        self.most_blocks = lambda tokens, chunk: everything.most_blocks(  # type: ignore[method-assign]
            tokens, chunk, self.block_size
        )


@bug("the state stays where a failed step left it", "all kinds")
class _(Scheduler):
    def _rewind(self, request, num_tokens):
        request.num_computed_tokens = num_tokens
        self.pool.trim(request, num_tokens)
        return True


@bug("a preempted request goes on from its old slot", "all kinds")
class _(Scheduler):
    def _compute(self, request, num_tokens, step):
        super()._compute(request, num_tokens, step)
        chunk = step.chunks[request.id]
        if chunk.states is not None and request.num_preemptions:
            states = chunk.states._replace(restore=None)
            step.chunks[request.id] = chunk._replace(states=states)


@bug("a hit takes no notice of snapshots", "all kinds")
class _(BlockPool):
    def match(self, request):
        states, self.states = self.states, None
        hit = super().match(request)
        self.states = states
        if states is None or not hit.num_blocks:
            return hit
        digest = self._hash_blocks(request, hit.num_blocks)[hit.num_blocks - 1]
        return hit._replace(snapshot=digest)


@bug("a hit takes any snapshot of the prefix", "all kinds")
class _(BlockPool):
    def match(self, request):
        hit = super().match(request)
        if self.states is None or not hit.num_blocks:
            return hit
        known = request.block_hashes[: hit.num_blocks]
        found = self.states.cached[0]
        return hit._replace(snapshot=next(digest for digest in known if digest in found))


@bug("a snapshot may be taken by another before it was copied", "all kinds")
class _(BlockPool):
    def open(self, request, hit, chunk, *, reserved=0):
        opened = super().open(request, hit, chunk, reserved=reserved)
        if opened and self.states is not None and request.states.restore is not None:
            self.states._release((request.states.restore,))
            request.states.restore = None
            slot = self.states.snapshot(hit.snapshot)
            self.restored = {**getattr(self, "restored", {}), request.id: slot}
        return opened

    def state_slots(self, request, end):
        slots = super().state_slots(request, end)
        if slots is None:
            return None
        restore = getattr(self, "restored", {}).pop(request.id, None)
        return slots._replace(restore=restore)


@bug("a snapshot is published although its step failed", "all kinds")
class _(BlockPool):
    def free(self, request):
        if request.states is not None:
            self.states.settle(request.states, request.lineage)
        super().free(request)


@bug("a snapshot can be found before its step was computed", "all kinds")
class _(BlockPool):
    def state_slots(self, request, end):
        slots = super().state_slots(request, end)
        if slots is not None and slots.save is not None:
            self.states._enter(0, request.states.digest, slots.save, request.lineage)
        return slots


@bug("a snapshot's slot stays owned when its step is over", "all kinds")
class _(BlockPool):
    def publish(self, request, num_tokens):
        own = request.states
        if own is not None and own.save is not None and request.publishes:
            self.states._enter(0, own.digest, own.save, request.lineage)
            own.save = None
        super().publish(request, num_tokens)


@bug("a sequence's slots are not given back", "all kinds")
class _(BlockPool):
    def free(self, request):
        request.states = None
        super().free(request)


@bug("scratch slots are not given back", "all kinds")
class _(BlockPool):
    def free(self, request):
        if request.states is not None:
            request.states.scratch = ()
        super().free(request)


@bug("two sequences share a slot", "all kinds")
class _(BlockPool):
    def state_slots(self, request, end):
        slots = super().state_slots(request, end)
        return slots and StateSlots(0, slots.scratch, slots.restore, slots.save)


@bug("snapshots of a failed request stay", "all kinds")
class _(BlockPool):
    def withdraw(self, request, running):
        states, self.states = self.states, None
        super().withdraw(request, running)
        self.states = states


# ----------------------------------------------------------------------------------------------------- the scheduler


@bug("the victim is the first instead of the last")
class _(Scheduler):
    def _make_room(self, request, num_tokens, step):
        while not self.pool.extend(request, num_tokens):
            victim = self._running[0]
            if victim is request:
                return False
            self._preempt(victim)
            step.preempted.append(victim.id)
        return True


@bug("priority is ignored in preemption")
class _(Scheduler):
    def _make_room(self, request, num_tokens, step):
        while not self.pool.extend(request, num_tokens):
            victim = max(self._running, key=lambda r: (r.asked.arrival, r.id))
            if victim is request:
                return False
            self._preempt(victim)
            step.preempted.append(victim.id)
        return True


@bug("requests are preempted before it is needed")
class _(Scheduler):
    def _make_room(self, request, num_tokens, step):
        if self.pool.num_free < 2 and self._running[-1] is not request:
            step.preempted.append(self._running[-1].id)
            self._preempt(self._running[-1])
        return super()._make_room(request, num_tokens, step)


@bug("nobody is preempted")
class _(Scheduler):
    def _make_room(self, request, num_tokens, step):
        return self.pool.extend(request, num_tokens)


@bug("a victim keeps its blocks")
class _(Scheduler):
    def _preempt(self, victim):
        tables = victim.tables
        super()._preempt(victim)
        for block in [block for table in tables for block in table[-1:]]:
            self.pool._refs[block] += 1
            self.pool._evictable.pop(block, None)


@bug("a victim's progress is not reset")
class _(Scheduler):
    def _preempt(self, victim):
        computed = victim.num_computed_tokens
        super()._preempt(victim)
        victim.num_computed_tokens = computed


@bug("a victim is lost")
class _(Scheduler):
    def _preempt(self, victim):
        super()._preempt(victim)
        self._waiting.remove(victim)


@bug("a request that can never run is let in")
class _(Scheduler):
    def _check_can_run(self, request):
        pass


@bug("a prompt too long for one step is let in without chunked prefill")
class _(Scheduler):
    def _check_can_run(self, request):
        config, self.config = self.config, replace(self.config, enable_chunked_prefill=True)
        try:
            super()._check_can_run(request)
        finally:
            self.config = config


@bug("a request that just fits is refused")
class _(Scheduler):
    def _longest(self, request):
        return super()._longest(request) + 1


@bug("the queue's bound is ignored")
class _(Scheduler):
    def __init__(self, config, pool):
        super().__init__(config, pool)
        self._waiting.check_room = lambda request: None  # type: ignore[method-assign]


@bug("the queue loses count of its tokens")
class _(Scheduler):
    def _start(self, request, hit_tokens, now):
        super()._start(request, hit_tokens, now)
        self._waiting.backlog.num_tokens += hit_tokens


@bug("a token is dropped")
class _(Scheduler):
    def _append(self, request, drawn):
        return super()._append(request, drawn[:1])


@bug("a token is repeated")
class _(Scheduler):
    def _append(self, request, drawn):
        return super()._append(request, [*drawn, *drawn[1:2]])


@bug("tokens after the stop are kept")
class _(Scheduler):
    def _append(self, request, drawn):
        before = len(request.output_ids)
        reason = super()._append(request, drawn)
        request.output_ids[before:] = drawn
        return reason


@bug("stop tokens are ignored")
class _(Scheduler):
    def _append(self, request, drawn):
        request.stop_ids = frozenset()
        return super()._append(request, drawn)


@bug("min_tokens is ignored")
class _(Scheduler):
    def _append(self, request, drawn):
        request.params = replace(request.params, min_tokens=0)
        return super()._append(request, drawn)


@bug("max_tokens is one too many")
class _(Scheduler):
    def add(self, request):
        super().add(request)
        request.max_tokens += 1


@bug("the longest sequence is not enforced")
class _(Scheduler):
    def _append(self, request, drawn):
        longest, self.max_model_len = self.max_model_len, 10**6
        reason = super()._append(request, drawn)
        self.max_model_len = longest
        return reason


@bug("a neighbour's tokens are taken")
class _(Scheduler):
    def update(self, plan, tokens):
        shifted = list(tokens.values())
        return super().update(plan, dict(zip(tokens, shifted[1:] + shifted[:1], strict=True)))


@bug("a step that drew nothing is never computed again")
class _(Scheduler):
    def update(self, plan, tokens):
        self._rewind, keep = (lambda *_: True), self._rewind
        finished = super().update(plan, tokens)
        self._rewind = keep
        return finished


@bug("every chunk samples")
class _(Scheduler):
    def _compute(self, request, num_tokens, step):
        super()._compute(request, num_tokens, step)
        step.chunks[request.id] = step.chunks[request.id]._replace(samples=True)


@bug("a scored prompt never ends")
class _(Scheduler):
    def _append(self, request, drawn):
        return super()._append(request, drawn) if drawn or request.max_tokens else None


@bug("deadlines are ignored")
class _(Scheduler):
    def _expire(self, now):
        return ()


@bug("only waiting requests expire")
class _(Scheduler):
    def _expire(self, now):
        running = {r.id: r for r in self._running}
        for request_id in running:
            del self._requests[request_id]
        expired = super()._expire(now)
        self._requests.update(running)
        return expired


@bug("an expired request is not reported")
class _(Scheduler):
    def _expire(self, now):
        super()._expire(now)
        return ()


@bug("waiting for a prefix never ends")
class _(Scheduler):
    def _admit(self, request, promised, step):
        self.asleep = getattr(self, "asleep", set())
        reason = (
            "prefix_in_flight"
            if request.id in self.asleep
            else super()._admit(request, promised, step)
        )
        if reason == "prefix_in_flight":
            self.asleep.add(request.id)
        return reason


@bug("a request waits for a prefix whose owner stands still")
class _(Scheduler):
    def _admit(self, request, promised, step):
        computing = self.pool.claimant(request)
        return (
            "prefix_in_flight" if computing is not None else super()._admit(request, promised, step)
        )


@bug("a failed step is not rolled back")
class _(Scheduler):
    def rollback(self, plan):
        self._close(plan)


@bug("a failed step is published")
class _(Scheduler):
    def rollback(self, plan):
        for chunk in plan.chunks:
            if chunk.request_id in self._requests:
                self.pool.publish(self._requests[chunk.request_id], chunk.end)
        super().rollback(plan)


@bug("blocks are published when planned, before they are computed")
class _(Scheduler):
    def _compute(self, request, num_tokens, step):
        super()._compute(request, num_tokens, step)
        self.pool.publish(request, request.num_computed_tokens)


@bug("the terminal event comes twice")
class _(Scheduler):
    def update(self, plan, tokens):
        finished = super().update(plan, tokens)
        return finished + finished[:1]


@bug("a request aborted during a step ends again with it")
class _(Scheduler):
    def abort(self, request_id, reason=FinishReason.ABORT):
        request = super().abort(request_id, reason)
        self.aborted = [request] if request is not None and self._pending is not None else []
        return request

    def update(self, plan, tokens):
        finished = super().update(plan, tokens) + getattr(self, "aborted", [])
        self.aborted = []
        return finished


@bug("aborting a finished request ends it again")
class _(Scheduler):
    def abort(self, request_id, reason=FinishReason.ABORT):
        self.graves = getattr(self, "graves", {})
        request = super().abort(request_id, reason) or self.graves.get(request_id)
        if request is not None:
            self.graves[request_id] = request
        return request


@bug("an aborted request stays in the queue")
class _(Scheduler):
    def abort(self, request_id, reason=FinishReason.ABORT):
        request = super().abort(request_id, reason)
        if request is not None and request.num_cached_tokens is None:
            self._waiting.push(request)
        return request


@bug("a failed request is reported as aborted")
class _(Scheduler):
    def fail(self, request_id):
        return self.abort(request_id)


@bug("a failure is not answered")
class _(Scheduler):
    def fail(self, request_id):
        super().fail(request_id)


@bug("the token budget is ignored")
class _(Scheduler):
    def _grant(self, request, remaining, budget):
        return remaining


@bug("prompts are split although chunking is off")
class _(Scheduler):
    def _grant(self, request, remaining, budget):
        return min(remaining, budget)


@bug("one seat too many")
class _(Scheduler):
    def _serve_waiting(self, step):
        config, self.config = (
            self.config,
            replace(self.config, max_num_seqs=self.config.max_num_seqs + 1),
        )
        super()._serve_waiting(step)
        self.config = config


@bug("one seat is never given")
class _(Scheduler):
    def _admit(self, request, promised, step):
        full = 0 < self.config.max_num_seqs - 1 <= len(self._running)
        return "no_seats" if full else super()._admit(request, promised, step)


@bug("a blocked request is overtaken")
class _(Scheduler):
    def _serve_waiting(self, step):
        promised = sum(map(self._promised, self._running))
        for request in list(self._waiting):
            reason = self._admit(request, promised, step)
            if reason is not None:
                step.waiting[request.id] = reason
            else:
                promised += self._promised(request)


@bug("requests behind a blocked one get no reason")
class _(Scheduler):
    def _serve_waiting(self, step):
        super()._serve_waiting(step)
        for request in list(self._waiting)[1:]:
            step.waiting.pop(request.id, None)


@bug("the queue is first come, first served, whatever the priority")
class _(Scheduler):
    def _serve_waiting(self, step):
        for lane in self._waiting.turns._lanes.values():
            lane.waiting.sort(key=lambda r: (r.asked.arrival, r.id))
        super()._serve_waiting(step)


@bug("running requests are kept in the order of their start")
class _(Scheduler):
    def _start(self, request, hit_tokens, now):
        super()._start(request, hit_tokens, now)
        self._running.remove(request)
        self._running.append(request)


@bug("the last running request is served first")
class _(Scheduler):
    def _serve_running(self, step):
        self._running.reverse()
        super()._serve_running(step)
        self._running.reverse()


@bug("a request starts behind its hit")
class _(Scheduler):
    def _start(self, request, hit_tokens, now):
        super()._start(request, hit_tokens, now)
        if hit_tokens:
            request.num_computed_tokens += 1


@bug("a finished request keeps its seat")
class _(Scheduler):
    def _finish(self, request, reason):
        kept = list(self._running)
        super()._finish(request, reason)
        self._running[:] = kept
        return request


@bug("a request is finished without a reason")
class _(Scheduler):
    def _finish(self, request, reason):
        super()._finish(request, reason)
        request.finish_reason = None if reason is FinishReason.LENGTH else reason
        return request


@bug("a preempted request is taken for a new one and draws again")
class _(Scheduler):
    def _start(self, request, hit_tokens, now):
        if request.status is RequestStatus.PREEMPTED and len(request.output_ids) > 1:
            request.output_ids.pop()
        super()._start(request, hit_tokens, now)
