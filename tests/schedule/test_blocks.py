from __future__ import annotations

import struct
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius.errors import ConfigError
from moebius.request.hashes import BlockHasher
from moebius.schedule.blocks import BlockPool
from moebius.schedule.request import Request
from schedule.books import check_pool
from schedule.making import KEY, make_asked, make_request

CHUNK = 64


def pool_of(blocks: int = 8, size: int = 4, **options) -> BlockPool:
    return BlockPool(blocks, size, key=options.pop("key", KEY), **options)


def begin(pool: BlockPool, request, **options) -> bool:
    return pool.open(request, pool.match(request), CHUNK, **options)


def found(pool: BlockPool, request) -> list[int]:
    """The blocks of the longest cached prefix, in the first group."""
    return list(pool.match(request).tables[0])


def compute(pool: BlockPool, request) -> None:
    """Run a request's known tokens through the pool: open, extend, publish."""
    assert begin(pool, request)
    assert pool.extend(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    pool.publish(request, request.num_tokens)


def release(pool: BlockPool, request) -> None:
    pool.free(request)
    request.num_computed_tokens = 0


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0)])
def test_refuses_an_empty_pool(blocks, size):
    with pytest.raises(ConfigError, match="must be at least 1"):
        BlockPool(blocks, size, key=KEY)


@pytest.mark.parametrize("length", [0, 15, 65])
def test_refuses_a_weak_key(length):
    with pytest.raises(ConfigError, match=f"the prefix key has {length} bytes; it needs 16 to 64"):
        BlockPool(4, 4, key=bytes(length))


def test_what_can_be_found_again_is_counted_once_nobody_uses_it():
    """Two blocks of four tokens are full, and so are in the cache; there are no states."""
    pool = pool_of()
    request = make_request("a", range(9))
    compute(pool, request)
    assert (pool.num_used, pool.num_cached) == (3, 0)
    assert pool.state_slots(request, 9) is None
    release(pool, request)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 2, 8)


def test_hash_is_keyed_chained_and_length_prefixed():
    pool = pool_of(size=2, namespace=b"model")
    request = make_request("a", [1, 2, 3, 4, 5], salt=b"tenant")
    compute(pool, request)

    def digest(*parts: bytes) -> bytes:
        return blake2b(
            b"".join(struct.pack("<Q", len(p)) + p for p in parts), digest_size=16, key=KEY
        ).digest()

    root = digest(b"", b"model", b"tenant")
    first = digest(root, struct.pack("<2I", 1, 2))
    assert pool.cached[0] == {
        first: request.tables[0][0],
        digest(first, struct.pack("<2I", 3, 4)): request.tables[0][1],
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"salt": b"x"}),
        ({"salt": b"ab"}, {"salt": b"a"}),
        ({"prompt": [9, 2, 3, 4, 5, 6, 7, 8, 9]}, {}),
    ],
)
def test_no_hit_across_salts_or_different_prefixes(one, other):
    pool = pool_of()
    base = {"prompt": [1, 2, 3, 4, 5, 6, 7, 8, 9]}
    compute(pool, make_request("a", **(base | one)))
    assert found(pool, make_request("b", **(base | other))) == []


def test_keys_and_namespaces_give_different_hashes():
    pools = [pool_of(), pool_of(key=bytes(32)), pool_of(namespace=b"other")]
    for pool in pools:
        compute(pool, make_request("a", [1, 2, 3, 4, 5]))
    assert len(set().union(*(pool.cached[0] for pool in pools))) == 3


@pytest.mark.parametrize(("tokens", "blocks"), [(3, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2)])
def test_a_hit_never_covers_the_last_token(tokens, blocks):
    pool = pool_of()
    compute(pool, make_request("a", range(1, 13)))
    assert len(found(pool, make_request("b", range(1, tokens + 1)))) == blocks


