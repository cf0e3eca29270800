"""Whose turn it is, worked out a second time: deficit round robin as a textbook has it.

Owners stand in a ring. The first takes requests as long as it has tokens left; then the next one
gets its quantum. Rounds are gone through one by one, and nothing is shared with the code that is
watched but the quantum.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import NoReturn

from moebius.request.share import Share
from moebius.schedule.request import Request
from moebius.schedule.scheduler import StepPlan
from moebius.schedule.turns import QUANTUM


@dataclass(slots=True, eq=False)
class Owner:
    left: float = 0.0
    weight: float = 1.0
    waiting: list[Request] = field(default_factory=list)
    unfinished: set[str] = field(default_factory=set)


class TurnWatch:
    """Tell it what happens, in that order; it calls `broken` where somebody's turn was another's."""

    def __init__(self, broken: Callable[[str, str], NoReturn]) -> None:
        self._broken = broken
        self._owners: dict[str, Owner] = {}
        self._ring: list[Owner] = []
        self._paid: set[str] = set()

    def waits(self, request: Request) -> None:
        """A request was taken, or preempted."""
        share: Share = request.asked.share
        owner = self._owners.setdefault(share.account, Owner())
        owner.weight = share.weight
        owner.unfinished.add(request.id)
        owner.waiting.append(request)
        owner.waiting.sort(key=lambda each: (each.asked.priority, each.asked.arrival, each.id))
        if owner not in self._ring:
            self._ring.append(owner)

    def ended(self, request: Request) -> None:
        account = request.asked.share.account
        owner = self._owners[account]
        if request in owner.waiting:
            self._leave(owner, request)
        owner.left -= len(request.output_ids)
        owner.unfinished.discard(request.id)
        if not owner.unfinished:
            del self._owners[account]

    def planned(self, plan: StepPlan) -> None:
        """Go through what waited before the plan, in turn: each was started, or passed over, or is
        blocked, and then so are all behind it."""
        waiting = {request.id for owner in self._ring for request in owner.waiting}
        started = [chunk for chunk in plan.chunks if chunk.request_id in waiting]
        asked: set[str] = set()
        while (request := self._next(asked)) is not None:
            reason = plan.waiting.get(request.id)
            if reason in ("prefix_in_flight", "prefix_on_disk"):
                asked.add(request.id)
            elif reason is not None:
                break
            elif not started or started[0].request_id != request.id:
                other = started[0].request_id if started else "nobody"
                self._broken("I8", f"it was the turn of {request.id}, and {other} had it")
            else:
                self._start(request, started.pop(0).start)
        if started:
            self._broken("I8", f"{started[0].request_id} started when another was blocked")

    def _next(self, asked: Container[str]) -> Request | None:
        """Whose turn it is, of those that were not asked yet."""
        ready = [owner for owner in self._ring if any(r.id not in asked for r in owner.waiting)]
        while ready:
            owner = self._ring[0]
            if owner in ready and owner.left > 0:
                return next(r for r in owner.waiting if r.id not in asked)
            self._ring.append(self._ring.pop(0))
            first = self._ring[0]
            first.left = min(first.left, 0) + QUANTUM * first.weight
        return None

    def _start(self, request: Request, num_cached: int) -> None:
        owner = self._owners[request.asked.share.account]
        self._leave(owner, request)
        if request.id not in self._paid:
            self._paid.add(request.id)
            owner.left -= request.num_tokens - num_cached

    def _leave(self, owner: Owner, request: Request) -> None:
        owner.waiting.remove(request)
        if not owner.waiting:
            self._ring.remove(owner)
            owner.left = min(owner.left, 0)
