"""Groups of layers: what each keeps of the past, where a prefix hit may resume, and what a window
gives back."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.errors import ConfigError, ContextLengthError
from moebius.schedule.blocks import BlockPool
from moebius.schedule.groups import (
    NO_BLOCK,
    CacheGroups,
    GroupSpec,
    Lineage,
    StateSpec,
    tainted,
)
from moebius.schedule.request import RequestStatus
from schedule.books import check_books, check_pool
from schedule.making import KEY, drain, make_request, make_scheduler, step

CHUNK = 64
BOTH = CacheGroups((GroupSpec(), GroupSpec(6)))


def states(slots: int = 8, *, scratch: int = 0, interval: int = 2, windows=()) -> CacheGroups:
    return CacheGroups(tuple(map(GroupSpec, windows)), StateSpec(slots, scratch, interval))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda: CacheGroups(()), "at least one group"),
        (lambda: CacheGroups((GroupSpec(0),)), "a window is 0 tokens"),
        (lambda: states(1, scratch=1), "1 slots for states are too few for one sequence"),
        (lambda: states(interval=0), "a snapshot every 0 blocks"),
        (lambda: BlockPool(1, 4, groups=BOTH, key=KEY), "at least 2"),
    ],
)
def test_impossible_groups_are_refused(groups, message):
    with pytest.raises(ConfigError, match=message):
        groups()


@pytest.mark.parametrize("window", [None, 1, 2, 5, 8])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_most_blocks_is_what_a_sequence_can_touch(window, size):
    """Counted block by block over every step that a long sequence can make."""
    spec = GroupSpec(window)
    for chunk in (1, 2, 7):
        most = 0
        for start in range(30):
            first = 0 if window is None else max(0, start - window + 1)
            touched = {p // size for p in range(first, min(30, start + chunk))}
            most = max(most, len(touched))
            assert spec.first_block(start, size) == min(touched)
        assert spec.most_blocks(30, chunk, size) == most
    assert spec.most_blocks(3, 7, size) == -(-3 // size)


def test_a_mistral_holds_its_window_and_no_more():
    """Window 4,096, context 32,768, steps of 2,048 tokens: a decoding sequence holds the window's
    tokens and at most a block's slack; while its prompt is computed, a step's beside them."""
    size, window, step_tokens = 16, 4096, 2048
    scheduler = make_scheduler(
        blocks=window // size + step_tokens // size + 1,
        size=size,
        budget=step_tokens,
        length=32_768,
        groups=CacheGroups((GroupSpec(window),)),
    )
    request = make_request("a", [1] * 4000, max_tokens=90)
    request.prompt_ids = tuple(range(1, 32_700))  # beyond what the tests' limits let in
    request.max_tokens = 60
    scheduler.add(request)
    while request.num_computed_tokens < 32_699:
        step(scheduler)
        assert scheduler.pool.num_used <= (window + step_tokens) // size + 1
    for _ in range(40):
        step(scheduler)
        assert window // size <= scheduler.pool.num_used <= window // size + 1
    full = make_scheduler(blocks=scheduler.pool.num_blocks, size=size, length=32_768)
    again = make_request("b", [1], max_tokens=9)
    again.prompt_ids = request.prompt_ids
    with pytest.raises(ContextLengthError, match=r"up to 2045 blocks .* but the KV cache has 385"):
        full.add(again)


def test_a_window_needs_the_steps_tokens_beside_its_own():
    groups = CacheGroups((GroupSpec(8),))
    for blocks, fits in ((5, True), (4, False)):  # 7 + 8 tokens touch five blocks of four
        scheduler = make_scheduler(blocks=blocks, size=4, budget=8, seqs=2, groups=groups)
        request = make_request("a", range(1, 60), max_tokens=30)
        if fits:
            scheduler.add(request)
            drain(scheduler)
            assert len(request.output_ids) == 30
        else:
            with pytest.raises(ContextLengthError, match="up to 5 blocks"):
                scheduler.add(request)


def test_tables_of_several_groups_grow_together_and_windows_give_back():
    scheduler = make_scheduler(size=2, budget=8, groups=BOTH)
    request = make_request("a", range(1, 20))
    scheduler.add(request)
    plans = [step(scheduler)[0] for _ in range(4)]
    full, windowed = plans[2].chunks[0].tables
    assert len(full) == len(windowed) == 10 and NO_BLOCK not in full
    # The last chunk begins at 16: from 11 on it sees, and blocks 0 to 4 end before.
    assert windowed.tolist()[:5] == [NO_BLOCK] * 5 and NO_BLOCK not in windowed[5:]
    assert not set(full) & set(windowed[5:])
    assert plans[0].chunks[0].tables[1].count(NO_BLOCK) == 0, "a plan's tables stay as they were"
    drain(scheduler)


def test_what_a_window_gave_back_is_found_until_it_is_evicted():
    scheduler = make_scheduler(blocks=9, size=2, budget=8, groups=CacheGroups((GroupSpec(4),)))
    scheduler.add(make_request("a", range(1, 16), max_tokens=1))
    drain(scheduler)
    pool = scheduler.pool
    assert len(pool.cached[0]) == 7
    hit = pool.match(make_request("b", range(1, 16)))
    # The next row, 14, sees positions 11 to 14, of which those before 14 are in blocks 5 and 6.
    assert hit.num_blocks == 7 and hit.tables[0].count(NO_BLOCK) == 5
    while len(pool.cached[0]) > 2:
        pool._free.append(pool._evictable.popitem(last=True)[0])
        pool._forget(pool._free[-1])
    hit = pool.match(make_request("c", range(1, 16)))
    assert hit.num_blocks == 2 and NO_BLOCK not in hit.tables[0], "all of a short prefix is needed"


@settings(derandomize=True, deadline=None, max_examples=150, database=None)
@given(st.data())
def test_a_hit_is_the_longest_boundary_at_which_all_groups_resume(data):
    """Against a search of all boundaries, from what is cached of each group."""
    size = data.draw(st.integers(1, 3))
    windows = data.draw(st.lists(st.sampled_from([None, 1, 2, 5, 9]), max_size=3))
    has_state = not windows or data.draw(st.booleans())
    groups = CacheGroups(tuple(map(GroupSpec, windows)), StateSpec(12) if has_state else None)
    pool = BlockPool(60, size, groups=groups, key=KEY)
    request = make_request("a", [1] * (6 * size + 1))
    hashes = pool._hash_blocks(request, 6)
    lineage = Lineage("z")
    present: list[set[int]] = []
    for group in range(len(windows)):
        present.append(data.draw(st.sets(st.integers(0, 5))))
        for i in present[-1]:
            place = pool._take()
            pool._enter(group, hashes[i], place, lineage)
            pool._release((place,))
    snapshots = data.draw(st.sets(st.integers(1, 6))) if has_state else set(range(1, 7))
    for count in snapshots if has_state else ():
        owned = pool.states.open()
        pool.states.place(owned, "parting", hashes[count - 1])
        pool.states.settle(owned, lineage)
        pool.states.free(owned)

    def resumes(count: int) -> bool:
        position = count * size
        seen = [
            {p // size for p in range(0 if w is None else max(0, position - w + 1), position)}
            for w in windows
        ]
        return count in snapshots and all(map(set.issubset, seen, present))

    best = max(count for count in range(7) if not count or resumes(count))
    hit = pool.match(request)
    assert hit.num_blocks == best
    for group, table in enumerate(hit.tables):
        assert len(table) == best
        assert all(
            block == NO_BLOCK or pool.cached[group][hashes[i]] == block
            for i, block in enumerate(table)
        )
    assert hit.snapshot == (hashes[best - 1] if has_state and best else b"")
    check_pool(pool, [])


@pytest.mark.parametrize(
    "groups", [CacheGroups((GroupSpec(3),)), states(9, interval=1), states(9, windows=(None,))]
)
def test_who_could_share_a_prefix_waits_for_who_computes_it(groups):
    scheduler = make_scheduler(size=2, budget=6, seqs=2, groups=groups)
    scheduler.add(make_request("a", range(1, 12), max_tokens=1))
    step(scheduler)
    scheduler.add(make_request("b", range(1, 12), max_tokens=1, arrival=1.0))
    reasons = [plan.waiting.get("b") for plan in drain(scheduler)]
    assert "prefix_in_flight" in reasons
    assert scheduler.prefix_hits == 10


def test_who_finds_all_of_its_prefix_waits_for_nobody():
    scheduler = make_scheduler(size=2, budget=4, seqs=2)
    scheduler.add(make_request("a", range(1, 4), max_tokens=1))
    drain(scheduler)
    scheduler.add(make_request("other", range(50, 80)))
    assert scheduler.plan(0.0).waiting == {}
    assert scheduler.pool.claimant(make_request("b", range(1, 4))) is None


def test_a_running_request_waits_for_the_budget_of_the_next_step():
    scheduler = make_scheduler(budget=8, seqs=2)
    scheduler.add(make_request("b", [9], max_tokens=9, arrival=1.0))
    step(scheduler)
    scheduler.add(make_request("a", range(1, 30)))
    step(scheduler)
    plan, _ = step(scheduler)
    assert [c.num_tokens for c in plan.chunks] == [8] and plan.waiting == {"b": "no_budget"}
    drain(scheduler)


# ----------------------------------------------------------------------------------------------------- recurrent states


def test_a_hit_starts_from_a_snapshot_and_pins_it_for_its_step():
    scheduler = make_scheduler(size=2, groups=states(2, interval=8))
    scheduler.add(make_request("a", range(1, 16), max_tokens=1))
    drain(scheduler)
    pool = scheduler.pool.states
    scheduler.add(make_request("b", range(1, 16), max_tokens=3))
    plan = scheduler.plan(0.0)
    (chunk,) = plan.chunks
    (snapshot,) = pool.cached[0].values()
    assert (chunk.start, chunk.states.restore) == (14, snapshot)
    assert pool._refs[snapshot] == 1 and chunk.states.slot != snapshot
    check_books(scheduler)
    scheduler.update(plan, {"b": [5]})
    assert pool._refs[snapshot] == 0
    plan, _ = step(scheduler)
    assert plan.chunks[0].states.restore is None
    drain(scheduler)


def test_no_snapshot_is_taken_where_no_slot_is_left():
    scheduler = make_scheduler(size=2, groups=states(1))
    scheduler.add(make_request("a", range(1, 16), max_tokens=3))
    plans = drain(scheduler)
    assert all(c.states.save is None for plan in plans for c in plan.chunks)


def test_a_sequence_waits_for_its_slots():
    scheduler = make_scheduler(groups=states(3, scratch=1))
    for i, name in enumerate("ab"):
        scheduler.add(make_request(name, [i + 1, 2], arrival=float(i), max_tokens=2))
    plan, _ = step(scheduler)
    assert plan.waiting == {"b": "no_blocks"} and len(plan.chunks[0].states.scratch) == 1
    drain(scheduler)


def test_a_hit_waits_for_a_slot_beside_its_snapshot():
    """The only other slot is another sequence's: the snapshot itself is not given up for it."""
    scheduler = make_scheduler(size=8, groups=states(2))
    scheduler.add(make_request("a", range(1, 16), max_tokens=1))
    drain(scheduler)
    scheduler.add(make_request("other", [99], max_tokens=3))
    step(scheduler)
    scheduler.add(make_request("b", range(1, 16), arrival=1.0))
    plan, _ = step(scheduler)
    assert plan.waiting == {"b": "no_blocks"}
    assert len(scheduler.pool.states.cached[0]) == 1
    drain(scheduler)


