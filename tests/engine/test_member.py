"""A rank as a member of its group: it joins what it is told to, and says so or why not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from moebius.engine import wire
from moebius.engine.member import FILE, TCP, Member
from moebius.errors import ChannelError, ConfigError, PeerError
from moebius.moe.placement import Placement
from moebius.parallel.collective import CollectiveExchange
from moebius.parallel.exchange import Epoch, Exchange, ExchangeSpec
from moebius.parallel.key import ClusterKey
from moebius.parallel.shared_memory import Segment

KEY = ClusterKey.draw()
SPEC = ExchangeSpec(2, tokens=4, hidden=8, top_k=2, dtype=torch.float32, gathered=3, width=40)
EXPERTS = {0: 4, 2: 6}
NAMES = ("rank 0 on node 0 (left)", "rank 3 on node 1 (right)")


class Moves:
    """What ExpertMoves is asked for."""

    def __init__(self) -> None:
        self.moved: Callable[[int], None] = lambda number: None
        self.failed: Callable[[int, Exception], None] = lambda number, error: None
        self.asked: list[tuple[int, Any]] = []
        self.set_to: list[tuple[int, Placement, int]] = []
        self.refusal: Exception | None = None

    def ask(self, number: int, held: Any) -> None:
        self.asked.append((number, held))

    def set(self, number: int, placement: Placement, rank: int) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.set_to.append((number, placement, rank))


class Engine:
    """What RankEngine is told."""

    def __init__(self) -> None:
        self.moves = Moves()
        self.epoch_steps = 0
        self.on_parted: Callable[[PeerError], None] = lambda error: None
        self.joined: queue.SimpleQueue[tuple[Exchange, int]] = queue.SimpleQueue()
        self.left = 0
        self.heard: list[int] = []

    def join(self, exchange: Exchange, heard: int) -> None:
        self.joined.put((exchange, heard))

    def leave(self) -> None:
        self.left += 1

    def hear(self, number: int) -> None:
        self.heard.append(number)


class One:
    """A member, and all that it says."""

    def __init__(self, spec: ExchangeSpec = SPEC) -> None:
        self.engine = Engine()
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.carry: Callable[[wire.Listening], None] = lambda told: None
        self.member = Member(self.engine, spec, self._say, key=KEY)  # type: ignore[arg-type]

    def _say(self, message: Any) -> None:
        if isinstance(message, wire.Listening):
            self.carry(message)
        else:
            self.said.put(message)

    def hear(self) -> Any:
        return self.said.get(timeout=20)

    def told(self, join: wire.Join) -> None:
        """As the thread that reads and then the engine's do; the latter is not waited for."""
        self.member.expect(join)
        threading.Thread(target=self.member.take, args=(join,), daemon=True).start()


def join(place: str, epoch: int = 1, rank: int = 0, ranks: int = 2) -> wire.Join:
    held = Placement.linear(EXPERTS, ranks).held
    return wire.Join("group", epoch, rank, held, 7, place, 20.0, heard=5, names=NAMES)


def two_of(spec: ExchangeSpec) -> list[One]:
    """They hear where the other listens."""
    made = [One(spec), One(spec)]
    for one, other in (made, made[::-1]):
        one.carry = other.member.hear_address
    return made


@pytest.fixture
def two() -> Iterator[list[One]]:
    yield two_of(SPEC)


def test_it_joins_where_its_front_says_and_how(two: list[One]) -> None:
    epoch = Epoch("group", 1)
    with Segment(SPEC, epoch) as segment:
        for rank, one in enumerate(two):
            one.told(join(segment.place, rank=rank))
            assert one.hear() == wire.Joined(1)
    for rank, one in enumerate(two):
        exchange, heard = one.engine.joined.get()
        assert (exchange.epoch, exchange.rank, exchange.timeout) == (epoch, rank, 20.0)
        assert exchange.epoch.names == NAMES and heard == 5
        assert one.engine.moves.set_to == [(7, Placement.linear(EXPERTS, 2), rank)]
        assert one.engine.left == 1, "the epoch that it was in"
        exchange.close()


