from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from time import process_time

import pytest

from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError, ContextLengthError, OverloadError, RequestError
from moebius.request.finish import FinishReason
from moebius.schedule.blocks import BlockPool
from moebius.schedule.request import Request, RequestStatus
from moebius.schedule.scheduler import Scheduler
from schedule.books import check_books
from schedule.making import KEY, drain, make_request, make_scheduler, step


def add(scheduler, *requests):
    for request in requests:
        scheduler.add(request)
    return requests


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("max_num_seqs", "max_num_seqs is 0; it must be at least 1"),
        ("max_model_len", "max_model_len is 0"),
        ("max_queue_requests", "max_queue_requests is 0"),
        ("max_queue_tokens", "max_queue_tokens is 0"),
        ("max_num_batched_tokens", "max_num_batched_tokens is 0; it must be at least 1"),
    ],
)
def test_config_is_checked(field, message):
    good = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 16}
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**(good | {field: 0}))


def test_a_prompt_in_chunks_beside_a_decode():
    scheduler = make_scheduler(budget=8)
    (one,) = add(scheduler, make_request("one", [1, 2, 3], max_tokens=6))
    step(scheduler)
    add(scheduler, make_request("two", range(10, 30), arrival=1.0))
    sizes = []
    for _ in range(3):
        plan, _ = step(scheduler)
        sizes.append([(c.request_id, c.start, c.num_tokens, c.samples) for c in plan.chunks])
        assert plan.num_tokens <= 8
    assert sizes == [
        [("one", 3, 1, True), ("two", 0, 7, False)],
        [("one", 4, 1, True), ("two", 7, 7, False)],
        [("one", 5, 1, True), ("two", 14, 6, True)],
    ]
    assert one.output_ids == [5] * 4
    drain(scheduler)


def test_a_plan_is_plain_data():
    scheduler = make_scheduler(seqs=1)
    add(scheduler, make_request("a", range(1, 7)), make_request("b", [1], arrival=1.0))
    plan = scheduler.plan(0.0)
    (chunk,) = plan.chunks
    assert (chunk.request_id, chunk.end, len(chunk.tables[0])) == ("a", 6, 2)
    assert dict(plan.waiting) == {"b": "no_seats"} and plan.preempted == plan.expired == ()
    with pytest.raises(TypeError):
        plan.waiting["b"] = "no_blocks"
    with pytest.raises(TypeError):
        scheduler.requests["c"] = scheduler.requests["a"]
    assert scheduler.num_running == scheduler.num_waiting == 1


def test_order_is_priority_then_arrival():
    scheduler = make_scheduler(seqs=1)
    add(
        scheduler,
        make_request("late", [1], arrival=2.0),
        make_request("early", [1], arrival=1.0),
        make_request("urgent", [1], arrival=3.0, priority=-1),
    )
    served = []
    for plan in drain(scheduler):
        served += [c.request_id for c in plan.chunks if c.request_id not in served]
    assert served == ["urgent", "early", "late"]


def test_an_urgent_newcomer_is_served_first_among_the_running():
    scheduler = make_scheduler(budget=8)
    add(scheduler, make_request("slow", range(1, 60)))
    step(scheduler)
    add(scheduler, make_request("urgent", [1, 2], priority=-1, arrival=1.0))
    plan, _ = step(scheduler)
    assert [c.request_id for c in plan.chunks] == [
        "slow"
    ]  # the running ones first: no budget is left
    assert dict(plan.waiting) == {"urgent": "no_budget"}
    scheduler.abort("slow")
    add(scheduler, make_request("slow2", range(1, 60), arrival=2.0))
    plan, _ = step(scheduler)
    assert [(c.request_id, c.num_tokens) for c in plan.chunks] == [("urgent", 2), ("slow2", 6)]
    add(scheduler, make_request("most", [7], priority=-2, arrival=9.0))
    scheduler.abort("slow2")
    step(scheduler)
    plan, _ = step(scheduler)
    assert [c.request_id for c in plan.chunks] == ["most", "urgent"]