def test_shared_blocks_are_counted_and_come_back():
    pool = pool_of()
    one, two = make_request("a", range(1, 10)), make_request("b", [*range(1, 9), 50])
    compute(pool, one)
    compute(pool, two)
    assert one.tables[0][:2] == two.tables[0][:2] and one.tables[0][2] != two.tables[0][2]
    assert (pool.num_used, pool.num_free) == (4, 4)
    check_pool(pool, [one, two])
    release(pool, one)
    check_pool(pool, [two])
    assert pool.num_used == 3
    release(pool, two)
    check_pool(pool, [])
    assert pool.num_used == 0 and len(pool.cached[0]) == 2


def test_the_tail_of_a_chain_is_evicted_before_its_head():
    pool = pool_of(blocks=4)
    old = make_request("old", range(1, 14))
    compute(pool, old)
    release(pool, old)
    for wanted, left in ((1, 3), (2, 2), (3, 1)):  # one block was never published: it goes first
        taker = make_request("t", [99] * wanted * 4, salt=b"other")
        assert begin(pool, taker) and pool.extend(taker, wanted * 4)
        assert len(found(pool, make_request("again", range(1, 14)))) == left
        release(pool, taker)


def test_the_least_recently_used_chain_is_evicted_first():
    pool = pool_of(blocks=4)
    for name, start in (("a", 10), ("b", 20), ("a2", 10)):
        request = make_request(name, range(start, start + 5))
        compute(pool, request)
        release(pool, request)
    taker = make_request("t", [99] * 12)
    assert begin(pool, taker) and pool.extend(taker, 12)
    assert found(pool, make_request("a3", range(10, 15)))
    assert not found(pool, make_request("b3", range(20, 25)))


def test_extend_and_open_change_nothing_when_there_is_no_room():
    pool = pool_of(blocks=3)
    one = make_request("a", range(1, 9))
    compute(pool, one)
    two = make_request("b", range(1, 17))
    assert not begin(pool, two) and not two.tables
    assert not pool.extend(one, 17) and len(one.tables[0]) == 2
    assert pool.extend(one, 12) and pool.num_free == 0
    assert pool.extend(one, 11) and len(one.tables[0]) == 3  # it has that already


def test_a_table_that_a_plan_holds_stays_as_it_was():
    pool = pool_of(blocks=4)
    request = make_request("a", range(1, 9))
    compute(pool, request)
    held, was = request.tables[0], list(request.tables[0])
    assert pool.extend(request, 13) and len(request.tables[0]) == 4
    pool.trim(request, 5)
    release(pool, request)
    assert list(held) == was and not request.tables


def test_an_idle_hit_is_not_counted_as_free_room():
    pool = pool_of(blocks=3)
    one = make_request("a", range(1, 9))
    compute(pool, one)
    release(pool, one)
    two = make_request("b", range(1, 14))  # four blocks, two of them idle in a pool of three
    assert len(found(pool, two)) == 2 and not begin(pool, two)
    three = make_request("c", range(1, 13))
    assert not begin(pool, three, reserved=1) and begin(pool, three)


def test_fits_is_the_one_rule():
    pool = pool_of(blocks=3)
    assert (
        pool.fits(12, CHUNK)
        and not pool.fits(13, CHUNK)
        and pool.fits(13, CHUNK, held=1)
        and not pool.fits(9, CHUNK, held=1, free=1)
    )


def test_a_second_publisher_keeps_its_block_private():
    pool = pool_of()
    one, two = make_request("a", range(1, 6)), make_request("b", range(1, 6), prompt_logprobs=1)
    compute(pool, one)
    compute(pool, two)
    assert (
        set(pool.cached[0].values()) == {one.tables[0][0]} and one.tables[0][0] != two.tables[0][0]
    )
    check_pool(pool, [one, two])
    release(pool, two)
    assert len(pool._free) == 6


def test_without_prefix_caching_nothing_is_hashed():
    pool = pool_of(enable_prefix_caching=False)
    request = make_request("a", range(1, 10))
    compute(pool, request)
    assert request.block_hashes == [] and not pool.cached[0]
    assert found(pool, make_request("b", range(1, 10))) == []
    assert pool.claimant(make_request("b", range(1, 10))) is None


