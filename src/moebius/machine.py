"""What this process may use of memory and processors.

A container is a control group with limits. Two generations of them exist, v1 (a tree for each
controller) and v2 (one tree), and both may be mounted at once. /proc/self/cgroup names the group
that we are in, /proc/self/mountinfo says where its tree is mounted and from which group on; the
limits of every group from ours up to there count. A process has limits of its own (`ulimit`), as
many batch systems set them.

Each function takes the root of the file system that it reads, for tests.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

ROOT = Path("/")
# What the kernel escapes in a mount's path: space, tab, line break and backslash.
_ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}
# Limits of a process, as /proc/self/limits names them, and what /proc/self/status calls what it
# uses of each.
_ULIMITS = {"Max address space": "VmSize:", "Max data size": "VmData:"}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that may still be taken (`available`) of a `limit`; `owner` says whose that is."""

    available: int
    limit: int
    owner: Literal["machine", "cgroup", "process"]


def memory(root: Path = ROOT) -> Memory:
    """The tightest of the machine's memory, our groups' limits and this process's own."""
    bounds = (_machine_memory(root), *_group_memory(root), *_process_memory(root))
    return min(bounds, key=lambda bound: bound.available)


def identity(root: Path = ROOT) -> str:
    """What processes have in common that can share memory by way of /proc/PID/fd: the running
    kernel, who they are, and what they see of processes and networks. "" where it is not known."""
    try:
        kernel = (root / "proc/sys/kernel/random/boot_id").read_text().strip()
        seen = [os.readlink(root / "proc/self/ns" / kind) for kind in ("pid", "net")]
        return " ".join([kernel, str(os.getuid()), *seen])
    except (OSError, AttributeError):  # no Linux
        return ""


def processors(root: Path = ROOT) -> float:
    """Processors' worth of time that we get.

    Those that we may run on, which a cpuset narrows; less by quota.
    """
    return min((float(_allowed_processors()), *_quotas(root)))


def threads(root: Path = ROOT) -> int:
    """How many threads can compute at once without using up a quota; at least 1."""
    return max(1, int(processors(root)))


def _allowed_processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # systems other than Linux
        return os.cpu_count() or 1