@pytest.mark.parametrize("drawn", [True, False])
def test_a_state_that_cannot_be_trusted_goes_back_to_a_snapshot(drawn):
    """After a failed step, and after one that computed its last token but drew nothing."""
    scheduler = make_scheduler(size=2, groups=states(8, interval=2))
    request = make_request("a", range(1, 12), max_tokens=9)
    scheduler.add(request)
    while not request.output_ids:
        step(scheduler)
    plan = scheduler.plan(0.0)
    if drawn:
        scheduler.rollback(plan)
    else:
        assert scheduler.update(plan, {}) == []
    check_books(scheduler)
    assert request.status is RequestStatus.PREEMPTED and request.states is None
    (again,) = scheduler.plan(0.0).chunks
    assert again.start == 10 and again.states.restore is not None
    assert len(request.output_ids) == 1


def test_a_preempted_sequence_goes_on_from_its_longest_snapshot():
    groups = states(12, interval=2, windows=(None,))
    scheduler = make_scheduler(blocks=12, size=2, seqs=2, length=40, groups=groups)
    first, last = (
        make_request(name, range(start, start + 5), max_tokens=14, arrival=float(start))
        for name, start in (("first", 1), ("last", 50))
    )
    scheduler.add(first)
    scheduler.add(last)
    plans = drain(scheduler)
    assert last.num_preemptions > 0
    starts = [c for plan in plans for c in plan.chunks if c.request_id == "last"]
    back = [c for c in starts[1:] if c.states.restore is not None]
    assert back and all(c.start and c.start % 2 == 0 for c in back)