def test_each_block_is_hashed_once(monkeypatch):
    pool = pool_of(blocks=32)
    calls = []
    digest = pool.hasher.digest
    monkeypatch.setattr(pool.hasher, "digest", lambda *parts: calls.append(parts) or digest(*parts))
    request = make_request("a", range(1, 42))
    pool.match(request)
    pool.claimant(request)
    compute(pool, request)
    release(pool, request)
    compute(pool, request)
    assert len(calls) == 1 + 10  # the root, and ten full blocks


def test_claims_point_to_who_computes():
    pool = pool_of(blocks=16)
    first, second = make_request("a", range(1, 14)), make_request("b", range(1, 14))
    assert pool.claimant(second) is None
    assert begin(pool, first)
    assert pool.claimant(second) is first
    assert pool.extend(first, 8)
    first.num_computed_tokens = 8
    pool.publish(first, 8)
    assert pool.claimant(second) is first and second.num_awaited_blocks == 2
    assert pool.extend(first, 13)
    first.num_computed_tokens = 13
    pool.publish(first, 13)
    assert pool.claimant(second) is None
    third = make_request("c", [*range(1, 13), *range(50, 60)])
    assert (
        begin(pool, third)
        and pool.claimant(make_request("d", [*range(1, 13), *range(50, 55)])) is third
    )
    pool.free(third)
    assert not pool._claims


def test_trim_gives_back_what_a_failed_step_took():
    pool = pool_of()
    request = make_request("a", range(1, 14))
    assert begin(pool, request) and pool.extend(request, 13)
    pool.trim(request, 5)
    request.num_computed_tokens = 5
    assert len(request.tables[0]) == 2 and pool.num_used == 2
    check_pool(pool, [request])


def chain_of_three(pool):
    """`bad` publishes one block, `child` hangs one more on it, `other` shares nothing."""
    bad, child = make_request("bad", range(1, 6)), make_request("child", range(1, 10))
    other = make_request("other", range(100, 110))
    for request in (bad, child, other):
        compute(pool, request)
    return bad, child, other


def test_withdraw_takes_what_was_published_and_what_hangs_on_it():
    pool = pool_of()
    bad, child, other = chain_of_three(pool)
    pool.withdraw(bad, [bad, child, other])
    assert set(pool.cached[0].values()) == set(other.tables[0][:2])
    assert not child.publishes and other.publishes
    check_pool(pool, [bad, child, other])


def test_withdraw_frees_idle_blocks_and_leaves_what_the_request_only_read():
    pool = pool_of()
    good, bad = make_request("good", range(1, 6)), make_request("bad", range(1, 10))
    compute(pool, good)
    compute(pool, bad)
    release(pool, bad)
    pool.withdraw(bad, [good])
    assert set(pool.cached[0].values()) == {good.tables[0][0]} and good.publishes
    check_pool(pool, [good])


def test_withdraw_takes_what_derives_from_an_evicted_block():
    pool = pool_of(blocks=4)
    bad, reader = make_request("bad", range(1, 6)), make_request("reader", range(1, 10))
    compute(pool, bad)
    compute(pool, reader)
    first, second = reader.tables[0][:2]
    release(pool, bad)
    release(pool, reader)
    pool._forget(first)  # the chain is broken: its head is gone
    del pool._evictable[first]
    pool._free.append(first)
    assert set(pool.cached[0].values()) == {second}
    pool.withdraw(bad, [])
    assert not pool.cached[0]
    check_pool(pool, [])


def test_withdraw_leaves_what_was_computed_from_scratch_under_a_withdrawn_hash():
    pool = pool_of(blocks=8)
    bad = make_request("bad", range(1, 6))
    compute(pool, bad)
    private = make_request("private", range(1, 10), prompt_logprobs=1)  # reads no block of another
    compute(pool, private)
    pool.withdraw(bad, [bad, private])
    assert set(pool.cached[0].values()) == {private.tables[0][1]} and private.publishes
    check_pool(pool, [bad, private])


