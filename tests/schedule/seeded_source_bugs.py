"""Bugs seeded into how prompts are scheduled that an encoder reads: as a whole, and for one request
alone."""

from __future__ import annotations

from moebius.schedule.blocks import BlockPool
from moebius.schedule.scheduler import Scheduler
from schedule.seeding import BUGS, bug

__all__ = ["BUGS"]

FAMILY = "T5"


@bug("a prompt that an encoder reads is split where the budget ends", FAMILY)
class _(Scheduler):
    def _grant(self, request, remaining, budget):
        return min(remaining, budget)


@bug("a prompt that no step can hold is let in to an encoder", FAMILY)
class _(Scheduler):
    def _check_can_run(self, request):
        source = request.source
        request.source = 0
        try:
            super()._check_can_run(request)
        finally:
            request.source = source


@bug("a prompt is taken for read although its step failed", FAMILY)
class _(Scheduler):
    def _rewind(self, request, num_tokens):
        return super()._rewind(request, max(num_tokens, request.source))


@bug("what a decoder begins with is lost in a preemption", FAMILY)
class _(Scheduler):
    def _preempt(self, victim):
        victim.prompt_ids = victim.asked.prompt_ids
        super()._preempt(victim)


@bug("an encoder's prompt is not read again after a preemption", FAMILY)
class _(Scheduler):
    def _preempt(self, victim):
        super()._preempt(victim)
        victim.source = 0


@bug("what an encoder made of a prompt is shared with those that begin alike", FAMILY)
class _(BlockPool):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "enable_prefix_caching": True})
