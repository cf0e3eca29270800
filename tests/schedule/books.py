"""The books of the scheduler and of the pool, recomputed from the requests: AssertionError names a
broken invariant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import chain

from moebius.schedule.blocks import BlockPool
from moebius.schedule.request import Request, RequestStatus
from moebius.schedule.scheduler import Scheduler


def check_pool(pool: BlockPool, requests: Collection[Request]) -> None:
    """Recompute everything from the tables of all unfinished requests; AssertionError names the
    invariant."""
    holders = Counter(chain.from_iterable(request.block_ids for request in requests))
    assert [holders[block] for block in range(pool.num_blocks)] == pool._refs, (
        "I2: a reference count is wrong"
    )
    groups = (pool._free, pool._evictable, holders)
    assert sum(map(len, groups)) == pool.num_blocks, (
        "I3: free and used blocks do not add up to the pool"
    )
    assert len(set().union(*groups)) == pool.num_blocks, "I1: a block is in two states, or in none"
    by_block = {block: entry.hash for block, entry in enumerate(pool._entries) if entry}
    assert by_block == {block: digest for digest, block in pool._cached.items()}, (
        "I4: hashes and blocks disagree"
    )
    assert all(block in by_block for block in pool._evictable), "I4: an evictable block has no hash"
    assert not any(block in by_block for block in pool._free), "I4: a free block kept its hash"
    for request in requests:
        table, computed = request.block_ids, request.num_computed_tokens
        assert len(table) == pool.blocks_for(computed), (
            f"I6: {len(table)} blocks hold {computed} tokens"
        )
        if computed % pool.block_size:
            assert holders[table[-1]] == 1 and table[-1] not in by_block, (
                "I5: a block being written is shared"
            )
    unfinished = {id(request) for request in requests}
    assert all(id(owner) in unfinished for owner in pool._claims.values()), (
        "I12: a claim outlived its request"
    )


def check_books(scheduler: Scheduler) -> None:
    """Recompute the books from the requests; AssertionError names the broken invariant
    (TRUST.md)."""
    check_pool(scheduler.pool, scheduler.requests.values())
    queue, requests = scheduler._waiting, scheduler.requests.values()
    running = [r for r in requests if r.status is RequestStatus.RUNNING]
    waiting = [r for r in requests if r.status is not RequestStatus.RUNNING]
    for name, listed, true in (
        ("running", scheduler._running, running),
        ("waiting", list(queue), waiting),
    ):
        true.sort(key=lambda request: request.order)
        assert listed == true, f"I7: the {name} requests are not those listed, or out of order"
    assert not any(request.finished for request in waiting), (
        "I10: a finished request is still in the books"
    )
    assert not any(request.block_ids for request in waiting), "I12: a waiting request holds blocks"
    assert queue.num_tokens == sum(r.num_tokens for r in waiting), (
        "I12: the queue lost count of its tokens"
    )
