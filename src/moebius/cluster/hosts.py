"""Where the ranks of a group are, and where an epoch's ranks exchange their rows."""

import importlib.util
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import msgspec

from moebius.cluster.alike import common_isa
from moebius.cluster.cluster import Cluster, local_ranks
from moebius.engine import wire
from moebius.engine.cluster import HostHello
from moebius.engine.member import FILE, TCP
from moebius.engine.place import place
from moebius.engine.remote import RemoteClient
from moebius.engine.supervisor import EngineProcess, WatchedProcess
from moebius.errors import ConfigError
from moebius.parallel.exchange import Epoch, ExchangeSpec


class EpochPlace(ABC):
    """What the ranks of one epoch meet at. Ranks are numbered as in that epoch here."""

    @abstractmethod
    def of(self, rank: int) -> str:
        """What a rank is told of it: wire.Join.place."""

    def near(self, rank: int) -> tuple[int, ...]:
        """wire.Join.near."""
        return ()

    @abstractmethod
    def carry(self, told: wire.Listening, rank: int) -> None:
        """Where a rank listens, to all others."""

    @abstractmethod
    def give_up(self, ranks: Sequence[int]) -> None:
        """End the epoch: whoever waits in it for these ranks waits no longer."""


class SharedPlace(EpochPlace):
    """Memory of one host."""

    def __init__(self, spec: ExchangeSpec, epoch: Epoch, at_once: int) -> None:
        """at_once   how many of the ranks can compute at the same time"""
        from moebius.parallel.shared_memory import Segment  # which needs the compiled kernels

        self._segment = Segment(spec, epoch, cores=at_once)

    def of(self, rank: int) -> str:
        return self._segment.place

    def carry(self, told: wire.Listening, rank: int) -> None:
        """Nothing: who shares memory needs no address."""

    def give_up(self, ranks: Sequence[int]) -> None:
        self._segment.give_up(list(ranks))
        self._segment.close()


class DevicePlace(EpochPlace):
    """A file of one host, at which processes with a device each meet."""

    def __init__(self, epoch: Epoch, remotes: Sequence[RemoteClient]) -> None:
        self._epoch = epoch
        self._remotes = remotes
        self._directory = Path(tempfile.mkdtemp(prefix="moebius-"))  # of mode 0700

    def of(self, rank: int) -> str:
        return f"{FILE}{self._directory / 'ranks'}"

    def carry(self, told: wire.Listening, rank: int) -> None:
        """Nothing: the file tells them."""

    def give_up(self, ranks: Sequence[int]) -> None:
        for remote in self._remotes:
            remote.tell(wire.GiveUp(self._epoch.number, tuple(ranks)))
        shutil.rmtree(self._directory, ignore_errors=True)


class ConnectedPlace(EpochPlace):
    """Connections between hosts.

    nodes       the number of each rank's host
    addresses   of each rank's host
    remotes     the ranks' clients
    """

    def __init__(
        self,
        epoch: Epoch,
        nodes: Sequence[int],
        addresses: Sequence[str],
        remotes: Sequence[RemoteClient],
    ) -> None:
        self._epoch = epoch
        self._nodes = nodes
        self._addresses = addresses
        self._remotes = remotes

    def of(self, rank: int) -> str:
        return TCP + self._addresses[rank]

    def near(self, rank: int) -> tuple[int, ...]:
        here = enumerate(self._nodes)
        return tuple(other for other, node in here if node == self._nodes[rank] and other != rank)

    def carry(self, told: wire.Listening, rank: int) -> None:
        for other, remote in enumerate(self._remotes):
            if other != rank:
                remote.tell(told)

    def give_up(self, ranks: Sequence[int]) -> None:
        for remote in self._remotes:
            remote.tell(wire.GiveUp(self._epoch.number, tuple(ranks)))


class Hosts(ABC):
    """Where each rank of a group is."""

    @property
    def nodes(self) -> tuple[int, ...]:
        """How many ranks each host has, or each node of memory, where ranks are numbered node by
        node; empty where they are not, and where there is no more than one."""
        return ()

    @abstractmethod
    def name(self, rank: int) -> str:
        """A rank and its host, for a person."""

    @abstractmethod
    def start(self, rank: int) -> WatchedProcess:
        """A process for a rank. EngineError where none can be had."""

    @abstractmethod
    def launch(self, message: wire.Launch, rank: int, loaded: Sequence[int]) -> wire.Launch:
        """What a rank is launched with; `loaded` ranks have their memory."""

    @abstractmethod
    def place(
        self, spec: ExchangeSpec, epoch: Epoch, remotes: Mapping[int, RemoteClient], device: str
    ) -> EpochPlace:
        """Where ranks meet in an epoch; `remotes` has its members by their rank, in order, whose
        rows lie on a device of this kind."""


