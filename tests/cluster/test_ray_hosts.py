"""Ranks that Ray placed: what each is launched with where it is, and where they meet."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from msgspec import structs

from moebius import machine
from moebius.cluster.hosts import ConnectedPlace, SharedPlace
from moebius.cluster.ray_hosts import ActorCluster, ActorHosts
from moebius.engine import wire
from moebius.engine.cluster import HostHello
from moebius.engine.config import EngineConfig
from moebius.errors import ConfigError, EngineError
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import Listener

CONFIG = EngineConfig(ranks=3, threads=2, trace="here")
FRONT = HostHello(
    release="1.0",
    node=0,
    nodes=4,
    name="anna",
    address="10.0.0.1",
    directory="/models/a",
    weights="0123",
    config=CONFIG,
    isas=("portable", "avx2", "amx"),
    called="Ray node 00000000",
    machine="A",
)
MESSAGE = wire.Launch("/models/a", CONFIG, b"key", frozenset({7}))
SPEC = ExchangeSpec(size=3, tokens=8, hidden=16, top_k=2, dtype=torch.float32)


def actor(rank: int, **differs: Any) -> HostHello:
    named = f"Ray node {rank}{rank}{rank}{rank}"
    return structs.replace(FRONT, node=rank + 1, called=named, **differs)


class Known:
    def __init__(self, *actors: HostHello) -> None:
        self.hellos = dict(enumerate((FRONT, *actors)))
        self.started: list[tuple[int, int]] = []

    def hello(self, node: int) -> HostHello:
        return self.hellos[node]

    def start(self, node: int, rank: int) -> None:
        self.started.append((node, rank))


def placed(*actors: HostHello) -> tuple[ActorHosts, Known]:
    known = Known(*actors)
    cluster: Any = known
    return ActorHosts(cluster, list(known.hellos.values()), exact_isa=False), known


ELSEWHERE: dict[str, Any] = {"name": "bert", "address": "10.0.0.2", "machine": "B"}
TWO_MACHINES = (
    actor(0),
    actor(1, **ELSEWHERE, isas=("portable", "avx2"), directory="/data/a"),
    actor(2, **ELSEWHERE, isas=("portable", "avx2"), directory="/data/a"),
)


def test_ranks_share_the_cores_of_the_machine_that_they_are_on() -> None:
    hosts, known = placed(*TWO_MACHINES)
    first = hosts.launch(MESSAGE, 0, loaded=[])
    assert (first.rank, first.local_rank, first.local_ranks) == (0, 0, 1)
    last = hosts.launch(MESSAGE, 2, loaded=[0, 1])
    assert (last.rank, last.local_rank, last.local_ranks, last.neighbours) == (2, 1, 2, 1)
    assert (last.directory, last.isa) == ("/data/a", "avx2")
    assert last.config.threads == 2 and last.config.trace == "here.2"
    hosts.start(2)
    assert known.started == [(3, 2)], "not on the front's own"
    # Ray has started the second one anew, on the front's machine.
    known.hellos[2] = actor(1)
    moved = hosts.launch(MESSAGE, 1, loaded=[0, 2])
    assert (moved.local_rank, moved.local_ranks, moved.directory) == (1, 2, "/models/a")


def test_machines_that_say_nothing_are_told_by_their_address() -> None:
    quiet = [actor(rank, address=f"10.0.0.{rank // 2}", machine="") for rank in range(3)]
    hosts, _ = placed(*quiet)
    counts = [hosts.launch(MESSAGE, rank, loaded=[]).local_ranks for rank in range(3)]
    assert counts == [2, 2, 1]


def test_a_person_reads_which_node_has_which_rank() -> None:
    hosts, _ = placed(*TWO_MACHINES)
    assert hosts.name(2) == "rank 2 on Ray node 2222 (bert)"
    assert hosts.text == (
        "rank 0 on Ray node 0000 (anna), rank 1 on Ray node 1111 (bert), rank 2 on Ray node 2222 "
        "(bert); kernels of all: avx2"
    )


def test_the_fronts_kernels_do_not_count() -> None:
    """It computes nothing."""
    known = Known(*(actor(rank, isas=("portable", "avx2")) for rank in range(3)))
    cluster: Any = known
    hosts = ActorHosts(cluster, list(known.hellos.values()), exact_isa=True)
    assert hosts.isa == "avx2"


@pytest.mark.skipif(sys.platform != "linux", reason="memory without a name")
def test_ranks_meet_in_memory_where_all_are_on_the_fronts_machine() -> None:
    alone, _ = placed(actor(0), actor(1), actor(2))
    remotes: Any = {0: None, 1: None, 2: None}
    place = alone.place(SPEC, Epoch("group", 1), remotes, "cpu")
    assert isinstance(place, SharedPlace)
    place.give_up([0])
    apart, _ = placed(*TWO_MACHINES)
    assert isinstance(apart.place(SPEC, Epoch("group", 1), remotes, "cpu"), ConnectedPlace)
    beside, _ = placed(*(actor(rank, machine="B") for rank in range(3)))
    assert isinstance(beside.place(SPEC, Epoch("group", 1), remotes, "cpu"), ConnectedPlace), (
        "the front's memory is not theirs"
    )
    unknown = structs.replace(FRONT, machine="")
    quiet: Any = Known()
    quiet.hellos = {node: structs.replace(unknown, node=node) for node in range(4)}
    hosts = ActorHosts(quiet, list(quiet.hellos.values()), exact_isa=False)
    assert isinstance(hosts.place(SPEC, Epoch("group", 1), remotes, "cpu"), ConnectedPlace)


def test_this_machine_is_the_same_for_all_of_its_processes() -> None:
    assert machine.identity() == machine.identity()
    if sys.platform == "linux":
        assert machine.identity()


def test_absent_actors_are_named_with_what_ray_says() -> None:
    listener = Listener.tcp("127.0.0.1", 0, ClusterKey.draw())
    cluster = ActorCluster(listener, FRONT, 0.1, lambda rank: f"Ray has no room for {rank}")
    try:
        with pytest.raises(ConfigError) as first:
            cluster.assemble()
        assert "the actor of rank 0, 1, 2 did not come to 127.0.0.1:" in str(first.value)
        assert str(first.value).endswith("within 0.1 s (--rdzv-timeout): Ray has no room for 0")
        with pytest.raises(
            EngineError, match=r"rank 1 has not come back within 0\.1 s: Ray has no"
        ):
            cluster.start(2, rank=1)
        cluster.refuse(ConfigError("no such model there"))
        with pytest.raises(ConfigError, match="no such model there"):
            cluster.assemble()
    finally:
        cluster.close()
