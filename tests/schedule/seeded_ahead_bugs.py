"""Bugs seeded one at a time into what is computed ahead of a plan."""

from __future__ import annotations

from moebius.schedule.request import RequestStatus
from moebius.schedule.scheduler import Chunk, Scheduler
from schedule.seeding import bug


def _behind(chunk: Chunk, request) -> Chunk:
    return Chunk(request.id, chunk.end, 1, True, request.tables, chunk.states)


@bug("a request that is over by its length is computed ahead")
class _(Scheduler):
    def following(self, plan):
        requests = [(chunk, self._requests[chunk.request_id]) for chunk in plan.chunks]
        return tuple(
            _behind(chunk, request)
            for chunk, request in requests
            if self.pool.extend(request, chunk.end + 1)
        )


@bug("what is computed ahead has no block")
class _(Scheduler):
    def following(self, plan):
        extend = self.pool.extend
        self.pool.extend = lambda *_: True
        chunks = super().following(plan)
        self.pool.extend = extend
        return chunks


@bug("for what is computed ahead others lose their blocks")
class _(Scheduler):
    def following(self, plan):
        for chunk in plan.chunks:
            last = self._running[-1]
            if not self.pool.extend(self._requests[chunk.request_id], chunk.end + 1):
                self._preempt(last)
        running = [
            chunk
            for chunk in super().following(plan)
            if self._requests[chunk.request_id].status is RequestStatus.RUNNING
        ]
        return tuple(running)


@bug("what is computed ahead leaves a token out")
class _(Scheduler):
    def following(self, plan):
        return tuple(chunk._replace(start=chunk.start + 1) for chunk in super().following(plan))


@bug("a failed step keeps the block of what followed it")
class _(Scheduler):
    def _rewind(self, request, num_tokens):
        trim = self.pool.trim
        kept = len(request.tables[0]) * self.pool.block_size if request.tables else 0
        self.pool.trim = lambda request, tokens: trim(request, max(tokens, kept))
        goes_on = super()._rewind(request, num_tokens)
        self.pool.trim = trim
        return goes_on


@bug("what is computed ahead is offered to others before it is known")
class _(Scheduler):
    def following(self, plan):
        chunks = super().following(plan)
        for chunk in chunks:
            request = self._requests[chunk.request_id]
            request.output_ids.append(0)
            self.pool.publish(request, chunk.end)
            request.output_ids.pop()
            del request.block_hashes[request.num_tokens // self.pool.block_size :]
        return chunks


@bug("what is computed ahead counts as computed")
class _(Scheduler):
    def following(self, plan):
        chunks = super().following(plan)
        for chunk in chunks:
            self._requests[chunk.request_id].num_computed_tokens += 1
        return chunks
