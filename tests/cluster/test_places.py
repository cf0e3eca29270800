"""What a front does about uneven loads: as much as is worth it, a layer at a time."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping

import pytest

from moebius.cluster.places import Balancer, Journey, Places
from moebius.engine import wire
from moebius.engine.client import ExpertLoads, LayerLoad
from moebius.moe.placement import ALIKE, LayerPlacement, Nodes, Placement


def loads(*pairs: list[int]) -> ExpertLoads:
    nan = math.nan
    return ExpertLoads(
        1000,
        tuple(
            LayerLoad(layer, 2, sum(each) // 2, nan, nan, nan, (), tuple(each), tuple(each))
            for layer, each in enumerate(pairs)
        ),
    )


class Group:
    """Ranks that do at once what they are told, unless they refuse."""

    def __init__(
        self,
        layers: int = 2,
        spare: int = 0,
        experts: int = 4,
        ranks: int = 2,
        nodes: Nodes = ALIKE,
    ) -> None:
        linear = Placement.linear(dict.fromkeys(range(layers), experts), ranks, spare)
        self.linear = linear
        self.places = Places(linear)
        self.measured: ExpertLoads | None = None
        self.told: list[wire.Move] = []
        self.refuse = False
        self.formed = True
        self.balancer = Balancer(
            lambda: self.measured, self.places, self.move, spare=spare, nodes=nodes
        )

    def move(self, layers: Mapping[int, LayerPlacement]) -> Journey | None:
        if not self.formed:
            return None
        told, journey = self.places.begin(layers)
        self.told.append(told)
        if self.refuse:
            assert self.places.unmoved(told.number) is not None
        for rank in range(self.linear.ranks):
            self.places.moved(told.number, rank)
        return journey


def test_layers_that_gain_move_the_worst_first(caplog: pytest.LogCaptureFixture) -> None:
    """By hand: in order 1,400 of 2,000 are at rank 0, 1,800 of 2,000, and 1,040 of 2,000, where
    nothing is worth it."""
    group = Group(layers=3)
    group.measured = loads([700, 700, 300, 300], [900, 900, 100, 100], [520, 520, 480, 480])
    with caplog.at_level(logging.INFO):
        assert group.balancer.look() == 2
    assert [list(told.held) for told in group.told] == [[1], [0]]
    assert group.places.now.imbalance({0: [700, 700, 300, 300], 1: [900, 900, 100, 100]}) == {
        0: 1.0,
        1: 1.0,
    }
    assert group.places.now.layers[2] == group.linear.layers[2]
    assert group.places.moves == 2
    assert "layer 1: 1.80 -> 1.00, layer 0: 1.40 -> 1.00" in caplog.text
    assert group.balancer.look() == 0, "it is even now"


def test_a_rank_keeps_what_it_can() -> None:
    """One expert for one: 0 and 1 are at rank 0, and either may go."""
    group = Group(layers=1)
    group.measured = loads([900, 900, 100, 100])
    group.balancer.look()
    before = group.linear.layers[0].held
    after = group.places.now.layers[0].held
    assert [len({*a} & {*b}) for a, b in zip(before, after, strict=True)] == [1, 1]


def test_groups_of_experts_stay_on_a_node() -> None:
    """By hand: groups of two experts weigh 1,000, 200, 400 and 1,100. On two nodes of two ranks the
    lightest goes with the heaviest; where all ranks are alike, groups are torn apart."""
    measured = loads([900, 100, 100, 100, 200, 200, 200, 900])
    halves = {}
    for sizes in ((), (2, 2)):
        group = Group(layers=1, experts=8, ranks=4, nodes=Nodes(sizes, {0: 4}))
        group.measured = measured
        assert group.balancer.look() == 1
        held = group.places.now.layers[0].held
        halves[len(sizes)] = [{*held[0], *held[1]}, {*held[2], *held[3]}]
        assert [0 in each or 7 in each for each in held].count(True) == 2
    assert halves[2] == [{2, 3, 6, 7}, {0, 1, 4, 5}]
    assert any(len(halves[0][0] & {e, e + 1}) == 1 for e in (0, 2, 4, 6))


def test_spares_go_to_the_busiest() -> None:
    group = Group(layers=1, spare=1)
    group.measured = loads([100, 100, 100, 2000])
    group.balancer.look()
    held = group.places.now.layers[0].held
    assert all(3 in each and len(each) == 3 for each in held)


@pytest.mark.parametrize(
    "measured",
    [None, ExpertLoads(), loads([90, 90, 10, 10], [0, 0, 0, 0]), loads([500, 500, 500, 500])],
    ids=["apart", "dense", "too few", "even"],
)
def test_nothing_moves_without_a_reason(measured: ExpertLoads | None) -> None:
    group = Group()
    group.measured = measured
    assert group.balancer.look() == 0
    assert group.told == []


def test_what_fails_is_not_gone_on_with() -> None:
    group = Group()
    group.measured = loads([900, 900, 100, 100], [900, 900, 100, 100])
    group.refuse = True
    assert group.balancer.look() == 0
    assert len(group.told) == 1 and group.places.now == group.linear
    group.formed = False
    assert group.balancer.look() == 0
    assert len(group.told) == 1


def test_an_epoch_begins_by_what_some_rank_computes_by_already() -> None:
    linear = Placement.linear({0: 4}, 2)
    places = Places(linear)
    swapped = LayerPlacement(4, ((2, 3), (0, 1)))
    told, journey = places.begin({0: swapped})
    assert places.join() > told.number
    assert journey.ended.is_set() and not journey.made and places.now == linear
    told, journey = places.begin({0: swapped})
    places.moved(told.number, 1)
    assert places.now == linear
    number = places.join()
    assert places.now.layers[0] == swapped
    places.moved(told.number, 0)  # which comes too late
    assert places.moves == 0 and places.join() > number


def test_a_move_that_waits_for_traffic_ends_with_the_server() -> None:
    group = Group()
    group.measured = loads([900, 900, 100, 100], [900, 900, 100, 100])
    waits = threading.Event()

    def move(layers: Mapping[int, LayerPlacement]) -> Journey:
        waits.set()
        return group.places.begin(layers)[1]

    balancer = Balancer(lambda: group.measured, group.places, move, spare=0, seconds=0.01)
    balancer.start()
    assert waits.wait(10)
    balancer.stop()
    balancer._thread.join(10)
    assert not balancer._thread.is_alive()


def test_a_look_that_fails_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    looks = threading.Semaphore(0)

    def measure() -> ExpertLoads | None:
        looks.release()
        raise RuntimeError("no answer")

    group = Group()
    balancer = Balancer(measure, group.places, group.move, spare=0, seconds=0.01)
    balancer.start()
    assert all(looks.acquire(timeout=10) for _ in range(2))
    balancer.stop()
    assert "experts were not balanced: " in caplog.text


def test_survivors_go_on_where_they_have_every_expert() -> None:
    assert Places(Placement.linear({0: 4}, 2)).among([1]) is None
    alone = Places(Placement.linear({0: 4}, 2, spare=2)).among([1])
    assert alone is not None and alone.held == {0: ((2, 3, 0, 1),)}
