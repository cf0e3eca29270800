"""Drafts: what is guessed, when it pays, and what a step makes of it. That they change no token
whatever is guessed, and leave nothing behind, the simulation says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from random import Random

import pytest

from moebius.request.finish import FinishReason
from moebius.request.params import MOST_DRAFTS
from moebius.schedule import drafts
from moebius.schedule.blocks import BlockPool
from moebius.schedule.config import SchedulerConfig
from moebius.schedule.drafts import (
    DraftingScheduler,
    Guesser,
    Lookup,
    StepCosts,
    least_share,
    worthwhile,
)
from moebius.schedule.groups import CacheGroups, StateSpec
from moebius.schedule.request import Request
from moebius.schedule.scheduler import StepPlan
from schedule.books import check_books
from schedule.making import KEY, make_request

FREE = StepCosts([(1, 1.0), (64, 1.0)])
AS_ROWS = StepCosts([(1, 1.0), (64, 64.0)])
DEAR = StepCosts([(1, 1.0), (64, 55.0)])


class Sevens:
    """Guesses that all goes on with 7."""

    share = 1.0
    rest = 0

    def guess(self, request: Request, most: int) -> Sequence[int]:
        return [7] * most


def make_scheduler(
    guesser: type[Guesser] = Sevens,
    *,
    costs: StepCosts = FREE,
    most_rows: int = 64,
    blocks: int = 64,
    seqs: int = 8,
    budget: int = 64,
    length: int = 256,
) -> DraftingScheduler:
    config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=length)
    return DraftingScheduler(config, BlockPool(blocks, 4, key=KEY), costs, most_rows, guesser)


def take(scheduler: DraftingScheduler, drawn: dict[str, list[int]]) -> StepPlan:
    """A step in which each that samples draws so; the books are checked after each half."""
    plan = scheduler.plan(0.0)
    check_books(scheduler)
    ids = [chunk.request_id for chunk in plan.chunks if chunk.samples]
    scheduler.update(plan, {id: drawn[id] for id in ids})
    check_books(scheduler)
    return plan


def start(scheduler: DraftingScheduler, request: Request) -> None:
    """Its prompt is computed and 7 was drawn."""
    scheduler.add(request)
    take(scheduler, {request.id: [7]})


# ----------------------------------------------------------------------------------- what is guessed


def naive(tokens: Sequence[int], most: int) -> list[int]:
    """What followed the last three tokens where they stood last, found by comparing all."""
    text = list(tokens)
    for start in range(len(text) - 4, -1, -1):
        if text[start : start + 3] == text[-3:]:
            for _ in range(most):
                text.append(text[start + 3 + len(text) - len(tokens)])
            return text[len(tokens) :]
    return []


@pytest.mark.parametrize("vocab", [2, 5, 300, 200_000])
def test_a_lookup_finds_what_comparing_all_finds(vocab: int) -> None:
    """Token by token, and with several at a time; ids that are no whole character among them."""
    rng = Random(vocab)
    found = 0
    for _ in range(30):
        ids = [rng.randrange(vocab) for _ in range(6)]
        ids += [rng.randrange(0xD800, 0xE000), sys.maxunicode]
        request = make_request("one", [0], max_tokens=200)
        request.prompt_ids = tuple(rng.choices(ids, k=rng.randint(1, 40)))
        lookup = Lookup()
        for _ in range(30):
            most = rng.randint(0, 8)
            guessed = list(lookup.guess(request, most))
            assert guessed == naive(request.tokens(0, request.num_tokens), most)
            found += bool(guessed)
            request.output_ids += rng.choices(ids, k=rng.randint(0, 3))
    assert found > 50


def test_a_lookup_reaches_back_so_far_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "_REACH", 20)
    request = make_request("one", [1, 2, 3, 4, *range(100, 140), 1, 2, 3], max_tokens=99)
    assert Lookup().guess(request, 1) == ()
    lookup = Lookup()
    for token in range(200, 300):
        request.output_ids.append(token)
        lookup.guess(request, 1)
        assert len(lookup._text) <= 40
    request.output_ids += [290, 291, 292]
    assert list(lookup.guess(request, 2)) == [293, 294]


def test_a_lookup_rests_longer_with_each_that_found_nothing() -> None:
    """By steps of the scheduler, which does not ask meanwhile: one more each time, four at most."""
    asked = []

    class Watched(Lookup):
        def guess(self, request: Request, most: int) -> Sequence[int]:
            asked.append(request.num_tokens)
            return super().guess(request, most)

    scheduler = make_scheduler(Watched, costs=DEAR)
    scheduler.add(make_request("one", [1], max_tokens=99))
    for token in (*range(2, 20), *range(1, 9)):
        take(scheduler, {"one": [token]})
    # With 25 tokens it finds what came behind 4, 5, 6, and so it does with each from then on.
    assert asked == [1, 3, 6, 10, 15, 20, 25, 26]


def test_what_is_drawn_tells_how_good_guesses_are() -> None:
    """Verified or not: a text that repeats itself raises the share, one that does not lowers it."""
    rng = Random(0)
    loop = make_request("loop", [1, 2, 3, 4] * 3, max_tokens=200)
    lookup = Lookup()
    shares = []
    for place in range(20):
        lookup.guess(loop, 7)
        shares.append(lookup.share)
        loop.output_ids.append(1 + place % 4)
    assert shares == sorted(shares) and shares[0] < 0.4 and shares[-1] > 0.9
    for _ in range(40):
        lookup.guess(loop, 7)
        loop.output_ids.append(rng.randrange(1, 3))
    assert lookup.share < 0.7


# ----------------------------------------------------------------------------------- where it pays


@pytest.mark.parametrize(
    ("share", "costs", "expected"),
    [
        # One sequence: 1 + share for two rows, 1 + share + share^2 for three, over their cost.
        (0.9, [(1, 1.0), (8, 1.0)], 7),
        (0.0, [(1, 1.0), (8, 1.0)], 0),
        (0.45, [(1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5)], 0),
        (0.6, [(1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5)], 1),
        # 1.9 / 1.5 = 1.27; 2.71 / 1.6 = 1.69; 3.44 / 1.7 = 2.02; then 4.1 / 2.7.
        (0.9, [(1, 1.0), (2, 1.5), (4, 1.7), (5, 2.7), (8, 5.7)], 3),
    ],
)
def test_as_many_drafts_as_bring_most_tokens_for_their_time(
    share: float, costs: list[tuple[int, float]], expected: int
) -> None:
    assert worthwhile(share, 1.0, 1, MOST_DRAFTS, StepCosts(costs)) == expected


def test_below_the_least_share_nothing_pays_and_a_little_above_it_does() -> None:
    costs = StepCosts([(1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5), (64, 36.0)])
    for rows in (1, 2, 3, 7):
        least = least_share(rows, costs)
        assert not worthwhile(least, float(rows), rows, MOST_DRAFTS, costs) or not least
        assert worthwhile(least + 0.02, float(rows), rows, MOST_DRAFTS, costs)
    assert abs(least_share(1, costs) - 0.5) < 0.02  # 1 + 0.5 tokens for 1.5
    assert least_share(64, costs) == 2.0 and least_share(200, costs) == 2.0


def test_costs_between_what_was_measured_are_interpolated() -> None:
    costs = StepCosts([(1, 1.0), (2, 1.5), (4, 2.0), (8, 5.0)])
    assert [costs.of(rows) for rows in (1, 2, 3, 4, 6, 8)] == [1.0, 1.5, 1.75, 2.0, 3.5, 5.0]
    assert costs.of(16) == 10.0  # beyond the last a row costs what they cost on average


def test_a_batch_that_fills_the_machine_drafts_nothing() -> None:
    """Even where every guess would be right: beyond what is cheap a row costs what a token does."""
    few = StepCosts([(1, 1.0), (4, 1.0), (64, 16.0)])
    for sequences, drafted in ((1, 3), (3, 1), (4, 0), (8, 0)):
        scheduler = make_scheduler(costs=few)
        ids = [str(i) for i in range(sequences)]
        for id in ids:
            scheduler.add(make_request(id, [1, 2], max_tokens=30))
        take(scheduler, {id: [7] for id in ids})
        plan = take(scheduler, {id: [8] for id in ids})
        assert sum(len(chunk.drafts) for chunk in plan.chunks) == drafted


def test_drafts_that_would_cost_what_they_bring_are_not_made() -> None:
    scheduler = make_scheduler(costs=AS_ROWS)
    start(scheduler, make_request("one", [1, 2], max_tokens=30))
    assert take(scheduler, {"one": [7]}).chunks[0].drafts == ()


# ----------------------------------------------------------------------------------- what a step makes of it


def test_right_drafts_are_kept_and_wrong_ones_leave_nothing() -> None:
    scheduler = make_scheduler()
    request = make_request("one", [1, 2, 3], max_tokens=30)
    start(scheduler, request)
    free = scheduler.pool.num_free
    plan = take(scheduler, {"one": [7, 7, 8]})
    (chunk,) = plan.chunks
    assert chunk.drafts == (7,) * 7 and plan.num_tokens == 8
    # Of 4 + 3 tokens the last is not computed; those before it fill a block and a half.
    assert request.output_ids == [7, 7, 7, 8] and request.num_computed_tokens == 6
    assert scheduler.pool.num_free == free - 1 and len(scheduler.pool.cached[0]) == 1
    (chunk,) = take(scheduler, {"one": [9]}).chunks
    assert (chunk.start, chunk.num_tokens) == (6, 1)


def test_no_token_behind_a_wrong_draft_is_taken_as_computed() -> None:
    """Even where it is the draft at its place: its row saw another token before it."""
    scheduler = make_scheduler()
    request = make_request("one", [1, 2, 3], max_tokens=30)
    start(scheduler, request)
    before = request.num_tokens
    take(scheduler, {"one": [7, 8, 7]})
    assert request.output_ids[-3:] == [7, 8, 7] and request.num_computed_tokens == before + 1


def test_a_step_that_failed_is_made_again_with_its_drafts() -> None:
    scheduler = make_scheduler()
    request = make_request("one", [1, 2, 3], max_tokens=30)
    start(scheduler, request)
    first = scheduler.plan(0.0)
    scheduler.rollback(first)
    check_books(scheduler)
    assert request.num_computed_tokens == 3 and len(request.tables[0]) == 1
    again = scheduler.plan(0.0)
    assert again.chunks[0].drafts == first.chunks[0].drafts
    scheduler.update(again, {"one": [7] * 8})
    assert request.num_tokens == 12 and request.num_computed_tokens == 11


def test_a_stop_among_right_drafts_ends_the_request() -> None:
    scheduler = make_scheduler()
    request = make_request("one", [1, 2], max_tokens=30, eos_ids=frozenset({9}))
    start(scheduler, request)
    take(scheduler, {"one": [7, 9, 7, 7]})
    assert request.output_ids == [7, 7, 9] and request.finish_reason is FinishReason.STOP
    assert scheduler.drained


def test_drafts_go_no_further_than_max_tokens_and_the_context() -> None:
    for length, max_tokens in ((256, 6), (8, 30)):
        scheduler = make_scheduler(length=length)
        request = make_request("one", [1, 2], max_tokens=max_tokens)
        start(scheduler, request)
        (chunk,) = take(scheduler, {"one": [7] * 5}).chunks
        assert len(chunk.drafts) == 4
        assert len(request.output_ids) == 6 and request.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("budget", "most_rows", "expected"), [(12, 64, [7, 2, 0]), (64, 5, [2, 0, 0])]
)
def test_drafts_get_what_is_left_in_the_order_of_service(
    budget: int, most_rows: int, expected: list[int]
) -> None:
    """Of the step's tokens, and of its rows with logits."""
    scheduler = make_scheduler(seqs=3, budget=budget, most_rows=most_rows)
    for order, id in enumerate("abc"):
        scheduler.add(make_request(id, [1, 2], max_tokens=30, arrival=float(order)))
    take(scheduler, {id: [7] for id in "abc"})
    plan = take(scheduler, {id: [7] for id in "abc"})
    assert [len(chunk.drafts) for chunk in plan.chunks] == expected


