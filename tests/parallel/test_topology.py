"""Where ranks are bound to, on hosts made of files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moebius.errors import ConfigError
from moebius.parallel import topology
from moebius.parallel.topology import Binding, Node, bind, bindings, read_topology

GIB = 2**20  # in the kernel's unit


class Host:
    """A file system with nodes; `allow` narrows what this process may use of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._online: list[int] = []

    def write(self, path: str, text: str) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text + "\n")

    def node(
        self, number: int, processors: str, gib: float, distance: str, free: float = 0
    ) -> Host:
        """`free` gigabytes of all are nobody's, and a kilobyte each of three kinds is easily had.

        Memory that cannot be had, and a line without a unit, are of such a file too.
        """
        place = f"sys/devices/system/node/node{number}"
        self.write(f"{place}/cpulist", processors)
        sizes = {
            "MemTotal": int(gib * GIB),
            "MemFree": int(free * GIB),
            "AnonPages": 77,
            "Active(file)": 1,
            "Inactive(file)": 1,
            "SReclaimable": 1,
        }
        lines = [f"Node {number} {name}:       {size} kB" for name, size in sizes.items()]
        self.write(f"{place}/meminfo", "\n".join([*lines, f"Node {number} HugePages_Free: 9"]))
        self.write(f"{place}/distance", distance)
        self._online.append(number)
        self.write("sys/devices/system/node/online", ",".join(map(str, self._online)))
        return self

    def threads(self, *cores: str) -> Host:
        for core in cores:
            for processor in core.split(","):
                self.write(f"sys/devices/system/cpu/cpu{processor}/topology/core_cpus_list", core)
        return self

    def allow(self, processors: str, memories: str = "0-7") -> Host:
        status = f"Name:\tx\nCpus_allowed_list:\t{processors}\nMems_allowed_list:\t{memories}"
        self.write("proc/self/status", status)
        return self

    def places(self, ranks: int) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        return [
            (place.cores, place.processors, place.memory_nodes)
            for place in bindings(read_topology(self.root), ranks)
        ]


@pytest.fixture
def two_sockets(tmp_path: Path) -> Host:
    """Four cores each, of two threads: 0 to 7 are the first ones, 8 to 15 the second."""
    host = Host(tmp_path).node(0, "0-3,8-11", 64, "10 21", 2)
    host.node(1, "4-7,12-15", 64, "21 10", 3)
    return host.threads(*(f"{core},{core + 8}" for core in range(8))).allow("0-15")


def test_two_sockets(two_sockets: Host) -> None:
    assert two_sockets.places(2) == [
        (4, (0, 1, 2, 3, 8, 9, 10, 11), (0,)),
        (4, (4, 5, 6, 7, 12, 13, 14, 15), (1,)),
    ]
    assert two_sockets.places(4) == [
        (2, (0, 1, 8, 9), (0,)),
        (2, (2, 3, 10, 11), (0,)),
        (2, (4, 5, 12, 13), (1,)),
        (2, (6, 7, 14, 15), (1,)),
    ]
    assert two_sockets.places(1) == [(8, tuple(range(16)), (0, 1))]
    node = read_topology(two_sockets.root)[1]
    cores = ((4, 12), (5, 13), (6, 14), (7, 15))
    assert node == Node(1, cores, 64 * 2**30, 3 * 2**30 + 3 * 1024, {0: 21, 1: 10})


def test_more_ranks_than_divide_evenly(two_sockets: Host) -> None:
    assert [cores for cores, _, _ in two_sockets.places(3)] == [2, 2, 4]
    assert [cores for cores, _, _ in two_sockets.places(6)] == [1, 1, 2, 1, 1, 2]


def test_more_ranks_than_cores_share_those_of_a_node(two_sockets: Host) -> None:
    places = two_sockets.places(10)
    assert (
        places
        == [(4, (0, 1, 2, 3, 8, 9, 10, 11), (0,))] * 5
        + [(4, (4, 5, 6, 7, 12, 13, 14, 15), (1,))] * 5
    )


def test_a_cpuset(two_sockets: Host) -> None:
    """Three cores of the first socket, one of them with one thread, and one of the second."""
    two_sockets.allow("1-3,9-10,5")
    assert two_sockets.places(2) == [(3, (1, 2, 3, 9, 10), (0,)), (1, (5,), (1,))]
    # The larger share of the cores gets the second rank.
    assert two_sockets.places(3) == [(1, (1, 9), (0,)), (2, (2, 3, 10), (0,)), (1, (5,), (1,))]


def test_a_cpuset_of_one_socket_with_the_memory_of_the_other(two_sockets: Host) -> None:
    two_sockets.allow("0-3", memories="1")
    # There is one node of memory: nothing to choose.
    assert two_sockets.places(2) == [(2, (0, 1), ()), (2, (2, 3), ())]
    first, second = read_topology(two_sockets.root)
    assert (first.memory, first.available, second.cores) == (0, 0, ())


