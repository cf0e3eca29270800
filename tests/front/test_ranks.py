"""Ranks in real processes: experts move between them under load, and one may be lost at once."""

from __future__ import annotations

import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from engine.collector import Collector
from engine.test_engine import prompts, tokens
from engine.test_moves import alone
from moebius.cluster.cluster import Cluster
from moebius.cluster.engines import EngineProcesses
from moebius.cluster.group import RankGroup
from moebius.cluster.hosts import ManyHosts
from moebius.engine import wire
from moebius.engine.cluster import HostHello
from moebius.engine.config import EngineConfig
from moebius.engine.node import Node
from moebius.front.replay import ReplayClient
from moebius.moe.placement import Placement
from moebius.ops.select import kernel_levels
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import Listener
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams

EXPERTS = {0: 4, 1: 4}
SECONDS = 90.0


class Served:
    """Ranks of tiny_model, with its experts between them."""

    def __init__(self, processes: EngineProcesses, client: ReplayClient) -> None:
        self.processes = processes
        self.client = client
        self.heard = Collector()
        group = processes._group
        assert group is not None
        self.group: RankGroup = group

    def submit(self, id: str, prompt: list[int], max_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        limits = self.client.info.limits
        self.client.submit(
            EngineRequest.create(id, prompt, params, limits, arrival=time.monotonic())
        )


@contextmanager
def served(directory: Path, ranks: int, **options: object) -> Iterator[Served]:
    """Two ranks share memory; three are on two hosts, as far as they know: two on the first."""
    config = EngineConfig(
        ranks=ranks,
        threads=1,
        max_model_len=1024,
        kv_cache_memory_bytes=2**20,
        **options,  # type: ignore[arg-type]
    )
    with (
        two_hosts(directory, config) if ranks == 3 else nullcontext() as hosts,
        EngineProcesses(2, key=None if hosts is None else hosts._cluster.key) as processes,
    ):
        launch = wire.Launch(str(directory), config, secrets.token_bytes(32), frozenset(), "error")
        one = Served(processes, processes.launch(launch, hosts=hosts))
        one.client.start(one.heard)
        until(lambda: one.client.stats().ready)
        yield one


@contextmanager
def two_hosts(directory: Path, config: EngineConfig) -> Iterator[ManyHosts]:
    """Both are this one, at its loopback address; they share no memory, as if they were not."""
    key = ClusterKey.draw()
    listener = Listener.tcp("127.0.0.1", 0, key)
    hellos = [
        HostHello(
            release="1",
            node=node,
            nodes=2,
            name=f"host {node}",
            address="127.0.0.1",
            directory=str(directory),
            weights="same",
            config=config,
            isas=kernel_levels(),
        )
        for node in range(2)
    ]
    cluster = Cluster(listener, hellos[0], SECONDS)
    node = Node(hellos[1], listener.address, key, SECONDS)  # type: ignore[arg-type]
    thread = threading.Thread(target=node.run)
    thread.start()
    try:
        yield ManyHosts(cluster, cluster.assemble(), exact_isa=True)
    finally:
        cluster.close()
        thread.join(SECONDS)


RANKS = [2, pytest.param(3, marks=pytest.mark.hosts)]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("count", RANKS)
def test_experts_move_between_processes_and_no_token_changes(tiny_model: Path, count: int) -> None:
    """Until every request has ended, to one random placement after the other."""
    requests = {str(i): prompt for i, prompt in enumerate(prompts(4, seed=9))}
    expected = alone(tiny_model, requests, 400)
    with served(tiny_model, count, spare_experts=1) as ranks:
        for id, prompt in requests.items():
            ranks.submit(id, prompt, 400)
        chance = random.Random(3)
        while not all(map(ranks.heard.ended, requests)):
            loads = {layer: [chance.random() for _ in range(4)] for layer in EXPERTS}
            placement = Placement.balanced(loads, count, spare=chance.randrange(2))
            journey = ranks.group._move(placement.layers)
            assert journey is not None
            while not (journey.ended.wait(0.01) or all(map(ranks.heard.ended, requests))):
                pass
        assert {id: tokens(ranks.heard.outputs[id]) for id in requests} == expected
        spread = ranks.processes.spread()
        assert spread is not None
        assert spread.epoch == 1 and spread.moves >= 3
        assert {layer.layer: layer.held for layer in spread.layers} == ranks.group.places.now.held
        assert all(1.0 <= layer.imbalance <= count for layer in spread.layers)
        assert all(rank.computing for rank in spread.ranks)
        # Each says in a moment what it has sent.
        until(lambda: all(rank.traffic.bytes_out for rank in ranks.processes.spread().ranks))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "count",
    [pytest.param(2, marks=pytest.mark.losses), pytest.param(3, marks=pytest.mark.hosts)],
)
def test_survivors_with_all_experts_go_on_at_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A process that loads is held up until the survivors have answered everything."""
    requests = {str(i): prompt for i, prompt in enumerate(prompts(4, seed=10))}
    expected = alone(tiny_model, requests, 300)
    with served(tiny_model, count, spare_experts=2) as ranks:
        answered = threading.Event()
        launch = RankGroup.launch

        def late(self: RankGroup, *given: object) -> object:
            assert answered.wait(SECONDS)
            return launch(self, *given)  # type: ignore[arg-type]

        monkeypatch.setattr(RankGroup, "launch", late)
        for id, prompt in requests.items():
            ranks.submit(id, prompt, 300)
        until(lambda: all(ranks.heard.outputs.get(id) for id in requests))
        os.kill(ranks.processes.processes[1].pid, signal.SIGKILL)
        until(lambda: all(map(ranks.heard.ended, requests)))
        assert {id: tokens(ranks.heard.outputs[id]) for id in requests} == expected
        spread = ranks.processes.spread()
        assert spread is not None
        assert [rank.computing for rank in spread.ranks] == [n != 1 for n in range(count)]
        assert ranks.client.stats().ready
        answered.set()
        until(lambda: all(rank.computing for rank in ranks.processes.spread().ranks))  # type: ignore[union-attr]
        ranks.submit("again", requests["0"], 300)
        until(lambda: ranks.heard.ended("again"))
        assert tokens(ranks.heard.outputs["again"]) == expected["0"]