def test_prompts_go_before_drafts() -> None:
    scheduler = make_scheduler(seqs=2, budget=16)
    start(scheduler, make_request("one", [1, 2], max_tokens=30))
    scheduler.add(make_request("two", list(range(14)), arrival=1.0))
    plan = take(scheduler, {"one": [7], "two": [3]})
    assert [(chunk.num_tokens, len(chunk.drafts)) for chunk in plan.chunks] == [(1, 1), (14, 0)]


def test_drafts_take_blocks_that_can_be_had_and_nobody_elses() -> None:
    scheduler = make_scheduler(blocks=3, seqs=2)
    scheduler.add(make_request("a", [1, 2, 3, 4], max_tokens=5, arrival=0.0))
    scheduler.add(make_request("b", [5], max_tokens=8, arrival=1.0))
    take(scheduler, {id: [7] for id in "ab"})
    plan = take(scheduler, {id: [7] for id in "ab"})
    # The third block is a's, and b drafts in what is left of its own.
    assert [len(chunk.drafts) for chunk in plan.chunks] == [3, 2]
    assert scheduler.pool.num_free == 0
    plan = take(scheduler, {id: [8] for id in "ab"})
    assert [len(chunk.drafts) for chunk in plan.chunks] == [2, 1] and not plan.preempted


