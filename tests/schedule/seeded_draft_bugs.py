"""Bugs seeded one at a time into drafting: into what is verified, and what becomes of it."""

from __future__ import annotations

from moebius.request.params import MOST_DRAFTS
from moebius.schedule.drafts import DraftingScheduler
from moebius.schedule.scheduler import Scheduler
from schedule.seeding import bug


@bug("every draft counts as right")
class _(DraftingScheduler):
    def _append(self, request, drawn):
        drafts = self.drafted.pop(request.id, ())
        reason = super()._append(request, drawn)
        request.num_computed_tokens += len(drafts) if drawn else 0
        return reason


@bug("right drafts are computed again")
class _(DraftingScheduler):
    def _append(self, request, drawn):
        computed = request.num_computed_tokens
        reason = super()._append(request, drawn)
        if request.num_computed_tokens > computed:
            request.num_computed_tokens = computed
            self.pool.trim(request, computed)
        return reason


@bug("the last token drawn counts as computed where a draft is the same")
class _(DraftingScheduler):
    def _append(self, request, drawn):
        drafts = self.drafted.get(request.id, ())
        computed = request.num_computed_tokens
        reason = super()._append(request, drawn)
        right = request.num_computed_tokens - computed
        if len(drafts) > right and drawn and request.output_ids[-1] == drafts[right]:
            self.pool.extend(request, request.num_computed_tokens + 1)
            request.num_computed_tokens += 1
        return reason


@bug("blocks of wrong drafts are kept")
class _(DraftingScheduler):
    def _append(self, request, drawn):
        trim = self.pool.trim
        self.pool.trim = lambda *_: None
        reason = super()._append(request, drawn)
        self.pool.trim = trim
        return reason


@bug("what was drafted is published before it is verified")
class _(DraftingScheduler):
    def update(self, plan, tokens):
        for chunk in plan.chunks:
            request = self._requests.get(chunk.request_id)
            if chunk.drafts and request is not None:
                output = list(request.output_ids)
                request.output_ids += chunk.drafts
                self.pool.publish(request, chunk.end + len(chunk.drafts))
                request.output_ids[:] = output
                del request.block_hashes[request.num_tokens // self.pool.block_size :]
        return super().update(plan, tokens)


@bug("drafts are taken for what was drawn")
class _(DraftingScheduler):
    def _append(self, request, drawn):
        drafts = self.drafted.get(request.id, ())
        return super()._append(request, [*drafts, *drawn] if drafts and drawn else drawn)


@bug("drafts take more than the step's budget")
class _(DraftingScheduler):
    def _add_drafts(self, step):
        step.budget += MOST_DRAFTS
        super()._add_drafts(step)


@bug("drafts take more rows with logits than there are")
class _(DraftingScheduler):
    def _add_drafts(self, step):
        self.most_rows += MOST_DRAFTS
        super()._add_drafts(step)
        self.most_rows -= MOST_DRAFTS


@bug("drafts go beyond the last token that may be drawn")
class _(DraftingScheduler):
    def _verify(self, chunk, guessed, share, step, load):
        request = self._requests[chunk.request_id]
        request.max_tokens += MOST_DRAFTS
        super()._verify(chunk, guessed, share, step, load)
        request.max_tokens -= MOST_DRAFTS


@bug("drafts go beyond the context")
class _(DraftingScheduler):
    def _verify(self, chunk, guessed, share, step, load):
        self.max_model_len += MOST_DRAFTS
        super()._verify(chunk, guessed, share, step, load)
        self.max_model_len -= MOST_DRAFTS


@bug("drafts go before what waits")
class _(DraftingScheduler):
    def _serve_waiting(self, step):
        self._add_drafts(step)
        Scheduler._serve_waiting(self, step)


@bug("somebody is preempted for a draft")
class _(DraftingScheduler):
    def _add_drafts(self, step):
        for chunk in list(step.chunks.values()):
            request = self._requests[chunk.request_id]
            if request is not self._running[-1] and chunk.samples and chunk.num_tokens == 1:
                self._make_room(request, chunk.end + 1, step)
                step.chunks = {
                    id: each for id, each in step.chunks.items() if id not in step.preempted
                }
                self.pool.trim(request, chunk.end)
        super()._add_drafts(step)


@bug("a prompt in chunks has drafts")
class _(DraftingScheduler):
    def _add_drafts(self, step):
        super()._add_drafts(step)
        for chunk in list(step.chunks.values()):
            request = self._requests[chunk.request_id]
            drafts = (1,)
            if not chunk.samples and step.budget and self.pool.extend(request, chunk.end + 1):
                self.drafted[request.id] = drafts
                step.budget -= 1
                step.chunks[request.id] = chunk._replace(tables=request.tables, drafts=drafts)


@bug("drafts have no blocks")
class _(DraftingScheduler):
    def _add_drafts(self, step):
        extend = self.pool.extend
        self.pool.extend = lambda *_: True
        super()._add_drafts(step)
        self.pool.extend = extend


@bug("a chunk with drafts has the tables of before")
class _(DraftingScheduler):
    def _add_drafts(self, step):
        before = {chunk.request_id: chunk.tables for chunk in step.chunks.values()}
        super()._add_drafts(step)
        for id, chunk in list(step.chunks.items()):
            step.chunks[id] = chunk._replace(tables=before[id])


@bug("a failed step's drafts are still held")
class _(DraftingScheduler):
    def rollback(self, plan):
        super().rollback(plan)
        for chunk in plan.chunks:
            request = self._requests.get(chunk.request_id)
            if chunk.drafts and request is not None:
                self.pool.extend(request, chunk.end + len(chunk.drafts))


@bug("where nothing was drawn the drafts are still held")
class _(DraftingScheduler):
    def _append(self, request, drawn):
        drafts = self.drafted.get(request.id, ())
        reason = super()._append(request, drawn)
        if drafts and not drawn:
            self.pool.extend(request, request.num_tokens + len(drafts))
        return reason


@bug("drafts are compared with what was drawn one place on")
class _(DraftingScheduler):
    def _append(self, request, drawn):
        if request.id in self.drafted:
            self.drafted[request.id] = self.drafted[request.id][1:]
        return super()._append(request, drawn)