def test_a_common_prompt_that_arrives_32_times_is_computed_once():
    common = [i % 997 for i in range(1024)]
    scheduler = make_scheduler(blocks=2048, size=16, seqs=32, budget=768, length=2048)
    add(
        scheduler,
        *(make_request(f"r{i}", [*common, *[i] * 10], max_tokens=1, arrival=i) for i in range(32)),
    )
    plans = drain(scheduler)
    computed = Counter()
    for plan in plans:
        for chunk in plan.chunks:
            computed.update(range(chunk.start, chunk.end))
    assert all(computed[position] == 1 for position in range(1024))
    assert all(computed[position] == 32 for position in range(1024, 1034))
    assert scheduler.prefix_hits == 31 * 1024 and scheduler.prefix_queries == 32 * 1034
    assert set(plans[1].waiting.values()) == {"prefix_in_flight"} and len(plans[1].waiting) == 31


def test_who_waits_for_a_prefix_is_counted_apart():
    scheduler = make_scheduler(budget=8, seqs=2)
    same = [
        make_request(name, range(1, 30), arrival=i) for i, name in enumerate(("owner", "waiter"))
    ]
    add(
        scheduler,
        *same,
        *(make_request(f"other{i}", [500 + i] * 20, arrival=9.0 + i) for i in range(3)),
    )
    counted: list[int] = []
    while scheduler.has_work:
        plan, _ = step(scheduler)
        counted.append(scheduler.num_deferred)
        assert counted[-1] == list(plan.waiting.values()).count("prefix_in_flight")
    assert max(counted) == 1 and counted[-1] == 0


@pytest.mark.parametrize("how", ["abort", "fail"])
def test_who_waits_for_a_prefix_goes_on_when_its_owner_is_gone(how):
    scheduler = make_scheduler(budget=8)
    add(
        scheduler,
        make_request("owner", range(1, 30)),
        make_request("waiter", range(1, 30), arrival=1.0),
    )
    add(scheduler, make_request("stranger", range(1, 4), arrival=2.0, salt=b"other"))
    plan, _ = step(scheduler)
    assert plan.waiting["waiter"] == "no_budget"  # nothing is left, so no need to look
    step(scheduler)
    getattr(scheduler, how)("owner")
    plan, _ = step(scheduler)
    start = 16 if how == "abort" else 0  # what a failed request published is gone
    assert [(c.request_id, c.start) for c in plan.chunks] == [("waiter", start)]
    drain(scheduler)


def test_other_tenants_do_not_wait_for_a_prefix():
    scheduler = make_scheduler()
    add(
        scheduler,
        make_request("a", range(1, 20)),
        make_request("b", range(1, 20), arrival=1.0, salt=b"other"),
    )
    plan, _ = step(scheduler)
    assert [c.num_tokens for c in plan.chunks] == [19, 19] and not plan.waiting


def test_who_waits_for_a_prefix_is_passed_by():
    scheduler = make_scheduler()
    add(scheduler, make_request("a", range(1, 20)), make_request("b", range(1, 20), arrival=1.0))
    add(scheduler, make_request("c", range(40, 50), arrival=2.0))
    plan, _ = step(scheduler)
    assert [c.request_id for c in plan.chunks] == ["a", "c"] and dict(plan.waiting) == {
        "b": "prefix_in_flight"
    }
    plan, _ = step(scheduler)
    assert [(c.request_id, c.start) for c in plan.chunks][2] == ("b", 16)
    assert scheduler.requests["b"].num_cached_tokens == 16


def test_prompt_logprobs_do_not_read_the_cache_but_fill_it():
    scheduler = make_scheduler()
    add(scheduler, make_request("warm", range(1, 14), max_tokens=1))
    drain(scheduler)
    add(scheduler, make_request("scored", range(1, 14), max_tokens=1, prompt_logprobs=1))
    assert [c.start for c in step(scheduler)[0].chunks] == [0]
    assert scheduler.prefix_hits == 0 and scheduler.prefix_queries == 13
    other = make_scheduler()
    add(other, make_request("scored", range(1, 14), max_tokens=1, prompt_logprobs=1))
    drain(other)
    add(other, make_request("reader", range(1, 14), max_tokens=1))
    assert [c.start for c in step(other)[0].chunks] == [12]


def test_a_scored_prompt_ends_without_a_token():
    scheduler = make_scheduler(budget=8)
    (request,) = add(scheduler, make_request("a", range(1, 12), max_tokens=0, prompt_logprobs=0))
    plan, finished = step(scheduler)
    assert not plan.chunks[0].samples and not finished
    plan, finished = step(scheduler)
    assert not plan.chunks[0].samples and finished == [request]
    assert request.finish_reason is FinishReason.LENGTH and request.output_ids == []