def test_models_with_states_are_refused() -> None:
    pool = BlockPool(8, 4, groups=CacheGroups(states=StateSpec(4)), key=KEY)
    config = SchedulerConfig(max_model_len=64)
    with pytest.raises(AssertionError, match="cannot be taken back"):
        DraftingScheduler(config, pool, FREE, 64)


def test_guesses_are_forgotten_with_their_requests() -> None:
    """However they end: another of the same id begins with none."""
    scheduler = make_scheduler(Lookup)
    for end in (lambda: scheduler.abort("one"), lambda: take(scheduler, {"one": [7] * 9})):
        start(scheduler, make_request("one", [7] * 9, max_tokens=3))
        take(scheduler, {"one": [7]})
        assert len(scheduler._guessers) == 1
        end()
        assert not scheduler._guessers


class Nothing:
    """Has no guess, and is not to be asked for the next two steps."""

    share = 1.0
    rest = 2

    def guess(self, request: Request, most: int) -> Sequence[int]:
        return ()


@pytest.mark.parametrize(
    ("guesser", "costs", "follows"),
    [
        pytest.param(Sevens, FREE, False, id="drafts begin with the token that is drawn"),
        pytest.param(Sevens, AS_ROWS, True, id="drafts do not pay"),
        pytest.param(Nothing, FREE, True, id="nobody is asked in the next step"),
    ],
)
def test_what_follows_a_plan_has_no_drafts(
    guesser: type[Guesser], costs: StepCosts, follows: bool
) -> None:
    scheduler = make_scheduler(guesser, costs=costs)
    for name in "ab":
        scheduler.add(make_request(name, [1, 2, 3], max_tokens=20))
    take(scheduler, {"a": [4], "b": [5]})
    plan = scheduler.plan(0.0)
    found = [(chunk.request_id, chunk.start) for chunk in scheduler.following(plan)]
    assert found == ([("a", 4), ("b", 4)] if follows else [])