def test_without_prefix_caching_or_chunks_no_boundary_is_kept():
    for options in ({"caching": False}, {"enable_chunked_prefill": False}):
        scheduler = make_scheduler(size=2, groups=states(8, interval=1), **options)
        scheduler.add(make_request("a", range(1, 12), max_tokens=1))
        (plan,) = drain(scheduler)
        assert plan.chunks[0].num_tokens == 11 and plan.chunks[0].states.save is None


def test_two_that_take_one_snapshot_keep_one():
    scheduler = make_scheduler(size=2, groups=states(8))
    for name in "ab":
        scheduler.add(make_request(name, range(1, 12), max_tokens=1, prompt_logprobs=1))
    drain(scheduler)
    pool = scheduler.pool.states
    assert pool.num_used == 0 and len(pool.cached[0]) == len(set(pool.cached[0].values())) == 3


def test_withdraw_follows_snapshots():
    """`reader` has read nothing of `bad` but a snapshot."""
    scheduler = make_scheduler(size=2, groups=states(12))
    bad = make_request("bad", range(1, 12), max_tokens=50)
    scheduler.add(bad)
    while not bad.output_ids:
        step(scheduler)
    reader = make_request("reader", range(1, 14), max_tokens=50, arrival=1.0)
    scheduler.add(reader)
    step(scheduler)
    assert reader.num_cached_tokens == 10
    scheduler.fail("bad")
    assert not scheduler.pool.states.cached[0] and not reader.publishes
    for _ in range(20):
        step(scheduler)
    assert not scheduler.pool.states.cached[0]
    check_books(scheduler)