def test_a_replay_goes_on_behind_its_output():
    scheduler = make_scheduler()
    (request,) = add(scheduler, make_request("a", [1, 2, 3], max_tokens=5, output_ids=[7, 8]))
    plan, _ = step(scheduler)
    assert plan.chunks[0].num_tokens == 5 and plan.chunks[0].samples
    drain(scheduler)
    assert request.output_ids == [7, 8, 5, 5, 5]


# --------------------------------------------------------------------------------------------------
# blocks and victims


def test_the_last_in_the_order_is_preempted_and_comes_back():
    scheduler = make_scheduler(blocks=6, size=2, length=12)
    first, last = add(
        scheduler,
        make_request("first", [1, 2, 3], max_tokens=8),
        make_request("last", [4, 5, 6], max_tokens=8, arrival=1.0),
    )
    plans = drain(scheduler)
    assert [plan.preempted for plan in plans if plan.preempted] == [("last",)]
    assert (first.num_preemptions, last.num_preemptions, scheduler.preemptions) == (0, 1, 1)
    assert first.output_ids == last.output_ids == [5] * 8
    assert last.num_cached_tokens == 0  # as when it first ran


def test_a_preempted_request_finds_its_published_blocks():
    scheduler = make_scheduler(blocks=8, size=2, length=16)
    add(scheduler, make_request("first", [1, 2, 3], max_tokens=9))
    (last,) = add(scheduler, make_request("last", [4, 5, 6, 7, 8], max_tokens=9, arrival=1.0))
    while not last.num_preemptions:
        step(scheduler)
    assert (
        last.status is RequestStatus.PREEMPTED and not last.tables and last.num_computed_tokens == 0
    )
    scheduler.abort("first")
    plan, _ = step(scheduler)
    assert plan.chunks[0].start > 0
    drain(scheduler)


def test_priority_decides_who_is_preempted():
    scheduler = make_scheduler(blocks=6, size=2, length=12)
    add(scheduler, make_request("old", [1, 2, 3], max_tokens=8, priority=1))
    add(scheduler, make_request("urgent", [4, 5, 6], max_tokens=8, arrival=1.0))
    assert {victim for plan in drain(scheduler) for victim in plan.preempted} == {"old"}


def test_the_last_running_request_waits_with_its_blocks():
    scheduler = make_scheduler(blocks=4, size=4, budget=8, length=16, caching=False)
    add(scheduler, make_request("first", [1] * 7, max_tokens=4))
    add(scheduler, make_request("last", [2, 3, 4], max_tokens=8, arrival=1.0))
    reasons = []
    while scheduler.has_work:
        plan, _ = step(scheduler)
        assert not plan.preempted
        reasons += plan.waiting.values()
    assert scheduler.preemptions == 0 and set(reasons) <= {"no_blocks", "no_budget"}


def test_nothing_starts_beside_what_is_promised():
    scheduler = make_scheduler(blocks=6, size=4, budget=8, length=24)
    add(scheduler, make_request("long", range(1, 19), max_tokens=4))
    add(
        scheduler,
        make_request("next", range(50, 57), arrival=1.0),
        make_request("small", [9], arrival=2.0),
    )
    for _ in range(2):
        plan, _ = step(scheduler)
        assert [c.request_id for c in plan.chunks] == ["long"]
    plan, _ = step(
        scheduler
    )  # budget is left now, but the blocks are promised; and nobody passes the first
    assert dict(plan.waiting) == {"next": "no_blocks", "small": "no_blocks"}
    drain(scheduler)


