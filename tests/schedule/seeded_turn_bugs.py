"""Bugs seeded one at a time into the turns that owners of waiting requests take."""

from __future__ import annotations

from moebius.request.backlog import Backlog
from moebius.schedule.scheduler import Scheduler
from moebius.schedule.turns import QUANTUM, Turns
from schedule.seeding import bug


def bug_of_turns(description: str):
    """A scheduler whose turns have the bug."""
    return bug_of("turns", description)


def bug_of_backlog(description: str):
    """A scheduler whose backlog has the bug."""
    return bug_of("backlog", description)


def bug_of(part: str, description: str):
    def register(cls: type) -> type:
        class Seeded(Scheduler):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                getattr(self._waiting, part).__class__ = cls

        bug(description)(Seeded)
        return cls

    return register


@bug_of_turns("owners take no turns: all is first come, first served")
class _(Turns):
    def in_turn(self):
        return iter(sorted(self, key=lambda request: request.order))


@bug_of_turns("an owner keeps its turn as long as it has requests")
class _(Turns):
    def took(self, request, num_tokens):
        pass

    def finished(self, request):
        self._lanes[request.asked.share.account].left += len(request.output_ids)
        super().finished(request)


@bug_of_turns("owners take turns by requests, whatever their length")
class _(Turns):
    def took(self, request, num_tokens):
        super().took(request, QUANTUM)


@bug_of_turns("weights are ignored")
class _(Turns):
    def push(self, request):
        super().push(request)
        self._lanes[request.asked.share.account].weight = 1.0


@bug_of_turns("an answer costs nothing")
class _(Turns):
    def finished(self, request):
        self._lanes[request.asked.share.account].left += len(request.output_ids)
        super().finished(request)


@bug_of_turns("cached tokens are paid for")
class _(Turns):
    def took(self, request, num_tokens):
        super().took(request, request.num_tokens)


@bug_of_turns("what an owner owes is forgotten when nothing of it waits")
class _(Turns):
    def remove(self, request):
        lane = self._lanes[request.asked.share.account]
        super().remove(request)
        if not lane.waiting:
            lane.left = 0.0


@bug_of_turns("what an owner did not take is saved up")
class _(Turns):
    def _next_turn(self):
        self._ring.rotate(-1)
        self._ring[0].left += self._ring[0].quantum


@bug_of_turns("an owner that comes back goes first")
class _(Turns):
    def push(self, request):
        ring = list(self._ring)
        super().push(request)
        if len(self._ring) > len(ring):
            self._ring.rotate(1)


@bug_of_turns("an owner is kept when all of its requests are done")
class _(Turns):
    def finished(self, request):
        lane = self._lanes[request.asked.share.account]
        super().finished(request)
        self._lanes.setdefault(request.asked.share.account, lane)


@bug_of_turns("the passing of rounds gives too many quanta")
class _(Turns):
    def _next_turn(self):
        if all(lane.left <= 0 for lane in self._ring):
            rounds = max(-lane.left // lane.quantum for lane in self._ring)
            for lane in self._ring:
                lane.left += rounds * lane.quantum
        self._ring.rotate(-1)
        first = self._ring[0]
        first.left = min(first.left, 0.0) + first.quantum


@bug_of_turns("a preempted request counts twice")
class _(Turns):
    def push(self, request):
        super().push(request)
        lane = self._lanes[request.asked.share.account]
        lane.unfinished = max(lane.unfinished, 1) + (request.num_preemptions > 0)


@bug("a preempted request is paid for again")
class _(Scheduler):
    def _start(self, request, hit_tokens, now):
        again = request.scheduled is not None
        super()._start(request, hit_tokens, now)
        if again:
            self._waiting.turns.took(request, request.num_tokens - hit_tokens)


@bug_of_backlog("one owner may fill the whole queue")
class _(Backlog):
    def _beyond_share(self, account, num_tokens, requests, tokens):
        return 0, 0


@bug_of_backlog("an owner with nothing in the queue is held to another's share")
class _(Backlog):
    def _beyond_share(self, account, num_tokens, requests, tokens):
        first = next(iter(self._held), account)
        return super()._beyond_share(first, num_tokens, requests, tokens)
