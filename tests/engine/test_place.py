"""Which threads, cores and memory a rank takes, on hosts made of files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebius import machine
from moebius.engine.place import NodeMemory, Place, place, places, share_threads
from moebius.parallel import topology
from parallel.test_topology import Host


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sockets of four cores, with memory of their own."""
    made = Host(tmp_path)
    made.node(0, "0-3", 8, "10 20").node(1, "4-7", 8, "20 10").allow("0-7")
    monkeypatch.setattr(machine, "_allowed_processors", lambda: 8)
    return tmp_path


def test_ranks_share_a_hosts_threads_and_each_is_near_its_memory(host: Path) -> None:
    places = [place(rank, 2, root=host) for rank in range(2)]
    assert [(each.threads, each.at_once) for each in places] == [(4, 2)] * 2
    bound = [each.binding for each in places]
    assert [each and (each.processors, each.memory_nodes) for each in bound] == [
        ((0, 1, 2, 3), (0,)),
        ((4, 5, 6, 7), (1,)),
    ]


def test_what_memory_a_rank_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks on two sockets: the first has two."""
    monkeypatch.setattr(machine, "_allowed_processors", lambda: 6)
    made = Host(tmp_path).node(0, "0-3", 8, "10 20", 5).node(1, "4-5", 8, "20 10", 3)
    made.allow("0-5")
    easily_had = 3 * 1024
    first = NodeMemory((0,), 5 * 2**30 + easily_had, ranks=2, apart=True)
    second = NodeMemory((1,), 3 * 2**30 + easily_had, ranks=1, apart=True)
    found = places(3, root=tmp_path)
    assert [each.memory for each in found] == [first, first, second]
    assert [each.room for each in found] == [first.available // 2] * 2 + [second.available]


def test_ranks_of_one_node_are_not_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside memory without processors: they are bound to theirs. Without it nothing is bound."""
    monkeypatch.setattr(machine, "_allowed_processors", lambda: 4)
    made = Host(tmp_path).node(0, "0-3", 8, "10 40", 5).allow("0-3")
    assert [each.memory for each in places(2, root=tmp_path)] == [None, None]
    made.node(1, "", 64, "40 10", 60)
    memory = NodeMemory((0,), 5 * 2**30 + 3 * 1024, ranks=2, apart=False)
    assert [each.memory for each in places(2, root=tmp_path)] == [memory, memory]


def test_a_node_without_memory_shares_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_allowed_processors", lambda: 6)
    made = Host(tmp_path).node(0, "0-1", 8, "10 12 31", 4).node(1, "2-3", 0, "12 10 20")
    made.node(2, "4-5", 8, "31 20 10", 4).allow("0-5")
    found = [each.memory for each in places(3, root=tmp_path)]
    assert [each and (each.nodes, each.ranks) for each in found] == [
        ((0,), 2),
        ((0,), 2),
        ((2,), 1),
    ]


def test_memory_that_is_not_bound_is_said(
    host: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "moebius")
    for bound, lines in ((True, 0), (False, 1)):
        monkeypatch.setattr(topology, "bind", lambda binding, bound=bound: bound)
        place(1, 2, root=host).take()
        assert sum("does not let a rank choose" in text for text in caplog.messages) == lines


def test_more_ranks_than_threads_compute_with_one_each(host: Path) -> None:
    assert share_threads(None, 9, host) == 1
    assert share_threads(3, 9, host) == 3


def test_a_quota_counts(host: Path) -> None:
    Host(host).write("proc/self/cgroup", "0::/")
    Host(host).write("proc/self/mountinfo", "1 0 0:1 / /cg rw - cgroup2 none rw")
    Host(host).write("cg/cpu.max", "400000 100000")
    assert share_threads(None, 2, host) == 2


def test_who_is_alone_or_wants_more_than_its_share_is_not_bound(host: Path) -> None:
    assert place(0, 1, root=host) == Place(8, 1)
    assert place(1, 2, 5, root=host) == Place(5, 1)
    assert place(1, 2, 4, root=host).binding is not None


_SCRIPT = """
import os, threading
from moebius.engine.place import Place
from moebius.parallel.topology import Binding
Place(1, 1, Binding(1, (int(os.environ["CPU"]),), ())).take()
found = []
thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
thread.start(); thread.join()
print(*found[0])
Place(1, 1, Binding(1, (4095,), ())).take()
print("still here")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux binds processes")
def test_threads_that_come_after_it_are_bound_and_a_lost_processor_is_no_end() -> None:
    mine = str(max(os.sched_getaffinity(0)))
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, "CPU": mine},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split("\n")[:2] == [mine, "still here"]
    assert "bound to no processors" in run.stderr