def test_a_hit_does_not_make_room_that_is_not_there():
    scheduler = make_scheduler(blocks=5, size=4, length=20)
    add(scheduler, make_request("warm", range(1, 9), max_tokens=1))
    drain(scheduler)
    add(scheduler, make_request("other", range(50, 57), max_tokens=2))
    step(scheduler)
    add(scheduler, make_request("big", [*range(1, 9), *range(60, 67)], arrival=1.0))
    plan, _ = step(scheduler)
    assert dict(plan.waiting) == {"big": "no_blocks"}
    drain(scheduler)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("lengths", "numbers"),
    [
        ((17, 0), r"17 tokens and max_tokens is 0, but the context is 16"),
        ((16, 1), r"16 tokens and max_tokens is 1, but the context is 16"),
        ((9, 7), r"9 tokens and max_tokens is 7: up to 4 blocks of 4 .* 3;"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(lengths, numbers):
    scheduler = make_scheduler(blocks=3, size=4, length=16)
    with pytest.raises(ContextLengthError, match=numbers):
        scheduler.add(make_request("a", [1] * lengths[0], max_tokens=lengths[1]))
    assert not scheduler.has_work and scheduler.num_waiting == 0


def test_a_source_that_no_step_can_read_whole_is_refused():
    scheduler = make_scheduler(budget=16)
    asked = make_request("a", [1] * 17).asked
    with pytest.raises(ContextLengthError, match="17 tokens, which an encoder reads in one step"):
        scheduler.add(Request(asked, (1,)))
    assert not scheduler.has_work


@pytest.mark.parametrize(("prompt", "max_tokens"), [(12, 1), (11, 2), (1, 12), (12, 0)])
def test_what_just_fits_is_served(prompt, max_tokens):
    scheduler = make_scheduler(blocks=3, size=4, length=13)
    (request,) = add(scheduler, make_request("a", [1] * prompt, max_tokens=max_tokens))
    drain(scheduler)
    assert len(request.output_ids) == max_tokens


def test_an_id_in_use_is_refused():
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [1]))
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        scheduler.add(make_request("a", [2]))
    drain(scheduler)
    add(scheduler, make_request("a", [3]))


def test_the_queue_is_bounded_by_count_and_by_tokens():
    scheduler = make_scheduler(max_queue_requests=2, max_queue_tokens=10)
    add(scheduler, make_request("alone", [1] * 30))  # an empty queue takes it, or nobody ever would
    with pytest.raises(OverloadError, match="1 of 2 requests and 30 of 10 tokens wait"):
        scheduler.add(make_request("b", [1]))
    step(scheduler)
    add(scheduler, make_request("b", [1]), make_request("c", [1]))
    with pytest.raises(OverloadError, match="2 of 2 requests") as refusal:
        scheduler.add(make_request("d", [1]))
    assert refusal.value.retry_after >= 1
    assert set(scheduler.requests) == {"alone", "b", "c"}


def test_retry_after_comes_from_the_drain_rate():
    scheduler = make_scheduler(seqs=1, max_queue_requests=4)
    for i in range(4):
        add(scheduler, make_request(f"r{i}", [1], max_tokens=1, arrival=i))
    for i in range(8):  # one request leaves every 5 s
        step(scheduler, now=5.0 * i)
        add(scheduler, make_request(f"s{i}", [1], max_tokens=1, arrival=10 + i))
    with pytest.raises(OverloadError) as refusal:
        scheduler.add(make_request("more", [1]))
    assert refusal.value.retry_after == pytest.approx(5.0, rel=0.5)


# ---------------------------------------------------------------------------------------------
# without chunked prefill


def test_without_chunked_prefill_a_prompt_is_computed_whole():
    scheduler = make_scheduler(budget=16, enable_chunked_prefill=False)
    with pytest.raises(
        ContextLengthError,
        match=r"17 tokens, but without chunked prefill .* max_num_batched_tokens = 16",
    ):
        scheduler.add(make_request("huge", [1] * 17))
    add(scheduler, make_request("a", range(1, 11)), make_request("b", range(50, 61), arrival=1.0))
    plans = drain(scheduler)
    assert [(c.request_id, c.num_tokens) for c in plans[0].chunks] == [("a", 10)]
    assert dict(plans[0].waiting) == {"b": "no_budget"}
    assert [(c.request_id, c.num_tokens) for c in plans[1].chunks] == [("a", 1), ("b", 11)]


def test_without_chunked_prefill_only_what_exceeds_a_step_is_split():
    scheduler = make_scheduler(budget=8, enable_chunked_prefill=False)
    (replayed,) = add(scheduler, make_request("a", [1] * 8, max_tokens=12, output_ids=[2] * 10))
    assert [[c.num_tokens for c in plan.chunks] for plan in drain(scheduler)] == [
        [8],
        [8],
        [2],
        [1],
    ]
    assert len(replayed.output_ids) == 12


# -------------------------------------------------------------------------------------------------------------- update


def update_with(request, tokens, **config):
    scheduler = make_scheduler(**config)
    scheduler.add(request)
    finished = scheduler.update(scheduler.plan(0.0), {request.id: tokens})
    check_books(scheduler)
    return finished