def test_what_it_exchanges_is_said_to_the_front() -> None:
    assert One().member.rows == wire.Rows(2, 4, 8, 2, "float32", 3, 40)


def test_a_smaller_epoch_has_fewer_ranks() -> None:
    one = One(replace(SPEC, size=4))
    with Segment(SPEC, Epoch("group", 1)) as segment:
        one.told(join(segment.place))
        assert one.hear() == wire.Joined(1)
    exchange, _ = one.engine.joined.get()
    assert exchange.size == 2
    exchange.close()


def test_a_place_that_is_gone_and_experts_that_it_cannot_have_are_said() -> None:
    one = One()
    with Segment(SPEC, Epoch("group", 1)) as segment:
        place = segment.place
    one.engine.epoch_steps = 9  # of an earlier epoch
    one.told(join(place))
    said = one.hear()
    assert (said.epoch, said.steps, type(said.error)) == (1, 0, PeerError)
    one.engine.moves.refusal = ConfigError("no such experts")
    one.told(join(place, epoch=2))
    said = one.hear()
    assert (said.epoch, said.steps, str(said.error)) == (2, 0, "no such experts")
    assert one.engine.joined.empty() and one.engine.left == 2


def test_that_it_lost_its_group_is_said_with_how_far_it_came() -> None:
    one = One()
    with Segment(SPEC, Epoch("group", 4)) as segment:
        one.told(join(segment.place, epoch=4))
        assert one.hear() == wire.Joined(4)
    one.engine.epoch_steps = 12
    error = PeerError("rank 1 is gone", ranks=(1,))
    one.engine.on_parted(error)
    assert one.hear() == wire.Parted(4, error, 12)


def test_requests_and_moves_are_handed_on() -> None:
    one = One()
    one.member.take(wire.Hear(3))
    held = {2: ((0, 1), (2, 3, 4, 5))}
    one.member.take(wire.Move(8, held))
    assert one.engine.heard == [3] and one.engine.moves.asked == [(8, held)]
    one.engine.moves.moved(8)
    assert one.hear() == wire.Moved(8)
    error = ConfigError("no room")
    one.engine.moves.failed(9, error)
    assert one.hear() == wire.Unmoved(9, error)


def test_a_front_that_is_gone_hears_nothing() -> None:
    one = One()

    def gone(message: Any) -> None:
        raise ChannelError("the front is gone")

    one.member._say = gone
    one.engine.moves.moved(8)


def over_sockets(two: list[One], epoch: int = 1) -> list[Exchange]:
    for rank, one in enumerate(two):
        one.member.expect(join(f"{TCP}127.0.0.1", epoch, rank))
    for rank, one in enumerate(two):
        place = join(f"{TCP}127.0.0.1", epoch, rank)
        threading.Thread(target=one.member.take, args=(place,), daemon=True).start()
    assert [one.hear() for one in two] == [wire.Joined(epoch)] * 2
    return [one.engine.joined.get()[0] for one in two]


def agree_in_a_thread(exchange: Exchange) -> Callable[[], Exception]:
    """What that raises, once it does."""
    raised: queue.SimpleQueue[Exception] = queue.SimpleQueue()

    def agree() -> None:
        try:
            exchange.agree((1,))
        except Exception as error:
            raised.put(error)

    threading.Thread(target=agree, daemon=True).start()
    return lambda: raised.get(timeout=10)


def test_ranks_of_several_hosts_meet_and_one_that_is_given_up_is_named(two: list[One]) -> None:
    first, second = over_sockets(two)
    raised = agree_in_a_thread(first)
    two[0].member.give_up(wire.GiveUp(2, (1,)))  # of an epoch that is not this one
    two[0].member.give_up(wire.GiveUp(1, (1,)))
    error = raised()
    assert isinstance(error, PeerError) and error.ranks == (1,)
    assert str(error).endswith(f"{NAMES[1]} is lost")
    for exchange in (first, second):
        exchange.close()