def test_a_request_that_reads_withdrawn_blocks_publishes_and_claims_no_more():
    pool = pool_of(blocks=16)
    bad = make_request("bad", range(1, 6))
    compute(pool, bad)
    reader = make_request("reader", range(1, 14))
    assert begin(pool, reader) and pool._claims
    pool.withdraw(bad, [reader])
    assert not pool._claims
    assert pool.extend(reader, 13)
    reader.num_computed_tokens = 13
    pool.publish(reader, 13)
    assert not pool.cached[0]
    pool.free(reader)
    assert reader.publishes  # what it computes from scratch is sound


@pytest.mark.parametrize(
    ("harm", "invariant"),
    [
        (lambda pool, r: pool._refs.__setitem__(r.tables[0][0], 2), "I2"),
        (lambda pool, r: pool._free.pop(), "I3"),
        (lambda pool, r: pool._free.__setitem__(0, pool._free[1]), "I1"),
        (lambda pool, r: pool._cached[0].clear(), "I4: hashes"),
        (lambda pool, r: pool._evictable.__setitem__(pool._free.pop(), None), "I4: an evictable"),
        (lambda pool, r: setattr(r, "num_computed_tokens", 3), "I6"),
        (lambda pool, r: pool._claims.__setitem__(b"", make_request("gone", [1])), "I12"),
    ],
)
def test_check_names_the_broken_invariant(harm, invariant):
    pool = pool_of()
    request = make_request("a", range(1, 10))
    compute(pool, request)
    check_pool(pool, [request])
    harm(pool, request)
    with pytest.raises(AssertionError, match=invariant):
        check_pool(pool, [request])


def test_check_sees_a_free_block_with_a_hash_and_a_shared_block_being_written():
    pool = pool_of()
    one = make_request("a", range(1, 10))
    compute(pool, one)
    release(pool, one)
    pool._free.append(pool._evictable.popitem()[0])
    with pytest.raises(AssertionError, match="I4: a free block"):
        check_pool(pool, [])
    pool = pool_of()
    one, two = make_request("a", range(1, 10)), make_request("b", range(1, 10))
    compute(pool, one)
    pool._refs = [2 * refs for refs in pool._refs]
    two.tables, two.num_passed, two.num_computed_tokens = one.tables, [0], 9
    with pytest.raises(AssertionError, match="I5"):
        check_pool(pool, [one, two])


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_match_finds_the_longest_prefix_that_a_naive_search_finds(prompts, size):
    pool = BlockPool(200, size, key=KEY)
    seen: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        request = make_request(f"r{i}", prompt)
        usable = range(0, len(prompt), size)
        naive = max(n for n in usable if n == 0 or any(old[:n] == prompt[:n] for old in seen))
        assert len(found(pool, request)) * size == naive
        compute(pool, request)
        release(pool, request)
        check_pool(pool, [])
        seen.append(prompt[: len(prompt) // size * size])


def test_the_choices_of_a_prompt_share_its_hashes_and_no_others(monkeypatch):
    pool, other = pool_of(64, 4), pool_of(64, 4, key=bytes(32))
    made = []
    honest = BlockHasher.digest
    monkeypatch.setattr(
        BlockHasher, "digest", lambda self, *parts: made.append(self) or honest(self, *parts)
    )
    # Four full blocks and two tokens.
    first = make_asked("a", range(1, 19), max_tokens=20, hasher=pool.hasher)
    asked = [first, *(first.sibling(str(i), i) for i in range(3))]
    assert made == [pool.hasher] * (1 + 4), "the root, and the four blocks, once for all"
    requests = [Request(one) for one in asked]
    for i, request in enumerate(requests):
        request.output_ids.extend([50 + i] * 6)
    hashes = [list(pool._hash_blocks(request, 6)) for request in requests]
    assert made[5:] == [pool.hasher] * (4 * 2), "two blocks of each one's own"
    assert all(each[:4] == hashes[0][:4] for each in hashes)
    assert len({each[4] for each in hashes}) == 4, "their own tokens differ"
    alone = make_request("alone", range(1, 19), max_tokens=20)
    assert pool._hash_blocks(alone, 4) == hashes[0][:4], "the same without the front's"
    fresh = Request(first.sibling("fresh", 9))
    assert other._hash_blocks(fresh, 4) != hashes[0][:4], "another pool has another key"
