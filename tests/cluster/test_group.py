"""Epochs of a group of ranks: who is told to join what, and when, whatever happens meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from front.losses import shared_memory
from front.mortal_engine import LIMITS, ask
from moebius.cluster import group as groups
from moebius.cluster.group import RankClient, RankGroup
from moebius.engine import wire
from moebius.engine.client import EngineInfo, EngineStats, ExpertLoads
from moebius.engine.config import EngineConfig
from moebius.errors import EngineError, MoebiusError, PeerError
from moebius.parallel import shared_memory as segments
from moebius.parallel.traffic import Traffic

INFO = EngineInfo(LIMITS, frozenset(), block_size=4, num_blocks=9, fingerprint="fp")
CONFIG = EngineConfig(ranks=2, step_deadline=10)


class Rank:
    """A rank's process and its client at once: what it was told."""

    rows = wire.Rows(2, 4, 8, 1, "float32")
    state = "the engine's process was ended by its test"
    silent_for = 0.0
    info = INFO

    def __init__(self) -> None:
        self.told: list[wire.ToEngine] = []
        self.given: list[int] = []
        self.heard: Callable[[wire.Joined | wire.Parted], None] = lambda message: None
        self.died: Callable[[Any], None] = lambda process: None
        self.while_loading: Callable[[], None] = lambda: None
        self.closed = False
        self.traffic = Traffic()

    def launch(self, message: wire.Launch, planned: object) -> Rank:
        self.message = message
        self.while_loading()
        return self

    def tell(self, message: wire.ToEngine) -> None:
        self.told.append(message)

    def submit(self, request: object, number: int) -> None:
        self.given.append(number)

    def start(self, deliver: object) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(ready=True, traffic=self.traffic)

    def expert_loads(self) -> ExpertLoads:
        return ExpertLoads()

    def close(self, timeout: float) -> None:
        self.closed = True

    kill = close

    def end(self) -> None:
        self.died(self)

    @property
    def joins(self) -> list[wire.Join]:
        return [each for each in self.told if isinstance(each, wire.Join)]


class Group:
    def __init__(self, directory: Path) -> None:
        self.group = RankGroup(wire.Launch(str(directory), CONFIG, bytes(32), frozenset()))
        self.ranks: dict[int, Rank] = {}
        self.clients: dict[int, RankClient] = {}
        self.lost: list[int] = []
        self.reasons: list[MoebiusError] = []

    def load(self, number: int, rank: Rank | None = None) -> Rank:
        rank = rank or Rank()
        self.ranks[number] = rank

        def lost(reason: MoebiusError) -> None:
            self.lost.append(number)
            self.reasons.append(reason)

        self.clients[number] = self.group.launch(number, lost, lambda plan: None, rank)  # type: ignore[arg-type]
        return rank

    def join(self, *numbers: int, epoch: int) -> None:
        for number in numbers:
            self.ranks[number].heard(wire.Joined(epoch))

    def part(self, number: int, ranks: tuple[int, ...], steps: int = 1) -> None:
        """A rank says that it cannot go on with these."""
        error = PeerError("it was slow", ranks=ranks)
        epoch = self.ranks[number].joins[-1].epoch
        self.ranks[number].heard(wire.Parted(epoch, error, steps))

    def ready(self) -> bool:
        return all(client.stats().ready for client in self.clients.values())


@pytest.fixture
def made(tiny_model: Path) -> Iterator[Group]:
    before = shared_memory()
    one = Group(tiny_model)
    yield one
    for client in one.clients.values():
        client.close(0)
    assert shared_memory() == before


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_epoch_begins_when_all_are_loaded_and_is_whole_when_all_have_joined(
    made: Group,
) -> None:
    first = made.load(0)
    assert not first.joins and first.message.neighbours == 2
    second = made.load(1)
    assert second.message.neighbours == 1 and second.message.rank == 1
    (join,) = first.joins
    assert (join.epoch, join.rank, join.heard) == (1, 0, 0)
    assert second.joins == [msgspec.structs.replace(join, rank=1)]
    assert join.timeout == 5, "a survivor comes back before it seems stuck itself"
    assert not made.ready()
    made.join(0, epoch=1)
    assert not made.ready()
    made.join(1, epoch=1)
    assert made.ready()


def test_every_rank_hears_of_every_request(made: Group) -> None:
    first = made.load(0)
    second = made.load(1)
    made.clients[0].submit(ask("a"))
    made.clients[1].submit(ask("b"))
    assert first.given == [1] and second.given == [2]
    assert second.told[-1] == wire.Hear(1) and first.told[-1] == wire.Hear(2)


def test_a_group_that_is_closed_has_no_memory_and_forms_no_more(made: Group) -> None:
    """As where Ctrl-C comes while ranks load, which are then killed without a word."""
    before = shared_memory()
    made.load(0)
    made.load(1)
    assert shared_memory() > before
    made.group.close()
    assert shared_memory() == before
    made.part(0, (0,))
    made.load(1)
    assert len(made.ranks[0].joins) == 1


def test_a_lost_rank_ends_the_epoch_and_its_successor_begins_the_next(made: Group) -> None:
    made.load(0)
    made.load(1).end()
    assert made.lost == [1]
    made.join(0, 1, epoch=1)  # frames of the epoch that is over
    assert not made.ready()
    made.clients[0].submit(ask("a"))
    made.load(1)
    assert [join.epoch for join in made.ranks[0].joins] == [1, 2]
    assert [join.epoch for join in made.ranks[1].joins] == [2]
    assert made.ranks[1].joins[0].heard == 1
    made.join(0, 1, epoch=1)
    assert not made.ready()
    made.join(0, 1, epoch=2)
    assert made.ready()


