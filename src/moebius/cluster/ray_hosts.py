"""Ranks that Ray has placed: which machine each is on, and where an epoch's ranks meet.

Each rank's actor is a host of its own for the front, however many of them Ray has put on a machine.
"""

from collections.abc import Callable, Mapping, Sequence

from moebius.cluster.cluster import Cluster
from moebius.cluster.hosts import EpochPlace, ManyHosts, SharedPlace
from moebius.engine.cluster import HostHello
from moebius.engine.place import place
from moebius.engine.remote import RemoteClient
from moebius.parallel.exchange import Epoch, ExchangeSpec
from moebius.parallel.meet import Listener


def node_of(rank: int) -> int:
    """The number that a rank's actor has as a host; the front has 0, and no rank."""
    return rank + 1


class ActorCluster(Cluster):
    """The actors of all ranks, as the front's hosts.

    why     what Ray says of a rank's actor that is not there
    """

    def __init__(
        self, listener: Listener, own: HostHello, patience: float, why: Callable[[int], str]
    ) -> None:
        self._why = why
        super().__init__(listener, own, patience)

    def _name(self, hello: HostHello) -> str:
        return f"the actor of rank {hello.node - 1} on {hello.title}"

    def _not_come(self, nodes: Sequence[int], address: str) -> str:
        ranks = [node - 1 for node in nodes]
        return (
            f"the actor of rank {', '.join(map(str, ranks))} did not come to {address} within "
            f"{self._patience:g} s (--rdzv-timeout): {self._why(ranks[0])}"
        )

    def _not_back(self, node: int) -> str:
        rank = node - 1
        return (
            f"the actor of rank {rank} has not come back within {self._patience:g} s: "
            f"{self._why(rank)}"
        )


class ActorHosts(ManyHosts):
    """Where each rank's actor is, which may change when Ray starts it again.

    hosts   the front's own, and each rank's
    """

    def __init__(self, cluster: Cluster, hosts: Sequence[HostHello], *, exact_isa: bool) -> None:
        ranks = hosts[0].config.ranks
        numbers = [node_of(rank) for rank in range(ranks)]
        super().__init__(cluster, hosts, exact_isa=exact_isa, node_of=numbers)
        self._front = hosts[0]

    @property
    def text(self) -> str:
        """Who is there, for a person."""
        names = ", ".join(self.name(rank) for rank, _ in enumerate(self._node_of))
        return f"{names}; kernels of all: {self.isa}"

    def place(
        self, spec: ExchangeSpec, epoch: Epoch, remotes: Mapping[int, RemoteClient], device: str
    ) -> EpochPlace:
        """In memory where all are on the front's machine, which holds that memory."""
        here = self._front.machine
        if here and all(self._host(rank).machine == here for rank in remotes):
            return SharedPlace(spec, epoch, self._at_once(len(remotes)))
        return super().place(spec, epoch, remotes, device)

    def _at_once(self, ranks: int) -> int:
        return place(0, ranks, self._front.config.threads).at_once

    def _neighbours(self, rank: int) -> list[int]:
        """Those on the same machine, which is known by what they share, or by its address."""
        own = self._where(rank)
        return [other for other, _ in enumerate(self._node_of) if self._where(other) == own]

    def _where(self, rank: int) -> tuple[str, str]:
        host = self._host(rank)
        return host.machine, "" if host.machine else host.address
