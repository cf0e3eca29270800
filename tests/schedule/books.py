"""The books of the scheduler and of the pool, recomputed from the requests: AssertionError names a
broken invariant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from types import MappingProxyType

from moebius.schedule.blocks import BlockPool
from moebius.schedule.drafts import DraftingScheduler
from moebius.schedule.groups import NO_BLOCK
from moebius.schedule.places import Places
from moebius.schedule.request import Request, RequestStatus
from moebius.schedule.scheduler import Scheduler
from moebius.schedule.waiting import WaitingQueue


def check_pool(
    pool: BlockPool,
    requests: Collection[Request],
    drafted: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ahead: Collection[str] = (),
) -> None:
    """Recompute everything from the tables of all unfinished requests; AssertionError names the
    invariant. drafted: what a step that is under way verifies behind their tokens. ahead: who has a
    block for one token more."""
    holders = Counter(chain.from_iterable(t for request in requests for t in request.tables))
    del holders[NO_BLOCK]
    check_places(pool, holders)
    for request in requests:
        more = len(drafted.get(request.id, ())) + (request.id in ahead)
        _check_tables(pool, request, holders, more)
    if pool.states is not None:
        _check_states(pool, requests)
    unfinished = {id(request) for request in requests}
    assert all(id(owner) in unfinished for owner in pool._claims.values()), (
        "I12: a claim outlived its request"
    )


def check_places(places: Places, holders: Mapping[int, int]) -> None:
    """Each place is in one state, and is found by its entry alone; `holders` counts the owners of
    those that are owned."""
    count = places.num_places
    assert [holders.get(place, 0) for place in range(count)] == places._refs, (
        "I2: a reference count is wrong"
    )
    sets = (places._free, places._evictable, holders)
    assert sum(map(len, sets)) == count, "I3: free and used blocks do not add up to the pool"
    assert len(set().union(*sets)) == count, "I1: a block is in two states, or in none"
    by_place = {
        place: (entry.group, entry.hash) for place, entry in enumerate(places._entries) if entry
    }
    found = {
        place: (group, digest)
        for group, cached in enumerate(places._cached)
        for digest, place in cached.items()
    }
    assert by_place == found, "I4: hashes and blocks disagree"
    assert all(place in by_place for place in places._evictable), (
        "I4: an evictable block has no hash"
    )
    assert not any(place in by_place for place in places._free), "I4: a free block kept its hash"


def _check_tables(pool: BlockPool, request: Request, holders: Mapping[int, int], more: int) -> None:
    computed = request.num_computed_tokens
    entries = pool.blocks_for(computed + more)
    running = request.status is RequestStatus.RUNNING
    assert len(request.tables) == len(pool.groups.blocks) * (running or bool(request.tables)), (
        "I6: a group has no table"
    )
    for group, table in enumerate(request.tables):
        assert len(table) == entries, (
            f"I6: {len(table)} blocks hold {computed} tokens and {more} more"
        )
        passed = request.num_passed[group]
        assert list(table[:passed]) == [NO_BLOCK] * passed and NO_BLOCK not in table[passed:], (
            "I6: what a window has passed is not what was given back"
        )
        for block in table[computed // pool.block_size :]:
            assert holders[block] == 1 and pool._entries[block] is None, (
                "I5: a block being written is shared"
            )


def _check_states(pool: BlockPool, requests: Collection[Request]) -> None:
    states = pool.states
    assert states is not None
    owned: Counter[int] = Counter()
    for request in requests:
        mine = request.states
        assert (mine is None) == (request.status is not RequestStatus.RUNNING), (
            "I6: a running request has no slot for its state, or a waiting one has"
        )
        if mine is not None:
            written = [mine.slot, *mine.scratch, *([] if mine.save is None else [mine.save])]
            assert not any(states._entries[slot] for slot in written), (
                "I5: a snapshot is being written"
            )
            owned.update(written)
            owned.update([] if mine.restore is None else [mine.restore])
            assert len(mine.scratch) == states.spec.scratch, "I6: a scratch slot is missing"
            assert all(states._refs[slot] == 1 for slot in written), (
                "I5: a state being written is shared"
            )
    check_places(states, owned)


def _check_queue(queue: WaitingQueue, waiting: Collection[Request]) -> None:
    """Each owner's requests that wait are listed once, in the order of service."""
    by_owner: dict[str, list[Request]] = {}
    for request in sorted(waiting, key=lambda request: request.order):
        by_owner.setdefault(request.asked.share.account, []).append(request)
    listed: dict[str, list[Request]] = {}
    for request in queue:
        listed.setdefault(request.asked.share.account, []).append(request)
    assert listed == by_owner and len(queue) == len(waiting), (
        "I7: the waiting requests are not those listed, or out of order"
    )


def check_books(scheduler: Scheduler, ahead: Collection[str] = ()) -> None:
    """Recompute the books from the requests; AssertionError names the broken invariant, by its
    number in schedule/checker.py. ahead: as in check_pool."""
    drafted = scheduler.drafted if isinstance(scheduler, DraftingScheduler) else {}
    check_pool(scheduler.pool, scheduler.requests.values(), drafted, ahead)
    queue, requests = scheduler._waiting, scheduler.requests.values()
    running = [r for r in requests if r.status is RequestStatus.RUNNING]
    waiting = [r for r in requests if r.status is not RequestStatus.RUNNING]
    running.sort(key=lambda request: request.order)
    assert scheduler._running == running, (
        "I7: the running requests are not those listed, or out of order"
    )
    _check_queue(queue, waiting)
    owners = {request.asked.share.account for request in requests}
    assert len(queue.turns) == len(owners), "I12: an owner outlived its requests, or is lost"
    assert not any(request.finished for request in waiting), (
        "I10: a finished request is still in the books"
    )
    assert not any(request.tables for request in waiting), "I12: a waiting request holds blocks"
    assert not any(request.num_computed_tokens for request in waiting), (
        "I6: no blocks hold a waiting request's tokens"
    )
    assert queue.backlog.num_tokens == sum(r.num_tokens for r in waiting), (
        "I12: the queue lost count of its tokens"
    )
