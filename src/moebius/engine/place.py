"""Where a rank computes: its share of its host's threads, its cores and its memory."""

import logging
from dataclasses import dataclass
from pathlib import Path

from moebius import machine
from moebius.engine.faults import say
from moebius.parallel import topology

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank has of its host.

    threads    what it computes with
    at_once    how many of the host's ranks can compute at the same time
    binding    what it is to be bound to; None where there is nothing to gain by that
    """

    threads: int
    at_once: int
    binding: topology.Binding | None = None

    def take(self) -> None:
        """Bind this process, before it has threads that compute: others keep their place."""
        if self.binding is None:
            return
        try:
            topology.bind(self.binding)
        except OSError as error:  # the processors that may be used have changed since
            say(log.warning, "this rank is bound to no processors: %s", error)


def share_threads(wanted: int | None, ranks: int, root: Path = machine.ROOT) -> int:
    """What each of a host's ranks computes with, where `wanted` does not say it."""
    return wanted or max(1, machine.threads(root) // ranks)


def place(rank: int, ranks: int, wanted: int | None = None, root: Path = machine.ROOT) -> Place:
    """The place of one of the ranks on this host.

    It is bound unless it is alone, or wants more threads than its share of the processors: then the
    system may move them about.
    """
    threads = share_threads(wanted, ranks, root)
    at_once = max(1, machine.threads(root) // threads)
    if ranks == 1:
        return Place(threads, at_once)
    binding = topology.bindings(topology.read_topology(root), ranks)[rank]
    return Place(threads, at_once, binding if threads <= len(binding.processors) else None)
