"""Each judgement of the checker, provoked by hand: a story told wrongly has to be contradicted."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from moebius.request.finish import FinishReason
from moebius.schedule.request import Request, RequestStatus
from moebius.schedule.scheduler import StepPlan
from schedule.checker import Checker, Violation, advance, draw
from schedule.making import KEY, make_request, make_scheduler

VOCAB = 1000


class Story:
    """A scheduler and its checker, told the truth so far."""

    def __init__(self, **config):
        self.scheduler = make_scheduler(**config)
        self.checker = Checker(self.scheduler, KEY, VOCAB, seed=77)

    def add(self, request: Request) -> Request:
        self.scheduler.add(request)
        self.checker.admitted(request, secret=3)
        return request

    def plan(self, now: float = 0.0) -> StepPlan:
        plan = self.scheduler.plan(now)
        self.checker.planned(plan, now)
        return plan

    def drawn(self, plan: StepPlan) -> dict[str, list[int]]:
        values = self.checker.computed(plan)
        return {
            chunk.request_id: [draw(3, values[chunk.request_id], VOCAB)]
            for chunk in plan.chunks
            if chunk.samples
        }

    def step(self) -> StepPlan:
        plan = self.plan()
        drawn = self.drawn(plan)
        self.checker.updated(plan, drawn, self.scheduler.update(plan, drawn))
        self.checker.books()
        return plan

    def contradicts(self, invariant: str, message: str):
        return pytest.raises(
            Violation,
            match=f"{invariant} violated in step 0 of the episode with seed 77: .*{message}",
        )


def test_a_true_story_is_believed():
    story = Story(budget=8)
    request = story.add(make_request("a", range(1, 12), max_tokens=3))
    value = 0
    for token in range(1, 12):
        value = advance(value, token)
    first = draw(3, value, VOCAB)
    while story.scheduler.has_work:
        story.step()
    story.checker.quiet()
    assert request.output_ids[0] == first and story.checker.ends == {"a": FinishReason.LENGTH}


def test_admission_and_end_happen_once():
    story = Story()
    request = story.add(make_request("a", [1, 2]))
    with story.contradicts("I10", "a was admitted twice"):
        story.checker.admitted(request, 3)
    story.scheduler.abort("a")
    story.checker.ended(request, FinishReason.ABORT)
    with story.contradicts("I10", "a ends with FinishReason.ABORT after FinishReason.ABORT"):
        story.checker.ended(request, FinishReason.ABORT)


def test_who_ends_leaves_nothing_behind():
    story = Story()
    request = story.add(make_request("a", [1, 2]))
    story.plan()
    request.status, request.finish_reason = RequestStatus.FINISHED, FinishReason.ABORT
    with story.contradicts("I12", "a is over, but has 1 blocks or is in the books"):
        story.checker.ended(request, FinishReason.ABORT)


def test_nobody_expires_without_cause():
    story = Story()
    story.add(make_request("a", [1, 2], deadline=9.0))
    plan = story.scheduler.plan(0.0)
    with story.contradicts("I10", "a expired without cause"):
        story.checker.planned(replace(plan, expired=("a",)), 0.0)


def chunk_of(plan, **changes):
    return replace(plan, chunks=(plan.chunks[0]._replace(**changes),))


@pytest.mark.parametrize(
    ("changes", "invariant", "message"),
    [
        ({"request_id": "stranger"}, "I10", "stranger is computed, but does not run"),
        ({"start": 7}, "I10", "a goes on at 7 instead of 8"),
        ({"num_tokens": 4}, "I10", "a computes 4 of 3 tokens"),
        ({"num_tokens": 0}, "I10", "a computes 0 of 3 tokens"),
        ({"samples": False}, "I10", "a samples at the wrong time"),
        ({"tables": (array("i", [0, 1]),)}, "I6", "a is not computed in its own blocks"),
        ({"num_tokens": 99}, "budget", "99 tokens of 8"),
    ],
)
def test_a_chunk_goes_on_where_the_last_one_ended(changes, invariant, message):
    story = Story(budget=8)
    story.add(make_request("a", range(1, 12)))
    story.step()
    plan = story.scheduler.plan(0.0)
    with story.contradicts(invariant, message):
        story.checker.planned(chunk_of(plan, **changes), 0.0)


def test_a_victim_is_preempted():
    story = Story()
    story.add(make_request("a", [1, 2]))
    plan = story.scheduler.plan(0.0)
    with story.contradicts("I9", "a victim is not preempted"):
        story.checker.planned(replace(plan, preempted=("a",)), 0.0)


def test_no_request_is_lost():
    story = Story()
    story.add(make_request("a", [1, 2]))
    story.add(make_request("b", [3, 4], arrival=1.0))
    plan = story.scheduler.plan(0.0)
    del story.scheduler._requests["b"]
    with story.contradicts("I10", "{'b'} are lost, or not gone"):
        story.checker.planned(plan, 0.0)


def test_no_block_is_written_by_two_or_while_it_is_cached():
    story = Story()
    one, two = (
        story.add(make_request("a", range(1, 8))),
        story.add(make_request("b", range(50, 57), arrival=1.0)),
    )
    plan = story.plan()
    two.tables = one.tables
    with story.contradicts("I5", "a writes to block 0, which is shared"):
        story.checker.computed(plan)


def test_what_a_failed_step_was_to_write_is_garbage():
    story = Story(budget=8)
    request = story.add(make_request("a", range(1, 12)))
    story.step()
    plan = story.plan()
    story.scheduler.rollback(plan)
    story.checker.rolled_back(plan)
    request.num_computed_tokens = 11  # as if it had been computed
    with story.contradicts("I10", "a goes on at 11 instead of 8"):
        story.checker._check_chunks(chunk_of(plan, start=11))


def test_quiet_means_that_all_has_ended_and_all_is_back(monkeypatch):
    story = Story()
    story.add(make_request("a", [1, 2]))
    with story.contradicts("I10", r"\['a'\] never ended"):
        story.checker.quiet()
    story.step()
    request = story.scheduler.abort("a")
    story.checker.ended(request, FinishReason.ABORT)
    story.checker.quiet()
    pool = story.scheduler.pool
    monkeypatch.setattr("schedule.books.check_pool", lambda *_: None)
    pool._free.pop()
    with story.contradicts("I12", "1 blocks are held by nobody"):
        story.checker.quiet()


@pytest.mark.parametrize("start", [3, 8])
def test_a_hit_inside_a_block_or_over_the_last_token_is_contradicted(start):
    story = Story(size=4)
    request = make_request("a", range(1, 9))
    with story.contradicts("I5", f"covers {start} of 8"):
        story.checker._check_hit(request, start)