def with_devices(two: list[One], folder: Path, epoch: int = 1) -> list[Exchange]:
    """Ranks with a device each: here both have the host's memory for one, and gloo for NCCL."""
    for rank, one in enumerate(two):
        one.told(join(f"{FILE}{folder / f'epoch {epoch}'}", epoch, rank))
    assert [one.hear() for one in two] == [wire.Joined(epoch)] * 2
    return [one.engine.joined.get()[0] for one in two]


def test_ranks_with_a_device_each_meet_at_a_file(two: list[One], tmp_path: Path) -> None:
    first, second = with_devices(two, tmp_path)
    assert isinstance(first, CollectiveExchange) and first.epoch.names == NAMES
    raised = agree_in_a_thread(first)
    two[0].member.give_up(wire.GiveUp(2, (1,)))  # of an epoch that is not this one
    two[0].member.give_up(wire.GiveUp(1, (1,)))
    error = raised()
    assert isinstance(error, PeerError) and error.ranks == (1,)
    # The next epoch ends what still waits in this one: here for what the first never sent.
    assert second.agree((2,)) == [(1,), (2,)]
    later = agree_in_a_thread(second)
    again = with_devices(two, tmp_path, epoch=2)
    assert isinstance(later(), PeerError)
    answers = [agree_in_a_thread(again[0]), again[1].agree((2,))]
    assert answers[1] == [(1,), (2,)]
    for exchange in (first, second, *again):
        exchange.close()


def test_a_rank_that_nobody_meets_says_so(tmp_path: Path) -> None:
    one = One()
    one.told(structs.replace(join(f"{FILE}{tmp_path / 'none'}"), timeout=0.5))
    said = one.hear()
    assert isinstance(said.error, PeerError) and said.error.ranks == (1,)
    assert "did not meet" in str(said.error)


def test_the_front_hears_what_its_rows_lie_on() -> None:
    on_card = Member(One().engine, SPEC, print, device=torch.device("cuda", 1))  # type: ignore[arg-type]
    assert on_card.rows.device == "cuda" and One().member.rows.device == "cpu"


def test_the_next_epoch_ends_what_still_waits_in_the_last_one(two: list[One]) -> None:
    first, second = over_sockets(two)
    raised = agree_in_a_thread(first)
    two[0].member.expect(join(f"{TCP}127.0.0.1", epoch=2))
    assert isinstance(raised(), PeerError)
    first.close()
    second.close()
    # And one that nobody else comes to, so that it would wait for long.
    two[0].told(join(f"{TCP}127.0.0.1", epoch=3))
    two[0].member.expect(join(f"{TCP}127.0.0.1", epoch=4))
    said = two[0].hear()
    assert (said.epoch, said.steps) == (3, 0) and isinstance(said.error, PeerError)


def test_an_epoch_that_was_over_before_its_turn_came_is_not_joined() -> None:
    one = One()
    old = join(f"{TCP}127.0.0.1", epoch=1)
    one.member.expect(old)
    one.member.expect(join(f"{TCP}127.0.0.1", epoch=2))
    one.member.take(old)
    said = one.hear()
    assert said.epoch == 1 and "over before it was joined" in str(said.error)


def test_an_epoch_of_survivors_ends_for_them_alone() -> None:
    """Ranks are numbered within an epoch, which may have fewer than the group."""
    two = two_of(replace(SPEC, size=3))
    first, second = over_sockets(two)
    raised = agree_in_a_thread(first)
    two[0].member.expect(join(f"{TCP}127.0.0.1", epoch=2, ranks=3))
    error = raised()
    assert isinstance(error, PeerError) and error.ranks == (0, 1)
    first.close()
    second.close()


def test_a_rank_without_the_clusters_key_says_so() -> None:
    one = One()
    one.member._key = None
    one.told(join(f"{TCP}127.0.0.1"))
    assert "does not have the cluster's key" in str(one.hear().error)
