"""Bugs seeded into what waits for a second tier and what lands from it."""

from __future__ import annotations

from collections.abc import Callable

from moebius.schedule.scheduler import Scheduler
from moebius.schedule.tiers import FETCHED, Kept, Piece, TieredScheduler

TIER_BUGS: dict[str, tuple[type[TieredScheduler], str | None, int]] = {}
"""By what is wrong: the scheduler, a family of models that shows it soonest, and the seed of the
first episode that does, or of one not far before it."""


def bug(description: str, family: str | None = None, seed: int = 1) -> Callable[[type], type]:
    def register(cls: type[TieredScheduler]) -> type[TieredScheduler]:
        TIER_BUGS[description] = (cls, family, seed)
        return cls

    return register


@bug("what lands is found under the hash of the block behind it")
class _(TieredScheduler):
    def land(self, request_id, piece, write):
        request = self._requests.get(request_id)
        if request is None or piece.number + 1 >= len(request.block_hashes):
            return super().land(request_id, piece, write)
        return super().land(request_id, Piece(piece.group, piece.number + 1), write)


@bug("what lands stays owned by nobody")
class _(TieredScheduler):
    def land(self, request_id, piece, write):
        places = self._places(piece.group)
        release = places._release
        places._release = lambda owned: None
        try:
            return super().land(request_id, piece, write)
        finally:
            places._release = release


@bug("a snapshot lands although the block before it has gone", "Qwen3.5", seed=12)
class _(TieredScheduler):
    def land(self, request_id, piece, write):
        if piece.group is not None:
            return super().land(request_id, piece, write)
        states = self.pool.states
        digest = self._requests[request_id].block_hashes[piece.number]
        if digest in states.cached[0] or not states.num_free:
            return False
        place = states._take()
        write(place)
        states._enter(0, digest, place, FETCHED)
        states._release((place,))
        return True


@bug("a block lands in another group's table", "gpt-oss")
class _(TieredScheduler):
    def land(self, request_id, piece, write):
        group = piece.group and piece.group - 1
        return super().land(request_id, Piece(group, piece.number), write)


@bug("a block that was evicted meanwhile is taken for what it was")
class _(TieredScheduler):
    def holds(self, kept):
        return True


@bug("a block is told from a later one by its place alone")
class _(TieredScheduler):
    def holds(self, kept: Kept) -> bool:
        return self._places(kept.piece.group)._entries[kept.place] is not None


@bug("what derives from an unfinished request is kept", seed=179)
class _(TieredScheduler):
    def kept(self, request):
        unfinished = [id for id in self._requests if id != request.id]
        held = {id: self._requests.pop(id) for id in unfinished}
        try:
            yield from list(super().kept(request))
        finally:
            own = self._requests.pop(request.id)
            self._requests.update(held)
            self._requests[request.id] = own


@bug("a request waits beyond its time for what is fetched")
class _(TieredScheduler):
    def plan(self, now):
        return Scheduler.plan(self, now)


@bug("a request waits on although all is there")
class _(TieredScheduler):
    def settle(self, request_id):
        pass


@bug("who has ended is still awaited", seed=36)
class _(TieredScheduler):
    def _finish(self, request, reason):
        until = self._awaited.get(request.id)
        try:
            return super()._finish(request, reason)
        finally:
            if until is not None:
                self._awaited[request.id] = until


@bug("who waits for what is fetched blocks those behind it")
class _(TieredScheduler):
    def _admit(self, request, promised, step):
        reason = super()._admit(request, promised, step)
        return "no_blocks" if reason == "prefix_on_disk" else reason


@bug("who waits for what is fetched starts all the same")
class _(TieredScheduler):
    def _admit(self, request, promised, step):
        awaited = self._awaited.pop(request.id, None)
        reason = super()._admit(request, promised, step)
        if awaited is not None and reason is not None:
            self._awaited[request.id] = awaited
        return reason
