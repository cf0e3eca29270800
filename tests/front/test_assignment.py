"""Who gets which engine, without any engine."""

from __future__ import annotations

from moebius.front.assignment import Assignment
from moebius.front.flight import Flight
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams, ServingLimits

LIMITS = ServingLimits(vocab_size=100, max_model_len=500, priorities=True)


def flight(id: str, priority: int = 0, arrival: float = 0.0) -> Flight:
    return Flight(
        EngineRequest.create(
            id, [1, 2, 3], SamplingParams(), LIMITS, arrival=arrival, priority=priority
        )
    )


def given(assignment: Assignment) -> list[str]:
    return [each.id for each, _ in assignment.assign()]


def test_what_waits_is_given_out_in_the_order_of_service() -> None:
    """Among a lost engine's requests and new ones alike: its successor's queue may not take all."""
    assignment = Assignment()
    assignment.opened(0, 9, 4)
    for one in (flight("low", 5, 1.0), flight("first", 0, 2.0)):
        assignment.add(one)
    assert given(assignment) == ["first", "low"]
    assignment.lost(0)
    assert given(assignment) == [], "there is no engine"
    for one in (flight("urgent", -1, 3.0), flight("second", 0, 4.0)):
        assignment.add(one)
    assignment.opened(0, 9, 4)
    assert given(assignment) == ["urgent", "first", "second", "low"]


def test_an_engine_that_takes_no_more_is_given_something_when_something_has_ended() -> None:
    assignment = Assignment()
    for id in ("a", "b"):
        assignment.add(flight(id))
    assignment.opened(0, 9, 4)
    assert given(assignment) == ["a", "b"]
    first = assignment.get("a")
    second = assignment.get("b")
    assert first is not None and second is not None
    assert assignment.refused(second), "it waits for the first one"
    assert given(assignment) == [] and assignment.num_waiting == 1
    assignment.forget(first)
    assert given(assignment) == ["b"]
    assert not assignment.refused(second), "the engine has nothing else, and refuses it"