class OneHost(Hosts):
    """All ranks are here."""

    def __init__(self, size: int, threads: int | None) -> None:
        if importlib.util.find_spec("moebius._cpu") is None:
            raise ConfigError(
                "ranks of one host need the compiled kernels, which this installation lacks: "
                "install again with a C++ compiler at hand, or use --ranks 1"
            )
        self._size = size
        places = [place(rank, size, threads) for rank in range(size)]
        self._at_once = places[0].at_once
        memory = [None if each.binding is None else each.binding.memory_nodes for each in places]
        self._nodes = node_sizes(memory)

    @property
    def nodes(self) -> tuple[int, ...]:
        return self._nodes

    def name(self, rank: int) -> str:
        return f"rank {rank}"

    def start(self, rank: int) -> WatchedProcess:
        return EngineProcess()

    def launch(self, message: wire.Launch, rank: int, loaded: Sequence[int]) -> wire.Launch:
        config = message.config
        trace = None if config.trace is None else f"{config.trace}.{rank}"
        return msgspec.structs.replace(
            message,
            config=replace(config, trace=trace),
            rank=rank,
            neighbours=self._size - len(loaded),
            local_rank=rank,
            local_ranks=self._size,
        )

    def place(
        self, spec: ExchangeSpec, epoch: Epoch, remotes: Mapping[int, RemoteClient], device: str
    ) -> EpochPlace:
        if device != "cpu":
            return DevicePlace(epoch, list(remotes.values()))
        return SharedPlace(spec, epoch, self._at_once)


class ManyHosts(Hosts):
    """Ranks in the order of hosts, as evenly as it goes.

    node_of  which host each rank is on, where that is otherwise
    isa      the kernels of all that have ranks
    """

    def __init__(
        self,
        cluster: Cluster,
        hosts: Sequence[HostHello],
        *,
        exact_isa: bool,
        node_of: Sequence[int] | None = None,
    ) -> None:
        self._cluster = cluster
        self._hosts = hosts
        ranks = hosts[0].config.ranks
        self._node_of = node_of or [
            node
            for node, _ in enumerate(hosts)
            for _ in range(local_ranks(ranks, len(hosts), node))
        ]
        with_ranks = [host for host in hosts if host.node in self._node_of]
        self.isa = common_isa(with_ranks, exact=exact_isa)

    @property
    def nodes(self) -> tuple[int, ...]:
        return node_sizes(self._node_of)

    @property
    def text(self) -> str:
        """Who is there, for a person."""
        names = ", ".join(f"node {host.node} is {host.name}" for host in self._hosts)
        return f"hosts: {names}; kernels of all: {self.isa}"

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self._host(rank).title}"

    def start(self, rank: int) -> WatchedProcess:
        node = self._node_of[rank]
        return self._cluster.start(node, rank) if node else EngineProcess(self._cluster.key)

    def launch(self, message: wire.Launch, rank: int, loaded: Sequence[int]) -> wire.Launch:
        host = self._host(rank)
        here = self._neighbours(rank)
        own = host.config
        return msgspec.structs.replace(
            message,
            directory=host.directory,
            tokenizer=host.tokenizer,
            config=replace(
                message.config,
                threads=own.threads,
                trace=None if own.trace is None else f"{own.trace}.{rank}",
                kv_cache_memory_bytes=own.kv_cache_memory_bytes,
            ),
            rank=rank,
            neighbours=len(set(here) - set(loaded)),
            isa=self.isa,
            local_rank=here.index(rank),
            local_ranks=len(here),
        )

    def place(
        self, spec: ExchangeSpec, epoch: Epoch, remotes: Mapping[int, RemoteClient], device: str
    ) -> EpochPlace:
        assert device == "cpu", "a rank with a device of its own refuses to be one of several hosts"
        addresses = [self._host(rank).address for rank in remotes]
        nodes = [self._node_of[rank] for rank in remotes]
        return ConnectedPlace(epoch, nodes, addresses, list(remotes.values()))

    def _neighbours(self, rank: int) -> list[int]:
        """The ranks that share a machine's cores and memory with this one, itself among them."""
        return [other for other, node in enumerate(self._node_of) if node == self._node_of[rank]]

    def _host(self, rank: int) -> HostHello:
        return self._cluster.hello(self._node_of[rank])


def node_sizes(node_of: Sequence[Hashable]) -> tuple[int, ...]:
    """Of the node of each rank: how many ranks each of several nodes has, where they are one behind
    the other; else nothing."""
    counts = tuple(len(list(ranks)) for _, ranks in groupby(node_of))
    return counts if 1 < len(counts) == len(set(node_of)) else ()