def _machine_memory(root: Path) -> Memory:
    """/proc/meminfo; where there is none, half of what is built in counts as available."""
    fields = _table(root / "proc/meminfo")
    if "MemAvailable:" in fields and "MemTotal:" in fields:
        return Memory(fields["MemAvailable:"] * 1024, fields["MemTotal:"] * 1024, "machine")
    total = _built_in()
    return Memory(total // 2, total, "machine")


def _built_in() -> int:
    """Bytes of memory of a machine without /proc: of other Unix systems, or Windows."""
    if sys.platform == "win32":
        kibibytes = ctypes.c_ulonglong()
        ctypes.WinDLL("kernel32").GetPhysicallyInstalledSystemMemory(ctypes.byref(kibibytes))
        return kibibytes.value * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _process_memory(root: Path) -> Iterator[Memory]:
    """What `ulimit -v` and `ulimit -d` leave of the address space, and of what is ours to write."""
    used = _table(root / "proc/self/status")
    for line in _text(root / "proc/self/limits").splitlines():
        for name, field in _ULIMITS.items():
            if not line.startswith(name):
                continue
            soft = line.removeprefix(name).split(maxsplit=1)[0]
            if soft.isdecimal():
                limit = int(soft)
                yield Memory(max(0, limit - 1024 * used.get(field, 0)), limit, "process")


def _group_memory(root: Path) -> Iterator[Memory]:
    for group in _groups(root, "memory"):
        stat = _table(group / "memory.stat")
        limits = [
            _number(group / "memory.max"),
            # Beyond it the kernel holds us up, rather than ending us.
            _number(group / "memory.high"),
            _number(group / "memory.limit_in_bytes"),
            stat.get("hierarchical_memory_limit"),  # v1: of groups above what is mounted, too
        ]
        limit = min((value for value in limits if value is not None), default=None)
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        if limit is not None:
            yield Memory(min(limit, max(0, limit - used + _reclaimable(stat))), limit, "cgroup")


def _reclaimable(stat: dict[str, int]) -> int:
    """Bytes of a group's use that the kernel gives up first: cached files that nobody has mapped.

    Mapped ones, such as the code of libraries, are in use. v1 counts groups below ours under names
    of their own.
    """
    total = "total_" if "total_inactive_file" in stat else ""
    cached = stat.get(f"{total}inactive_file", 0) + stat.get(f"{total}active_file", 0)
    mapped = stat.get("total_mapped_file", stat.get("file_mapped", 0))
    return max(0, cached - mapped) + stat.get("slab_reclaimable", 0)


def _quotas(root: Path) -> Iterator[float]:
    """Processors that each of our groups may use at once on average."""
    for group in _groups(root, "cpu"):
        words = _text(group / "cpu.max").split()
        if len(words) != 2:
            words = [_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")]
        if all(word.isdecimal() and int(word) > 0 for word in words):
            quota, period = map(int, words)
            yield quota / period


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of our group and of all above it that can be seen.

    They are in the trees that may hold the controller.
    """
    mounts = list(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = number == "0" and not controllers
        if unified or controller in controllers.split(","):
            trees = [tree for tree in mounts if tree.holds(None if unified else controller)]
            for tree, names in _places(trees, path):
                top = root / tree.point.relative_to("/")
                for depth in range(len(names), -1, -1):
                    yield top.joinpath(*names[:depth])


def _places(trees: list["_Mount"], path: str) -> list[tuple["_Mount", tuple[str, ...]]]:
    """The trees that show a group, with the names that lead to it from their tops.

    Where no tree shows it, the tops are the nearest to it that can be seen.
    """
    found = []
    for tree in trees:
        names = tree.below(path)
        if names is not None:
            found.append((tree, names))
    return found or [(tree, ()) for tree in trees]


@dataclass(frozen=True, slots=True)
class _Mount:
    """A mounted tree of groups.

    top           the group at its top
    point         where that is mounted
    controllers   v1's; None for the one tree of v2
    """

    top: PurePosixPath
    point: PurePosixPath
    controllers: frozenset[str] | None

    def holds(self, controller: str | None) -> bool:
        """None asks for the tree of v2."""
        if controller is None or self.controllers is None:
            return controller is None and self.controllers is None
        return controller in self.controllers

    def below(self, path: str) -> tuple[str, ...] | None:
        """The names that lead from the mount's top to a group; None where it lies elsewhere."""
        group = PurePosixPath(path)
        if not group.is_relative_to(self.top):
            return None
        parts = group.relative_to(self.top).parts
        return None if ".." in parts else parts


def _mounts(root: Path) -> Iterator[_Mount]:
    """The mounted trees, of proc(5)'s lines with these fields:

    id, parent, device, root, mount point, options, any number of tags, "-", type, source, options.
    """
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        place = before.split(" ")
        kind, *more = after.split(" ")
        if len(place) < 5 or len(more) < 2 or kind not in ("cgroup", "cgroup2"):
            continue
        controllers = None if kind == "cgroup2" else frozenset(more[1].split(","))
        yield _Mount(_unescaped(place[3]), _unescaped(place[4]), controllers)


def _unescaped(path: str) -> PurePosixPath:
    for escape, character in _ESCAPES.items():
        path = path.replace(escape, character)
    return PurePosixPath(path)


def _text(path: Path) -> str:
    """A file's content, empty where it cannot be read: not every kernel has every file."""
    return "\n".join(_lines(path)).strip()


def _lines(path: Path) -> list[str]:
    """A file's lines as they are: a group's name may hold any bytes but line breaks and slashes."""
    try:
        return os.fsdecode(path.read_bytes()).split("\n")
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, as `max` stands for no limit."""
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    words = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) >= 2 and line[1].isdecimal()}
