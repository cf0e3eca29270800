"""Which host has which rank, what a rank is launched with there, and where an epoch's ranks meet."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from moebius.cluster.cluster import local_ranks
from moebius.cluster.hosts import ConnectedPlace, ManyHosts, OneHost, node_sizes
from moebius.engine import wire
from moebius.engine.cluster import HostHello
from moebius.engine.config import EngineConfig
from moebius.engine.place import Place
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.topology import Binding

CONFIG = EngineConfig(ranks=5, threads=4, trace="here", kv_cache_memory_bytes=1000)
FRONT = HostHello(
    release="1.0",
    node=0,
    nodes=2,
    name="anna",
    address="10.0.0.1",
    directory="/models/a",
    weights="0123",
    config=CONFIG,
    isas=("portable", "avx2"),
)
OTHER = structs.replace(
    FRONT,
    node=1,
    name="bert",
    address="10.0.0.2",
    directory="/data/a",
    config=replace(CONFIG, threads=None, trace=None, kv_cache_memory_bytes=2000),
    isas=("portable",),
)
MESSAGE = wire.Launch("/models/a", CONFIG, b"key", frozenset({7}))


class Known:
    """Hosts that have said what they are, and may say it again."""

    def __init__(self) -> None:
        self.hellos = {0: FRONT, 1: OTHER}
        self.started: list[tuple[int, int]] = []

    def hello(self, node: int) -> HostHello:
        return self.hellos[node]

    def start(self, node: int, rank: int) -> None:
        self.started.append((node, rank))


def of_many() -> tuple[ManyHosts, Known]:
    known = Known()
    cluster: Any = known
    return ManyHosts(cluster, [FRONT, OTHER], exact_isa=False), known


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (4, 2), (5, 2), (7, 3), (3, 3)])
def test_every_rank_is_on_one_host(ranks: int, nodes: int) -> None:
    counts = [local_ranks(ranks, nodes, node) for node in range(nodes)]
    assert sum(counts) == ranks and max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True)


def test_a_rank_is_launched_as_its_host_wants() -> None:
    hosts, known = of_many()
    assert "node 0 is anna, node 1 is bert; kernels of all: portable" in hosts.text
    third = hosts.launch(MESSAGE, 2, loaded=[0, 4])
    assert (third.directory, third.isa, third.rank) == ("/models/a", "portable", 2)
    assert (third.local_rank, third.local_ranks, third.neighbours) == (2, 3, 2)
    assert third.config == replace(CONFIG, trace="here.2")
    last = hosts.launch(MESSAGE, 4, loaded=[0, 4])
    assert (last.directory, last.isa, last.rank) == ("/data/a", "portable", 4)
    assert (last.local_rank, last.local_ranks, last.neighbours) == (1, 2, 1)
    assert last.config == OTHER.config
    assert last.eos_ids == {7} and last.prefix_key == b"key"
    assert hosts.name(3) == "rank 3 on node 1 (bert)"
    hosts.start(3)
    assert known.started == [(1, 3)]
    known.hellos[1] = structs.replace(OTHER, directory="/moved/a")  # it has come back
    assert hosts.launch(MESSAGE, 3, loaded=[]).directory == "/moved/a"


def test_nodes_are_told_by_how_many_ranks_each_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {of: node_sizes(of) for of in ("aabb", "aab", "abab", "abc", "aa", "")}
    assert found == {"aabb": (2, 2), "aab": (2, 1), "abab": (), "abc": (1, 1, 1), "aa": (), "": ()}
    known: Any = Known()
    for ranks, nodes in ((4, (2, 2)), (5, (3, 2))):
        front = structs.replace(FRONT, config=replace(CONFIG, ranks=ranks))
        assert ManyHosts(known, [front, OTHER], exact_isa=False).nodes == nodes

    def of_two_sockets(rank: int, ranks: int, threads: int | None) -> Place:
        return Place(1, 4, Binding(1, (rank,), (rank // 2,)))

    monkeypatch.setattr("moebius.cluster.hosts.place", of_two_sockets)
    assert [OneHost(ranks, 1).nodes for ranks in (4, 3, 2)] == [(2, 2), (2, 1), ()]


def test_ranks_of_one_host_are_launched_as_asked() -> None:
    launch = OneHost(3, None).launch(MESSAGE, 1, loaded=[0])
    assert launch == structs.replace(
        MESSAGE,
        config=replace(CONFIG, trace="here.1"),
        rank=1,
        neighbours=2,
        local_rank=1,
        local_ranks=3,
    )


class Remote:
    def __init__(self) -> None:
        self.told: list[wire.ToEngine] = []

    def tell(self, message: wire.ToEngine) -> None:
        self.told.append(message)


def test_an_epochs_members_meet_at_their_hosts_addresses() -> None:
    """Rank 1 is lost: the others are 0 to 3 in this epoch."""
    hosts, _ = of_many()
    remotes: Any = {rank: Remote() for rank in (0, 2, 3, 4)}
    spec = ExchangeSpec(size=4, tokens=8, hidden=16, top_k=2, dtype=torch.float32)
    place = hosts.place(spec, Epoch("group", 9), remotes, "cpu")
    assert isinstance(place, ConnectedPlace)
    at = [place.of(number).removeprefix("tcp://") for number in range(4)]
    assert at == ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2"]
    assert [place.near(number) for number in range(4)] == [(1,), (0,), (3,), (2,)]
    told = wire.Listening(9, 2, "10.0.0.2:4000")
    place.carry(told, 2)
    assert [each.told for each in remotes.values()] == [[told], [told], [], [told]]
    place.give_up([1])
    assert all(each.told[-1] == wire.GiveUp(9, (1,)) for each in remotes.values())


def test_ranks_with_a_device_each_meet_at_a_file_that_nobody_else_reads() -> None:
    remotes: Any = {rank: Remote() for rank in (0, 2)}
    spec = ExchangeSpec(size=2, tokens=8, hidden=16, top_k=2, dtype=torch.float32)
    place = OneHost(3, None).place(spec, Epoch("group", 9), remotes, "cuda")
    file = Path(place.of(0).removeprefix("file://"))
    assert place.of(1) == place.of(0) and place.near(0) == ()
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700 and not file.exists()
    place.give_up([1])
    assert all(each.told == [wire.GiveUp(9, (1,))] for each in remotes.values())
    assert not file.parent.exists()