def test_a_rank_that_is_lost_while_the_other_loads_is_waited_for(made: Group) -> None:
    made.load(0)
    late = Rank()
    late.while_loading = made.ranks[0].end
    made.load(1, late)
    assert not late.joins
    made.load(0)
    assert [join.epoch for join in late.joins] == [1]
    assert [join.epoch for join in made.ranks[0].joins] == [1]


def test_one_that_is_lost_as_soon_as_it_is_loaded_begins_no_epoch(made: Group) -> None:
    made.load(0)
    short = Rank()
    short.while_loading = short.end
    made.load(1, short)
    assert not made.ranks[0].joins and made.lost == [1]
    made.load(1)
    assert len(made.ranks[0].joins) == 1


def test_ranks_that_have_parted_join_again(made: Group) -> None:
    made.load(0)
    made.load(1)
    made.join(0, 1, epoch=1)
    for number in (0, 1):
        made.part(number, (1,))
    assert not made.ready()
    until(lambda: not any(isinstance(each, threading.Timer) for each in threading.enumerate()))
    assert len(made.ranks[0].joins) == 2, "once, though both have said it"
    made.join(0, 1, epoch=2)
    assert made.ready()


def test_a_host_has_its_time_to_come_back_while_the_others_serve(
    made: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_AWAY_SECONDS", 0.01)
    tries = iter([EngineError("not yet"), EngineError("not yet"), None])
    found: Any = Rank()

    def start(rank: int) -> Any:
        error = next(tries)
        if error is not None:
            raise error
        return found

    monkeypatch.setattr(made.group._hosts, "start", start)
    with pytest.raises(EngineError, match="not yet"):
        made.group.start(1)
    made.load(0)
    made.load(1)
    made.join(0, 1, epoch=1)
    assert made.group.start(1) is found


def test_ranks_that_join_and_never_make_a_step_are_not_left_to_try_for_ever(
    made: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that the others miss is ended, which counts as a restart, with what they said."""
    monkeypatch.setattr(groups, "_PAUSE_SECONDS", 0.001)
    made.load(0)
    made.load(1)

    def epoch(number: int, steps: int) -> None:
        until(lambda: len(made.ranks[0].joins) == number)
        made.join(0, 1, epoch=number)
        made.part(0, (1,), steps)
        made.part(1, (1,), 0)

    for number in range(1, 5):
        epoch(number, steps=0)
    epoch(5, steps=1)  # now one was made
    for number in range(6, 11):
        assert not made.lost
        epoch(number, steps=0)
    until(lambda: bool(made.lost))
    assert made.lost == [1]
    assert "no step was made in 5 epochs: it was slow" in str(made.reasons[0])
    assert isinstance(made.reasons[0], PeerError)
    assert len(made.ranks[0].joins) == 10, "no further epoch without the one that was ended"
    made.load(1)
    assert len(made.ranks[0].joins) == 11


def test_who_is_missed_is_given_up_and_not_who_says_so(
    made: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.load(0)
    made.load(1)
    made.join(0, 1, epoch=1)
    place = made.group._place
    assert place is not None
    given_up: list[list[int]] = []
    monkeypatch.setattr(place._segment, "give_up", given_up.append)  # type: ignore[attr-defined]
    made.part(0, (1,))
    assert given_up == [[1]]


def test_only_a_loss_after_all_had_joined_can_be_a_requests_doing(made: Group) -> None:
    made.load(0)
    made.load(1)
    made.join(0, epoch=1)
    assert not made.group.stepped()
    made.join(1, epoch=1)
    made.part(0, (1,))  # as the others notice it before the front does
    made.ranks[1].end()
    assert made.group.stepped() and not made.group.stepped()
    made.ranks[0].end()
    assert not made.group.stepped()


def test_ranks_are_told_each_others_names(made: Group) -> None:
    made.load(0)
    made.load(1)
    assert [rank.joins[0].names for rank in made.ranks.values()] == [("rank 0", "rank 1")] * 2


def test_what_a_rank_has_exchanged_goes_on_where_its_last_engine_ended(made: Group) -> None:
    made.load(0)
    made.load(1)
    made.ranks[1].traffic = Traffic(3, 20, 10, 0.5)
    assert made.group.spread().ranks[1].traffic == Traffic(3, 20, 10, 0.5)
    made.ranks[1].end()
    assert made.group.spread().ranks[1].traffic == Traffic(3, 20, 10, 0.5)
    made.load(1).traffic = Traffic(1, 1, 1, 0.25)
    assert made.group.spread().ranks[1].traffic == Traffic(4, 21, 11, 0.75)


def test_a_rank_that_does_not_come_is_ended(made: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_JOIN_SECONDS", 0.2)
    made.load(0)
    made.load(1)
    for client in made.clients.values():
        client.start(lambda outputs: None)
    made.join(0, epoch=1)
    until(lambda: bool(made.lost))
    assert made.lost == [1]


def test_an_epoch_without_memory_ends_the_rank_that_would_begin_it(
    made: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.load(0)

    def none(*_: object, **options: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(segments, "Segment", none)
        with pytest.raises(OSError, match="Too many"):
            made.load(1)
    assert made.ranks[1].closed
    made.load(1)
    made.join(0, 1, epoch=made.ranks[1].joins[0].epoch)
    assert made.ready()
