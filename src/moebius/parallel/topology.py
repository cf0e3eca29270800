"""Which of a host's processors and memory each of its ranks is bound to.

Memory is in nodes, each near some of the processors; a rank that computes on a node's cores reads
that node's memory fastest. What there is comes from Linux's sysfs and what this process may use of
it from /proc/self/status, both below a root that tests make up.
"""

import ctypes
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moebius.errors import ConfigError

ROOT = Path("/")
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MPOL_BIND = 2
_MPOL_INTERLEAVE = 3
# What the kernel gives up for others, of a node's meminfo: files that it has read, and its own.
_SPARE = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")


@dataclass(frozen=True, slots=True)
class Node:
    """Processors and memory that are near each other.

    cores       this process's share of them, each as the processors (hardware threads) that it has
    memory      bytes; 0 where there is none, or none for this process
    available   of these, what may still be taken
    distances   by the number of another node; relative, as firmware tells them
    """

    number: int
    cores: tuple[tuple[int, ...], ...]
    memory: int
    available: int
    distances: dict[int, int]


@dataclass(frozen=True, slots=True)
class Binding:
    """A rank's place.

    cores           how many, shared with other ranks only where there are fewer than ranks
    processors      theirs
    memory_nodes    where its memory is taken from; none where there is nothing to choose
    """

    cores: int
    processors: tuple[int, ...]
    memory_nodes: tuple[int, ...]


def read_topology(root: Path = ROOT) -> tuple[Node, ...]:
    """The nodes with processors or memory for this process; one of all where the kernel knows
    none."""
    allowed = _allowed(root, "Cpus_allowed_list")
    if allowed is None:
        allowed = _built_in_processors()
    folder = root / "sys/devices/system/node"
    numbers = sorted(_numbers(_text(folder / "online")))
    if not numbers:
        return (Node(0, _cores(root, allowed), 0, 0, {}),)
    memories = _allowed(root, "Mems_allowed_list")
    nodes = []
    for number in numbers:
        place = folder / f"node{number}"
        processors = _numbers(_text(place / "cpulist")) & allowed
        usable = memories is None or number in memories
        sizes = _sizes(place) if usable else {}
        distances = [int(word) for word in _text(place / "distance").split()]
        node = Node(
            number,
            _cores(root, processors),
            sizes.get("MemTotal", 0),
            sum(sizes.get(name, 0) for name in _SPARE),
            dict(zip(numbers, distances, strict=False)),
        )
        if node.cores or node.memory:
            nodes.append(node)
    return tuple(nodes)


def bindings(nodes: Iterable[Node], ranks: int) -> list[Binding]:
    """A place for each rank, near each other for ranks of neighbouring numbers.

    Ranks share the nodes in proportion to their cores, and a node's ranks its cores evenly. With
    fewer ranks than nodes a rank has several nodes.
    """
    nodes = tuple(nodes)
    computing = [node for node in nodes if node.cores]
    if ranks < 1 or not computing:
        raise ConfigError(f"{ranks} ranks on {len(computing)} nodes with processors for them")
    if ranks < len(computing):
        first = [len(computing) * rank // ranks for rank in range(ranks + 1)]
        groups = [computing[first[rank] : first[rank + 1]] for rank in range(ranks)]
        return [
            _binding(nodes, group, [core for node in group for core in node.cores])
            for group in groups
        ]
    found = []
    for node, count in zip(computing, _share(computing, ranks), strict=True):
        for cores in _split(node.cores, count):
            found.append(_binding(nodes, [node], cores))
    return found


def bind(binding: Binding) -> bool:
    """Binds this process, and all threads that it starts from now on.

    Returns whether its memory is bound too. A container may forbid it; then the kernel takes memory
    near the processor that first writes to it, as long as there is some.
    """
    os.sched_setaffinity(0, binding.processors)
    number = _SET_MEMPOLICY.get(platform.machine())
    if not binding.memory_nodes or number is None:
        return False
    mode, words = memory_policy(binding.memory_nodes)
    mask = (ctypes.c_ulong * len(words))(*words)
    # The kernel reads one bit less than it is told.
    done = ctypes.CDLL(None).syscall(
        ctypes.c_long(number), ctypes.c_int(mode), mask, ctypes.c_ulong(64 * len(words) + 1)
    )
    return int(done) == 0


def memory_policy(nodes: Sequence[int]) -> tuple[int, list[int]]:
    """set_mempolicy(2)'s mode and mask, in words of 64 bits.

    Of several nodes all give memory in turn: weights and caches are written by one thread and read
    by those of all nodes, and would lie on the first one's otherwise.
    """
    words = [0] * (max(nodes) // 64 + 1)
    for node in nodes:
        words[node // 64] |= 1 << node % 64
    return (_MPOL_BIND if len(nodes) == 1 else _MPOL_INTERLEAVE), words


def _share(nodes: list[Node], ranks: int) -> list[int]:
    """How many ranks each node gets: one, then more where a rank would have most cores."""
    counts = [1] * len(nodes)
    for _ in range(ranks - len(nodes)):
        room = [len(node.cores) / (count + 1) for node, count in zip(nodes, counts, strict=True)]
        counts[room.index(max(room))] += 1
    return counts


def _split(cores: tuple[tuple[int, ...], ...], ranks: int) -> list[tuple[tuple[int, ...], ...]]:
    """Neighbouring cores for each; all for all where they are fewer than ranks."""
    if len(cores) < ranks:
        return [cores] * ranks
    first = [len(cores) * rank // ranks for rank in range(ranks + 1)]
    return [cores[first[rank] : first[rank + 1]] for rank in range(ranks)]


def _binding(
    nodes: tuple[Node, ...], places: list[Node], cores: Iterable[tuple[int, ...]]
) -> Binding:
    cores = tuple(cores)
    with_memory = [node for node in nodes if node.memory]
    nearest = {_nearest(node, with_memory) for node in places} if len(with_memory) > 1 else set()
    processors = tuple(sorted(processor for core in cores for processor in core))
    return Binding(len(cores), processors, tuple(sorted(nearest)))


def _nearest(node: Node, with_memory: list[Node]) -> int:
    """Itself, where it has memory; the lowest of several that are as near."""
    if node.memory:
        return node.number
    return min(
        with_memory,
        key=lambda other: (node.distances.get(other.number, 255), other.number),
    ).number


def _cores(root: Path, processors: set[int]) -> tuple[tuple[int, ...], ...]:
    """Processors by the core that they are threads of; each alone where the kernel does not say."""
    cores = set()
    for processor in processors:
        place = root / f"sys/devices/system/cpu/cpu{processor}/topology"
        siblings = _text(place / "core_cpus_list") or _text(place / "thread_siblings_list")
        cores.add(tuple(sorted(_numbers(siblings) & processors or {processor})))
    return tuple(sorted(cores))


def _sizes(place: Path) -> dict[str, int]:
    """A node's meminfo, in bytes."""
    lines = (line.split() for line in _text(place / "meminfo").splitlines())
    # Node 0 MemTotal: 1234 kB
    return {words[2].rstrip(":"): int(words[3]) * 1024 for words in lines if len(words) == 5}


def _allowed(root: Path, field: str) -> set[int] | None:
    for line in _text(root / "proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return _numbers(value)
    return None


def _built_in_processors() -> set[int]:
    return set(range(os.cpu_count() or 1))


def _numbers(listed: str) -> set[int]:
    """Those of a list such as `0-3,8`."""
    found: set[int] = set()
    for part in listed.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _text(path: Path) -> str:
    """Empty where there is no such file: not every kernel has every one."""
    try:
        return path.read_text()
    except OSError:
        return ""