def test_a_long_lineage_is_followed_to_its_end():
    root = Lineage("root")
    line = root
    for i in range(3 * sys.getrecursionlimit()):
        line = Lineage(f"r{i}", frozenset((line, Lineage("other"))))
    apart = Lineage("apart", frozenset((Lineage("other"),)))
    assert tainted({line, root, apart}, "root") == {line, root}
    assert tainted({line, apart}, "other") == {line, apart}
    assert tainted({line, apart}, "nobody") == set()


@pytest.mark.parametrize(
    ("harm", "invariant"),
    [
        (lambda p, r: r.num_passed.__setitem__(1, 0), "I6: what a window has passed"),
        (lambda p, r: setattr(r, "tables", r.tables[:1]), "I2"),
        (lambda p, r: setattr(r.states, "slot", p.states._free[0]), "I5: a state being written"),
        (lambda p, r: setattr(r, "states", None), "I6: a running request has no slot"),
        (lambda p, r: setattr(r.states, "scratch", ()), "I6: a scratch slot is missing"),
    ],
)
def test_the_books_are_checked_for_every_kind_of_group(harm, invariant):
    groups = CacheGroups(BOTH.blocks, StateSpec(6, scratch=1))
    scheduler = make_scheduler(size=2, groups=groups)
    request = make_request("a", range(1, 20), max_tokens=40)
    scheduler.add(request)
    while not request.output_ids:
        step(scheduler)
    step(scheduler)
    check_books(scheduler)
    harm(scheduler.pool, request)
    with pytest.raises(AssertionError, match=invariant):
        check_books(scheduler)