@pytest.mark.parametrize(
    ("fields", "drawn", "kept", "reason"),
    [
        ({}, [7], [7], None),
        ({}, [7, 8, 9], [7, 8, 9], None),
        ({}, [7, 8, 9, 10, 11], [7, 8, 9, 10], FinishReason.LENGTH),
        ({"eos_ids": frozenset({8})}, [7, 8, 9], [7, 8], FinishReason.STOP),
        ({"eos_ids": frozenset({8}), "min_tokens": 2}, [8, 8, 9], [8, 8, 9], None),
        ({"eos_ids": frozenset({8}), "min_tokens": 2}, [8, 8, 8, 9], [8, 8, 8], FinishReason.STOP),
        ({"eos_ids": frozenset({8}), "max_tokens": 1}, [8], [8], FinishReason.STOP),
        (
            {"max_tokens": 30},
            list(range(20)),
            list(range(14)),
            FinishReason.LENGTH,
        ),  # the context's end
    ],
)
def test_where_tokens_stop(fields, drawn, kept, reason):
    request = make_request("a", [1, 2], **fields)
    finished = update_with(request, drawn, length=16)
    assert request.output_ids == kept and request.finish_reason is reason
    assert finished == ([request] if reason else [])


def test_several_tokens_are_computed_in_the_next_step():
    scheduler = make_scheduler()
    (request,) = add(scheduler, make_request("a", [1, 2, 3], max_tokens=9))
    scheduler.update(scheduler.plan(0.0), {"a": [7, 8, 9]})
    plan = scheduler.plan(0.0)
    assert [(c.start, c.num_tokens, c.samples) for c in plan.chunks] == [(3, 3, True)]
    scheduler.update(plan, {"a": [4]})
    assert request.output_ids == [7, 8, 9, 4]


@pytest.mark.parametrize("prompt", [4, 5])
def test_a_step_that_drew_nothing_computes_its_last_position_again(prompt):
    scheduler = make_scheduler(size=4)
    (request,) = add(scheduler, make_request("a", range(1, prompt + 1)))
    scheduler.update(scheduler.plan(0.0), {})
    check_books(scheduler)
    assert (
        len(scheduler.pool.cached[0]) == (prompt - 1) // 4
    )  # the block to be written again is not published
    plan, _ = step(scheduler)
    assert [(c.start, c.num_tokens, c.samples) for c in plan.chunks] == [(prompt - 1, 1, True)]
    assert request.output_ids == [5]


def following(scheduler, plan):
    return [(c.request_id, c.start, len(c.tables[0])) for c in scheduler.following(plan)]


def test_what_follows_a_plan_is_what_the_next_one_wants():
    """A token behind the one that is drawn, in a block that is taken now."""
    scheduler = make_scheduler(seqs=2)
    add(scheduler, make_request("a", [1, 2, 3]), make_request("b", [1] * 6, arrival=1.0))
    plan = scheduler.plan(0.0)
    assert following(scheduler, plan) == [("a", 3, 1), ("b", 6, 2)]
    scheduler.update(plan, {"a": [7], "b": [7]})
    plan = scheduler.plan(0.0)
    assert following(scheduler, plan) == [("a", 4, 2), ("b", 7, 2)]
    scheduler.update(plan, {"a": [8], "b": [8]})
    check_books(scheduler, ahead=("a", "b"))
    wanted = [(c.request_id, c.start, len(c.tables[0])) for c in scheduler.plan(0.0).chunks]
    assert wanted == [("a", 4, 2), ("b", 7, 2)]


def test_nobody_is_preempted_for_what_follows():
    """Who has no block for it is not among it: the next plan decides who gets one."""
    scheduler = make_scheduler(blocks=4)
    for name, arrival in (("a", 0.0), ("b", 1.0)):
        add(scheduler, make_request(name, [1, 2, 3], max_tokens=9, arrival=arrival))
    seen = []
    for token in range(10, 16):
        plan = scheduler.plan(0.0)
        seen = following(scheduler, plan)
        scheduler.update(plan, {"a": [token], "b": [token]})
        assert scheduler.preemptions == 0
    assert [chunk.end for chunk in plan.chunks] == [8, 8] and seen == []
    assert scheduler.plan(0.0).preempted == ("b",)


