"""Snapshots of recurrent states: where they are taken, who starts from them, and which goes first.
Positions and counts are worked by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moebius.request.finish import FinishReason
from moebius.schedule.groups import CacheGroups, GroupSpec, StateSpec
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Scheduler, StepPlan
from schedule.making import drain, make_request, make_scheduler, step

DRAWN = 5  # what every step draws
SIZE = 4


def scheduler_of(
    slots: int = 20,
    *,
    interval: int = 100,
    apart: int = 1,
    windows: tuple[int | None, ...] = (None,),
    **options: object,
) -> Scheduler:
    groups = CacheGroups(tuple(map(GroupSpec, windows)), StateSpec(slots, 0, interval, apart))
    return make_scheduler(size=SIZE, groups=groups, **options)


def text(count: int, first: int = 100) -> list[int]:
    return list(range(first, first + count))


def serve(scheduler: Scheduler, name: str, prompt: Sequence[int], **fields: object) -> Request:
    """Alone, to its end."""
    request = make_request(name, prompt, **fields)
    scheduler.add(request)
    drain(scheduler)
    return request


def chunks_of(plans: Sequence[StepPlan], name: str) -> list[tuple[int, int]]:
    return [(c.start, c.end) for plan in plans for c in plan.chunks if c.request_id == name]


def taken(plans: Sequence[StepPlan]) -> list[int]:
    """Where snapshots are taken, in order."""
    return [c.end for plan in plans for c in plan.chunks if c.states and c.states.save is not None]


def kept(scheduler: Scheduler, request: Request) -> list[int]:
    """Where a request has snapshots that can be found."""
    found = scheduler.pool.states.cached[0]
    return [(i + 1) * SIZE for i, digest in enumerate(request.block_hashes) if digest in found]


@pytest.mark.parametrize(
    ("generation_start", "turn"), [(None, 20), (22, 20), (20, 20), (18, 16), (16, 16), (3, None)]
)
def test_a_chunk_ends_where_the_next_turn_can_start(generation_start, turn):
    """At the last block before the generation prompt; else at the last one that leaves a token of
    the same prompt to compute."""
    scheduler = scheduler_of()
    request = make_request("a", text(22), max_tokens=1, generation_start=generation_start)
    scheduler.add(request)
    plans = drain(scheduler)
    wanted = [] if turn is None else [turn]
    assert taken(plans) == kept(scheduler, request) == wanted
    assert [end for _, end in chunks_of(plans, "a")] == [*wanted, 22]


def test_whole_blocks_leave_the_last_token():
    scheduler = scheduler_of()
    request = serve(scheduler, "a", text(24), max_tokens=1)
    assert kept(scheduler, request) == [20, 24], "24 is behind the prompt: where its answer begins"


def test_a_turn_whose_template_drops_the_thinking_starts_before_the_generation_prompt():
    scheduler = scheduler_of()
    first = serve(scheduler, "a", text(22), max_tokens=30, generation_start=18)
    follows = serve(scheduler, "b", [*first.prompt_ids[:18], *text(30, 200)], max_tokens=1)
    assert follows.num_cached_tokens == 16


def test_a_turn_that_keeps_the_answer_starts_behind_it():
    """22 tokens of prompt and 11 of 12 drawn ones are computed: 33, of which 32 fill blocks."""
    scheduler = scheduler_of()
    first = make_request("a", text(22), max_tokens=12, generation_start=18)
    scheduler.add(first)
    plans = drain(scheduler)
    assert taken(plans) == [16, 24, 28, 32], "a copy for each block of an answer"
    assert kept(scheduler, first) == [16, 32]
    history = [*first.prompt_ids, *first.output_ids]
    follows = serve(scheduler, "b", [*history, *text(9, 200)], max_tokens=1)
    assert follows.num_cached_tokens == 32


def test_an_answer_that_was_cut_off_is_gone_on_from_too():
    """A stop string, or a client that leaves, ends a request from outside."""
    scheduler = scheduler_of()
    request = make_request("a", text(22), max_tokens=90)
    scheduler.add(request)
    while len(request.output_ids) < 8:
        step(scheduler)
    scheduler.abort("a", FinishReason.ABORT)
    assert kept(scheduler, request) == [20, 28]


def test_a_preempted_answer_goes_on_from_the_last_snapshot_that_is_left():
    """Twelve blocks of 4. Both hold six when `first` needs a seventh, and gets the last of `last`.
    Once it is over, at 30 tokens, `last` finds four of its blocks and the snapshot behind them."""
    scheduler = scheduler_of(blocks=12, seqs=2, length=40, interval=2)
    first = make_request("first", text(5), max_tokens=26)
    last = make_request("last", text(5, 200), max_tokens=26, arrival=1.0)
    scheduler.add(first)
    scheduler.add(last)
    while not last.num_preemptions:
        step(scheduler)
    assert kept(scheduler, last) == [4, 8, 16, 20], "24 went with its block"
    starts = [start for start, _ in chunks_of(drain(scheduler), "last")]
    assert starts[:2] == [16, 24], "on to the next full block of what is known"
    assert len(last.output_ids) == 26


def test_a_failed_step_costs_the_tokens_of_one_block():
    scheduler = scheduler_of()
    request = make_request("a", text(22), max_tokens=30)
    scheduler.add(request)
    while len(request.output_ids) < 8:
        step(scheduler)
    scheduler.rollback(scheduler.plan(0.0))
    (again,) = scheduler.plan(0.0).chunks
    assert again.start == 28 and again.states.restore is not None


def test_what_two_share_is_not_replaced_by_one():
    """Both answer with the same tokens; `a` ends first, and its last snapshot stays."""
    scheduler = scheduler_of()
    ended = make_request("a", text(22), max_tokens=8)
    longer = make_request("b", text(22), max_tokens=20, arrival=1.0)
    scheduler.add(ended)
    scheduler.add(longer)
    drain(scheduler)
    assert 28 in kept(scheduler, ended) and kept(scheduler, longer)[-1] == 40


@pytest.mark.parametrize("interval", [2, 3])
def test_a_long_prompt_has_snapshots_on_its_way(interval):
    scheduler = scheduler_of(interval=interval)
    request = make_request("a", text(50), max_tokens=1, generation_start=45)
    scheduler.add(request)
    plans = drain(scheduler)
    assert taken(plans) == [
        *range(interval * SIZE, 44, interval * SIZE),
        44,
        *[48] * (interval < 4),
    ]
    follows = serve(scheduler, "b", [*text(30), *text(30, 300)], max_tokens=1)
    assert follows.num_cached_tokens == 30 // (interval * SIZE) * interval * SIZE


def test_those_on_the_way_go_first_until_somebody_has_started_from_one():
    """Five slots: one for who runs, four for snapshots. The long prompt has six of them."""
    scheduler = scheduler_of(5, interval=2)
    short = serve(scheduler, "short", text(6, 500), max_tokens=1)
    long = serve(scheduler, "long", text(50), max_tokens=1)
    assert kept(scheduler, short) == [4], "used longest ago, and still there"
    assert kept(scheduler, long) == [8, 16, 48]
    serve(scheduler, "from 16", [*text(17), *text(3, 300)], max_tokens=1)
    serve(scheduler, "other", text(30, 600), max_tokens=1)
    assert 16 in kept(scheduler, long) and 8 not in kept(scheduler, long)


@pytest.mark.parametrize("keeps", [True, False])
def test_what_a_chat_has_gone_beyond_goes_before_what_others_have_left(keeps):
    """Seven slots: one for who runs, two for an idle chat, two for the last turn of a busy one, and
    two for its next."""
    scheduler = scheduler_of(7)
    idle = serve(scheduler, "idle", text(22, 500), max_tokens=8, generation_start=18)
    busy = serve(scheduler, "0", text(22), max_tokens=8, generation_start=18)
    for turn in range(1, 6):
        history = [*busy.prompt_ids, *busy.output_ids] if keeps else [*busy.prompt_ids[:-4]]
        prompt = [*history, *text(8, 100 * turn)]
        busy = serve(scheduler, str(turn), prompt, max_tokens=8, generation_start=len(prompt) - 4)
        assert busy.num_cached_tokens >= len(history) - SIZE, "each turn computes what is new"
        assert kept(scheduler, idle) == [16, 28]


def test_where_several_went_on_is_kept_for_the_next():
    """A document under many questions: what is asked last goes first, and not the document."""
    scheduler = scheduler_of(5)
    document = text(40)
    found = []
    for number in range(8):
        prompt = [*document, *text(8, 200 + 20 * number)]
        asked = serve(scheduler, str(number), prompt, max_tokens=8, generation_start=46)
        follows = [*prompt, *asked.output_ids, *text(8, 600)]
        serve(scheduler, f"{number} again", follows, max_tokens=1, generation_start=len(follows))
        found.append(asked.num_cached_tokens)
    assert found == [0, 0, 40, 40, 40, 40, 40, 40]


def test_a_snapshot_goes_with_the_last_block_before_it():
    scheduler = scheduler_of(blocks=8)
    first = serve(scheduler, "a", text(22), max_tokens=1)
    assert kept(scheduler, first) == [20]
    serve(scheduler, "b", text(15, 300), max_tokens=1)
    # Four blocks of eight: those behind 16 went first, as there were three that nobody had.
    assert kept(scheduler, first) == [] and len(scheduler.pool.states.cached[0]) == 1


COMMON = 40


def shares(name: str, number: int, **fields: object) -> Request:
    own = text(8, 200 + 100 * number)
    return make_request(name, [*text(COMMON), *own], max_tokens=1, arrival=number, **fields)


@pytest.mark.parametrize(("apart", "found"), [(1, COMMON), (10, COMMON), (11, 0)])
def test_the_third_with_the_same_beginning_starts_where_the_first_two_parted(apart, found):
    """A system prompt: nobody knows where it ends before the second has come."""
    scheduler = scheduler_of(apart=apart)
    cached = []
    for number in range(3):
        request = shares(f"r{number}", number)
        scheduler.add(request)
        drain(scheduler)
        cached.append(request.num_cached_tokens)
    assert cached == [0, 0, found]


@pytest.mark.parametrize("windows", [(), (None,), (6,), (None, 6)])
def test_who_comes_while_its_beginning_is_computed_waits_for_it(windows):
    """Of six prompts at once the common beginning is computed once."""
    scheduler = scheduler_of(budget=16, windows=windows)
    for number in range(6):
        scheduler.add(shares(f"r{number}", number))
    plans = drain(scheduler)
    assert sum(plan.num_tokens for plan in plans) == COMMON + 6 * 8
    assert COMMON in [end for _, end in chunks_of(plans, "r0")]
    assert any("prefix_in_flight" in plan.waiting.values() for plan in plans)


def test_who_shares_little_waits_for_nobody_and_asks_nobody_to_stop():
    scheduler = scheduler_of(budget=16, apart=11)
    for number in range(3):
        scheduler.add(shares(f"r{number}", number))
    plans = drain(scheduler)
    assert not any("prefix_in_flight" in plan.waiting.values() for plan in plans)
    assert chunks_of(plans, "r0") == [(0, 16), (16, 32), (32, 44), (44, 48)]


def test_choices_of_one_prompt_start_from_its_one_snapshot():
    """The last block that they share is one behind: that is not worth another stop."""
    scheduler = scheduler_of(apart=2, budget=32)
    for i, name in enumerate("abc"):
        prompt = make_request(name, text(23), max_tokens=1, generation_start=17, arrival=i)
        scheduler.add(prompt)
    plans = drain(scheduler)
    assert chunks_of(plans, "a") == [(0, 16), (16, 23)]
    assert chunks_of(plans, "b") == chunks_of(plans, "c") == [(16, 23)]


def test_nobody_waits_where_no_snapshot_can_be_taken():
    """One slot for each of two sequences, and none besides."""
    scheduler = scheduler_of(2, budget=16, seqs=2)
    for number in range(2):
        scheduler.add(shares(f"r{number}", number))
    plans = drain(scheduler)
    assert not any("prefix_in_flight" in plan.waiting.values() for plan in plans)