def test_a_node_without_memory_takes_the_nearest(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.node(0, "0-1", 32, "10 12 31").node(1, "2-3", 0, "12 10 20").node(2, "4-5", 32, "31 20 10")
    host.allow("0-5")
    assert host.places(3) == [(2, (0, 1), (0,)), (2, (2, 3), (0,)), (2, (4, 5), (2,))]


def test_memory_without_processors_takes_no_rank(tmp_path: Path) -> None:
    """Such as memory behind an expansion card; node numbers may have gaps."""
    host = Host(tmp_path).node(0, "0-1", 32, "10 40").node(4, "", 128, "40 10").allow("0-1")
    assert host.places(2) == [(1, (0,), (0,)), (1, (1,), (0,))]
    assert read_topology(host.root)[0].distances == {0: 10, 4: 40}


def test_more_nodes_than_ranks(tmp_path: Path) -> None:
    host = Host(tmp_path).allow("0-3")
    for number in range(4):
        host.node(number, str(number), 16, "10 10 10 10")
    assert host.places(2) == [(2, (0, 1), (0, 1)), (2, (2, 3), (2, 3))]
    assert host.places(3) == [(1, (0,), (0,)), (1, (1,), (1,)), (2, (2, 3), (2, 3))]


def test_a_kernel_that_knows_no_nodes(tmp_path: Path) -> None:
    host = Host(tmp_path).allow("0-1,3")
    assert host.places(1) == [(3, (0, 1, 3), ())]
    assert host.places(3) == [(1, (0,), ()), (1, (1,), ()), (1, (3,), ())]


def test_no_ranks_are_refused(two_sockets: Host) -> None:
    with pytest.raises(ConfigError, match="0 ranks"):
        bindings(read_topology(two_sockets.root), 0)
    two_sockets.allow("40")
    with pytest.raises(ConfigError, match="0 nodes with processors"):
        bindings(read_topology(two_sockets.root), 1)


class Kernel:
    """Records what it is asked for, and grants it or not."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.calls: list[tuple[object, ...]] = []

    def sched_setaffinity(self, process: int, processors: tuple[int, ...]) -> None:
        self.calls.append((process, processors))

    def syscall(self, number: Any, mode: Any, mask: Any, bits: Any) -> int:
        self.calls.append((number.value, mode.value, list(mask), bits.value))
        return self.status


def kernel(monkeypatch: pytest.MonkeyPatch, machine: str = "x86_64", status: int = 0) -> Kernel:
    made = Kernel(status)
    monkeypatch.setattr(os, "sched_setaffinity", made.sched_setaffinity, raising=False)
    monkeypatch.setattr(topology.ctypes, "CDLL", lambda name: made)
    monkeypatch.setattr(topology.platform, "machine", lambda: machine)
    return made


# Of set_mempolicy(2): MPOL_BIND is 2, MPOL_INTERLEAVE 3.
def test_what_the_kernel_is_asked_for(two_sockets: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of one word is told as 65 bits, of which the kernel reads 64."""
    asked = kernel(monkeypatch)
    for place in bindings(read_topology(two_sockets.root), 2):
        assert bind(place)
    assert asked.calls == [
        (0, (0, 1, 2, 3, 8, 9, 10, 11)),
        (238, 2, [0b01], 65),
        (0, (4, 5, 6, 7, 12, 13, 14, 15)),
        (238, 2, [0b10], 65),
    ]


def test_memory_of_several_nodes_is_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = kernel(monkeypatch, "aarch64")
    assert bind(Binding(2, (0, 1), (1, 3)))
    assert bind(Binding(2, (0, 1), (64, 130)))
    assert asked.calls[1::2] == [(237, 3, [0b1010], 65), (237, 3, [0, 1, 4], 193)]


def test_a_system_that_binds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = kernel(monkeypatch, status=-1)
    assert not bind(Binding(1, (0,), (0,)))
    assert len(refused.calls) == 2
    for place in (Binding(1, (5,), (0,)), Binding(1, (5,), ())):
        asked = kernel(monkeypatch, "riscv64" if place.memory_nodes else "x86_64")
        assert not bind(place)
        assert asked.calls == [(0, (5,))]


def test_this_host_and_binding_to_it() -> None:
    """In a process of its own, which is bound from then on."""
    places = bindings(read_topology(), 1)
    assert set(places[0].processors) == os.sched_getaffinity(0)
    code = (
        "import os\n"
        "from moebius.parallel.topology import *\n"
        "place = bindings(read_topology(), 100)[0]\n"
        "bound = bind(place)\n"
        "assert os.sched_getaffinity(0) == set(place.processors), place\n"
        # To node 0 explicitly: every kernel with nodes has that one.
        "print(bound, bind(Binding(1, place.processors, (0,))))\n"
        "print(open('/proc/self/numa_maps').readline().split()[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    bound = done.stdout.split()
    if bound[1] == "True":
        assert bound[2] == "bind:0"