@pytest.mark.parametrize(
    ("fields", "length"),
    [({"max_tokens": 2}, 64), ({"max_tokens": 9}, 6)],
    ids=["its own length", "the context"],
)
def test_nothing_follows_the_last_token(fields, length):
    scheduler = make_scheduler(length=length)
    add(scheduler, make_request("a", [1, 2, 3], **fields))
    plan = scheduler.plan(0.0)
    seen = []
    while plan.chunks:
        seen.append(following(scheduler, plan))
        scheduler.update(plan, {"a": [7]})
        plan = scheduler.plan(0.0)
    assert [bool(chunks) for chunks in seen] == [True] * (len(seen) - 1) + [False]
    assert scheduler.drained


def test_full_blocks_are_published_when_their_step_is_over():
    scheduler = make_scheduler(size=4)
    add(scheduler, make_request("a", range(1, 10)))
    plan = scheduler.plan(0.0)
    assert not scheduler.pool.cached[0]
    scheduler.update(plan, {"a": [5]})
    assert len(scheduler.pool.cached[0]) == 2


def test_misuse_is_our_own_fault():
    scheduler = make_scheduler(budget=8)
    (request,) = add(scheduler, make_request("a", range(1, 20)))
    plan = scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="neither updated nor rolled back"):
        scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="does not sample"):
        scheduler.update(plan, {"a": [1]})
    with pytest.raises(AssertionError, match="step 1 is over"):
        scheduler.update(plan, {})
    scheduler.plan(0.0)
    with pytest.raises(AssertionError, match="step 2 is under way, not 1"):
        scheduler.rollback(plan)
    with pytest.raises(AssertionError, match="added once"):
        scheduler.add(request)


# --------------------------------------------------------------------------------------------------- abort and failure


def test_abort_in_every_state():
    scheduler = make_scheduler(blocks=6, size=2, length=12, seqs=3)
    first, last, waiting = add(
        scheduler,
        make_request("first", [1, 2, 3], max_tokens=8),
        make_request("last", [4, 5, 6], max_tokens=8, arrival=1.0),
        make_request("waiting", [7], arrival=2.0),
    )
    assert scheduler.abort("waiting") is waiting and waiting.finish_reason is FinishReason.ABORT
    while not last.num_preemptions:
        step(scheduler)
    assert (
        scheduler.abort("last") is last
        and scheduler.abort("last") is None
        and scheduler.abort("nobody") is None
    )
    plan = scheduler.plan(0.0)
    assert scheduler.abort("first", FinishReason.ERROR) is first
    output = list(first.output_ids)
    assert scheduler.update(plan, {"first": [5]}) == [] and first.output_ids == output
    assert first.finish_reason is FinishReason.ERROR and scheduler.drained


def test_an_id_used_again_during_a_step_is_another_request():
    scheduler = make_scheduler()
    add(scheduler, make_request("a", [1, 2]))
    plan = scheduler.plan(0.0)
    scheduler.abort("a")
    (again,) = add(scheduler, make_request("a", [3, 4]))
    assert scheduler.update(plan, {"a": [5]}) == [] and again.output_ids == []
    plan = scheduler.plan(0.0)
    scheduler.abort("a")
    (third,) = add(scheduler, make_request("a", [3, 4]))
    scheduler.rollback(plan)
    assert third.num_computed_tokens == 0
    drain(scheduler)


def test_rollback_computes_the_step_again():
    scheduler = make_scheduler(budget=8)
    (request,) = add(scheduler, make_request("a", range(1, 12)))
    step(scheduler)
    used = scheduler.pool.num_used
    plan = scheduler.plan(0.0)
    scheduler.rollback(plan)
    check_books(scheduler)
    assert request.num_computed_tokens == 8 and scheduler.pool.num_used == used
    assert len(scheduler.pool.cached[0]) == 2
    again = scheduler.plan(0.0)
    assert [(c.start, c.num_tokens) for c in again.chunks] == [
        (c.start, c.num_tokens) for c in plan.chunks
    ]
    scheduler.abort("a")
    scheduler.rollback(again)
    assert scheduler.drained


def test_an_empty_plan_may_be_updated_or_left():
    scheduler = make_scheduler()
    plan = scheduler.plan(0.0)
    assert plan.chunks == () and plan.num_tokens == 0
    assert scheduler.update(plan, {}) == []
    scheduler.plan(0.0)
    scheduler.plan(0.0)


