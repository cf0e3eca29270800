"""Where a rank computes: its share of its host's threads, its cores and its memory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moebius import machine
from moebius.engine.faults import say
from moebius.parallel import topology

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """What a rank that is bound to nodes takes its memory from.

    nodes       their numbers
    available   bytes there
    ranks       how many of the host's ranks take theirs there, this one among them
    apart       others take theirs at other nodes, so what all read is far for some, unless each has
                a copy
    """

    nodes: tuple[int, ...]
    available: int
    ranks: int
    apart: bool


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank has of its host.

    threads    what it computes with
    at_once    how many of the host's ranks can compute at the same time
    binding    what it is to be bound to; None where there is nothing to gain by that
    memory     None where there is nothing to choose
    """

    threads: int
    at_once: int
    binding: topology.Binding | None = None
    memory: NodeMemory | None = None

    @property
    def room(self) -> int:
        """The rank's share of its nodes' memory; 0 where it has none of its own."""
        return 0 if self.memory is None else self.memory.available // self.memory.ranks

    def take(self) -> None:
        """Bind this process, before it has threads that compute: others keep their place."""
        if self.binding is None:
            return
        try:
            bound = topology.bind(self.binding)
        except OSError as error:  # the processors that may be used have changed since
            say(log.warning, "this rank is bound to no processors: %s", error)
            return
        if self.memory is not None and not bound:
            say(
                log.info,
                "this system does not let a rank choose its memory; it comes from near the "
                "processors that the rank is bound to",
            )


def share_threads(wanted: int | None, ranks: int, root: Path = machine.ROOT) -> int:
    """What each of a host's ranks computes with, where `wanted` does not say it."""
    return wanted or max(1, machine.threads(root) // ranks)


def places(ranks: int, wanted: int | None = None, root: Path = machine.ROOT) -> list[Place]:
    """The place of each of the ranks on this host.

    It is bound unless it is alone, or wants more threads than its share of the processors: then the
    system may move them about.
    """
    threads = share_threads(wanted, ranks, root)
    at_once = max(1, machine.threads(root) // threads)
    if ranks == 1:
        return [Place(threads, at_once)]
    nodes = topology.read_topology(root)
    bindings = topology.bindings(nodes, ranks)
    return [
        Place(threads, at_once, binding, _memory(binding, bindings, nodes))
        if threads <= len(binding.processors)
        else Place(threads, at_once)
        for binding in bindings
    ]


def place(rank: int, ranks: int, wanted: int | None = None, root: Path = machine.ROOT) -> Place:
    """The place of one of the ranks on this host."""
    return places(ranks, wanted, root)[rank]


def _memory(
    binding: topology.Binding,
    bindings: Sequence[topology.Binding],
    nodes: Sequence[topology.Node],
) -> NodeMemory | None:
    own = set(binding.memory_nodes)
    if not own:
        return None
    return NodeMemory(
        binding.memory_nodes,
        available=sum(node.available for node in nodes if node.number in own),
        ranks=sum(not own.isdisjoint(other.memory_nodes) for other in bindings),
        apart=any(own != set(other.memory_nodes) for other in bindings),
    )
