"""A second tier of the prefix cache, as the scheduler sees it: what is missing, who waits, what
lands; by hand, and under random work whose every step is checked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from covering import chosen
from moebius.schedule.groups import CacheGroups, GroupSpec, StateSpec
from moebius.schedule.request import Request, RequestStatus
from moebius.schedule.tiered_drafts import TieredDraftingScheduler
from moebius.schedule.tiers import Kept, Piece, TieredScheduler
from schedule.books import check_books
from schedule.checker import Violation
from schedule.making import KEY, drain, make_request, make_scheduler, step
from schedule.seeded_tier_bugs import TIER_BUGS
from schedule.simulate_tiers import TieredEpisode

TEXT = tuple(range(1, 30))
no_cover = pytest.mark.no_cover  # a trace makes these three times as slow


def tiered(groups: CacheGroups | None = None, **config: int) -> TieredScheduler:
    plain = make_scheduler(groups=groups, **config)
    return TieredScheduler(plain.config, plain.pool)


def serve(scheduler: TieredScheduler, request: Request) -> list[Kept]:
    """Serve it to its end; what could be kept of it."""
    watcher = Keeping(scheduler)
    scheduler.watcher = watcher
    scheduler.add(request)
    drain(scheduler)
    scheduler.watcher = None
    return watcher.kept


class Keeping:
    def __init__(self, scheduler: TieredScheduler) -> None:
        self.scheduler = scheduler
        self.kept: list[Kept] = []
        self.seen: list[str] = []

    def added(self, request: Request) -> None:
        self.seen.append(f"added {request.id}")

    def ended(self, request: Request) -> None:
        self.seen.append(f"ended {request.id}")
        self.kept += self.scheduler.kept(request)


def files(kept: Sequence[Kept]) -> set[tuple[int | None, bytes]]:
    return {(each.piece.group, each.digest) for each in kept}


def waiting(scheduler: TieredScheduler, request_id: str, prompt: Sequence[int] = TEXT) -> Request:
    request = make_request(request_id, prompt)
    scheduler.add(request)
    return request


def land_all(scheduler: TieredScheduler, request: Request, stored: set) -> list[Piece]:
    missing = scheduler.missing(request, lambda *piece: piece in stored)
    scheduler.expect(request.id, 10.0)
    for piece in missing.pieces:
        assert scheduler.land(request.id, piece, lambda place: None)
        check_books(scheduler)
    scheduler.settle(request.id)
    return list(missing.pieces)


def test_what_one_scheduler_kept_another_starts_from() -> None:
    """29 tokens are 7 blocks of 4; the last token is always computed."""
    stored = files(serve(tiered(), make_request("a", TEXT)))
    scheduler = tiered()
    request = waiting(scheduler, "b")
    missing = scheduler.missing(request, lambda *piece: piece in stored)
    assert (missing.start, missing.end) == (0, 7)
    assert list(missing.pieces) == [Piece(0, i) for i in range(7)]
    assert scheduler.pool.num_free == scheduler.pool.num_blocks, "nothing was taken"
    land_all(scheduler, request, stored)
    assert step(scheduler)[0].chunks[0].start == 28


def test_only_what_is_not_there_is_missing() -> None:
    scheduler = tiered()
    stored = files(serve(scheduler, make_request("a", TEXT)))
    longer = files(serve(tiered(), make_request("a", (*TEXT, *range(50, 60)))))
    request = waiting(scheduler, "b", (*TEXT, *range(50, 60)))
    missing = scheduler.missing(request, lambda *piece: piece in longer)
    assert (missing.start, missing.end) == (7, 9)
    assert list(missing.pieces) == [Piece(0, 7), Piece(0, 8)]
    other = waiting(scheduler, "c")
    assert scheduler.missing(other, lambda *piece: piece in stored).pieces == ()


def test_a_hole_ends_what_can_be_fetched() -> None:
    kept = serve(tiered(), make_request("a", TEXT))
    stored = files([each for each in kept if each.piece.number != 3])
    scheduler = tiered()
    request = waiting(scheduler, "b")
    assert len(land_all(scheduler, request, stored)) == 3
    assert step(scheduler)[0].chunks[0].start == 12


def test_of_a_window_only_what_it_sees_is_fetched() -> None:
    groups = CacheGroups((GroupSpec(), GroupSpec(6)))
    stored = files(serve(tiered(groups), make_request("a", TEXT)))
    scheduler = tiered(groups)
    request = waiting(scheduler, "b")
    pieces = land_all(scheduler, request, stored)
    # Rows from position 28 on see 6 tokens, from 23 on: blocks 5 and 6 of the window's group.
    assert [each for each in pieces if each.group == 1] == [Piece(1, 5), Piece(1, 6)]
    assert len(pieces) == 9
    assert step(scheduler)[0].chunks[0].start == 28


def test_behind_a_state_there_is_no_resuming_without_it() -> None:
    groups = CacheGroups((GroupSpec(),), StateSpec(6, interval=2))
    kept = serve(tiered(groups, budget=8), make_request("a", TEXT))
    snapshots = [each.piece.number for each in kept if each.piece.group is None]
    assert 5 in snapshots and 4 not in snapshots
    scheduler = tiered(groups, budget=8)
    request = waiting(scheduler, "b", TEXT[:25])  # of which 6 blocks are of use
    pieces = land_all(scheduler, request, files(kept))
    assert pieces == [*(Piece(0, i) for i in range(6)), Piece(None, 5)]
    plan, _ = step(scheduler)
    assert plan.chunks[0].start == 24 and plan.chunks[0].states.restore is not None


def test_a_snapshot_does_not_land_without_the_block_before_it() -> None:
    groups = CacheGroups((GroupSpec(),), StateSpec(6, interval=2))
    scheduler = tiered(groups)
    request = waiting(scheduler, "b")
    scheduler.missing(request, lambda *piece: False)
    assert not scheduler.land("b", Piece(None, 1), lambda place: None)
    assert scheduler.pool.states.num_cached == 0


def test_who_waits_is_passed_over_and_planned_when_all_is_there() -> None:
    scheduler = tiered()
    waiting(scheduler, "first")
    waiting(scheduler, "second", (40, 41))
    scheduler.expect("first", 5.0)
    plan, _ = step(scheduler)
    assert plan.waiting == {"first": "prefix_on_disk"}
    assert [chunk.request_id for chunk in plan.chunks] == ["second"]
    assert scheduler.num_deferred == 1
    scheduler.settle("first")
    assert "first" in {chunk.request_id for chunk in step(scheduler)[0].chunks}


def test_a_wait_ends_with_its_time() -> None:
    scheduler = tiered()
    waiting(scheduler, "a")
    scheduler.expect("a", 5.0)
    assert step(scheduler, now=4.9)[0].waiting == {"a": "prefix_on_disk"}
    assert step(scheduler, now=5.0)[0].chunks[0].request_id == "a"
    assert not scheduler.awaited
    scheduler.settle("a")  # which comes too late, and is no error
    drain(scheduler)


def test_a_wait_ends_with_its_request() -> None:
    scheduler = tiered()
    watcher = Keeping(scheduler)
    scheduler.watcher = watcher
    waiting(scheduler, "a")
    scheduler.expect("a", 5.0)
    scheduler.abort("a")
    assert not scheduler.awaited and watcher.seen == ["added a", "ended a"]
    assert not scheduler.land("a", Piece(0, 0), lambda place: None)


def test_what_cannot_be_written_is_not_found() -> None:
    scheduler = tiered()
    request = waiting(scheduler, "a")
    scheduler.missing(request, lambda *piece: True)

    def fail(place: int) -> None:
        raise OSError("torn")

    with pytest.raises(OSError, match="torn"):
        scheduler.land("a", Piece(0, 0), fail)
    check_books(scheduler)
    assert not scheduler.pool.cached[0] and scheduler.pool.num_free == 64


def test_what_is_there_already_or_has_no_place_does_not_land() -> None:
    scheduler = tiered(blocks=8)
    request = waiting(scheduler, "a")
    scheduler.missing(request, lambda *piece: True)
    assert scheduler.land("a", Piece(0, 0), lambda place: None)
    assert not scheduler.land("a", Piece(0, 0), lambda place: pytest.fail("it is there"))
    taken = [scheduler.pool._take() for _ in range(8)]
    assert not scheduler.land("a", Piece(0, 1), lambda place: pytest.fail("it has no place"))
    scheduler.pool._release(taken)


def test_nothing_is_fetched_for_who_wants_its_prompt_scored() -> None:
    scheduler = tiered()
    request = make_request("a", TEXT, prompt_logprobs=1)
    scheduler.add(request)
    assert scheduler.missing(request, lambda *piece: True).pieces == ()


def test_the_salt_is_a_part_of_what_is_looked_for() -> None:
    stored = files(serve(tiered(), make_request("a", TEXT, salt=b"one")))
    for salt, found in ((b"one", 7), (b"two", 0), (b"", 0)):
        scheduler = tiered()
        request = make_request("b", TEXT, salt=salt)
        scheduler.add(request)
        assert len(scheduler.missing(request, lambda *piece: piece in stored).pieces) == found


def test_what_derives_from_an_unfinished_request_is_kept_when_that_has_ended() -> None:
    scheduler = tiered(budget=64)
    watcher = Keeping(scheduler)
    scheduler.watcher = watcher
    scheduler.add(make_request("long", TEXT, max_tokens=20))
    step(scheduler)
    scheduler.add(make_request("short", (*TEXT, *range(60, 68)), max_tokens=1, arrival=1.0))
    step(scheduler)
    assert watcher.seen[-1] == "ended short" and watcher.kept == []
    drain(scheduler)
    assert {each.piece.number for each in watcher.kept} >= set(range(7))


def test_what_is_kept_lies_there_until_it_is_evicted() -> None:
    scheduler = tiered(blocks=11)
    kept = serve(scheduler, make_request("a", TEXT))
    assert kept and all(map(scheduler.holds, kept))
    serve(scheduler, make_request("b", range(100, 140)))
    assert not any(map(scheduler.holds, kept))


def test_what_is_fetched_is_evicted_last_and_its_end_first() -> None:
    stored = files(serve(tiered(), make_request("a", TEXT)))
    scheduler = tiered(blocks=12)
    serve(scheduler, make_request("old", range(100, 120), max_tokens=1))
    request = waiting(scheduler, "b")
    land_all(scheduler, request, stored)
    order = [scheduler.pool._entries[place].hash for place in scheduler.pool._evictable]
    assert order[-7:] == list(reversed(request.block_hashes[:7]))
    assert request.status is RequestStatus.WAITING and KEY


@no_cover
@pytest.mark.parametrize("episodes", chosen([4, 8], lambda episodes: episodes == 4))
@pytest.mark.parametrize("family", [None, "gpt-oss", "all kinds", "recurrent", "two windows"])
def test_random_work_beside_a_slow_and_forgetful_tier(family: str | None, episodes: int) -> None:
    landed = late = torn = steps = 0
    for seed in (0, 6, 8, 5, 1, 2, 3, 4)[:episodes]:  # much lands, and is torn, in the first ones
        episode = TieredEpisode(seed, family=family)
        steps += episode.run(600).steps
        landed += episode.tier.landed
        late += episode.tier.late
        torn += episode.tier.torn
    assert landed > 5 and torn > 10 and steps > 400 * episodes, (landed, late, torn, steps)
    assert late or family is not None


@no_cover
@pytest.mark.parametrize("episodes", chosen([4, 8], lambda episodes: episodes == 4))
@pytest.mark.parametrize("family", ["full attention", "two windows"])
def test_requests_draft_beside_a_tier(family: str, episodes: int) -> None:
    landed = drafts = 0
    for seed in range(episodes):
        episode = TieredEpisode(seed, family=family, scheduler_class=TieredDraftingScheduler)
        drafts += episode.run(600).right_drafts
        landed += episode.tier.landed
    assert landed > 5 and drafts > 50, (landed, drafts)


@no_cover
@pytest.mark.parametrize("description", TIER_BUGS)
def test_the_simulation_finds_what_is_wrong_with_a_tier(description: str) -> None:
    cls, family, first = TIER_BUGS[description]
    with pytest.raises(Violation) as violation:
        for seed in range(first, first + 100):
            TieredEpisode(seed, family=family, scheduler_class=cls).run(600)
    assert not any(name in str(violation.value) for name in ("AttributeError", "NameError"))