def test_a_numerical_failure_takes_its_blocks_from_the_cache():
    scheduler = make_scheduler(size=4)
    (bad,) = add(scheduler, make_request("bad", range(1, 14), max_tokens=9))
    step(scheduler)
    add(scheduler, make_request("reader", [*range(1, 14), 50, 51, 52, 53], arrival=1.0))
    step(scheduler)
    assert (
        scheduler.fail("bad") is bad
        and bad.finish_reason is FinishReason.ERROR
        and scheduler.fail("bad") is None
    )
    assert not scheduler.pool.cached[0]
    check_books(scheduler)
    drain(scheduler)
    assert not scheduler.pool.cached[0]  # the reader had read them: it published nothing after


# ----------------------------------------------------------------------------------------------------------- deadlines


def test_deadlines_end_waiting_and_running_requests():
    scheduler = make_scheduler(seqs=1)
    running, waiting = add(
        scheduler,
        make_request("running", [1], max_tokens=50, deadline=2.0),
        make_request("waiting", [1], deadline=1.0, arrival=1.0),
    )
    assert step(scheduler, now=0.5)[0].expired == ()
    assert step(scheduler, now=1.0)[0].expired == ("waiting",)
    assert step(scheduler, now=3.0)[0].expired == ("running",)
    assert (
        running.finish_reason is waiting.finish_reason is FinishReason.DEADLINE
        and scheduler.drained
    )


def test_old_deadlines_do_no_harm_and_are_forgotten():
    scheduler = make_scheduler()
    for i in range(200):
        add(scheduler, make_request(f"r{i}", [1], deadline=1e9))
        scheduler.abort(f"r{i}")
        scheduler.plan(0.0)
    assert len(scheduler._deadlines) <= 66
    add(scheduler, make_request("a", [1], deadline=1.0))
    scheduler.abort("a")
    add(scheduler, make_request("a", [1], deadline=9.0))
    assert step(scheduler, now=2.0)[0].expired == ()
    scheduler.abort("a")
    add(scheduler, make_request("a", [1], max_tokens=9))
    assert step(scheduler, now=10.0)[0].expired == ()


@pytest.mark.parametrize(
    ("harm", "invariant"),
    [
        (lambda s: s._running.append(s._running[0]), "I7: the running"),
        (lambda s: s._waiting.turns._lanes[""].waiting.reverse(), "I7: the waiting"),
        (lambda s: setattr(s.requests["b"], "status", RequestStatus.FINISHED), "I10"),
        (lambda s: setattr(s._waiting.backlog, "num_tokens", 1), "I12: the queue"),
    ],
)
def test_check_names_the_broken_invariant(harm, invariant):
    scheduler = make_scheduler(seqs=1)
    add(scheduler, *(make_request(name, [1, 2], arrival=i) for i, name in enumerate("abc")))
    step(scheduler)
    harm(scheduler)
    with pytest.raises(AssertionError, match=invariant):
        check_books(scheduler)


def cheapest_step_of_decodes(num: int) -> float:
    """CPU seconds of planning and updating `num` decodes: the least of 30 steps, so that other work
    hardly shows."""
    scheduler = Scheduler(
        EngineConfig(max_num_seqs=num, max_num_batched_tokens=65_536, max_model_len=4096),
        BlockPool(60_000, 16, key=KEY),
    )
    for i in range(num):
        scheduler.add(make_request(f"r{i}", [i + 1] * 200, max_tokens=300))
    step(scheduler)
    costs = []
    for _ in range(30):
        began = process_time()
        plan = scheduler.plan(0.0)
        drawn = {chunk.request_id: [5] for chunk in plan.chunks}
        scheduler.update(plan, drawn)
        costs.append(process_time() - began)
        assert len(drawn) == num
    return min(costs)


def test_a_step_costs_in_proportion_to_its_requests():
    # Eight times the requests, and no more than fourteen times the work: one scan of all requests
    # for each of them would make it sixty-four. In a process of its own, for measuring coverage
    # takes ten times what a step does.
    code = "from schedule.test_scheduler import cheapest_step_of_decodes as f; print(f(256), f(32))"
    env = {k: v for k, v in os.environ.items() if not k.startswith("COV")} | {
        "PYTHONPATH": str(Path(__file__).parents[1])
    }
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    most, few = map(float, run.stdout.split())
    assert most < 14 * few
    assert most < 0.006  # about 0.5 ms on an idle core
