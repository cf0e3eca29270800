"""LLM over ranks on two nodes of memory, on a host that is made of files: the same answers."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from moebius import LLM, SamplingParams
from parallel.test_topology import Host
from test_llm_ranks import SIZES, mapped, prompts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks need Linux")

ASK = [SamplingParams(max_tokens=6 + i, seed=i, temperature=i % 2, logprobs=2) for i in range(4)]

MADE_UP = """
from pathlib import Path
from moebius import machine
machine.ROOT = Path({!r})
for function in (machine.memory, machine.identity, machine.processors, machine.threads):
    function.__defaults__ = (machine.ROOT,)
"""


def make_host(root: Path, free: float) -> None:
    """Two nodes with half of this machine's processors each; with one, both have that."""
    usable = sorted(os.sched_getaffinity(0))
    middle = len(usable) // 2
    host = Host(root)
    host.node(0, ",".join(map(str, usable[:middle] or usable)), 8, "10 20", free)
    host.node(1, ",".join(map(str, usable[middle:])), 8, "20 10", free)
    host.allow(",".join(map(str, usable)))
    host.write("proc/meminfo", f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What engines that start now take for this machine: Python runs a sitecustomize first."""
    make_host(tmp_path, free=2)
    (tmp_path / "sitecustomize.py").write_text(MADE_UP.format(str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def binding(process: int, thread: int) -> tuple[set[int], str]:
    """A thread's processors and, where the kernel tells, how it takes memory: numa_maps(5)."""
    told = Path(f"/proc/{process}/task/{thread}/numa_maps")
    policy = told.read_text().split()[1] if told.exists() else ""
    return os.sched_getaffinity(thread), policy


@pytest.mark.parametrize("loss", [False, pytest.param(True, marks=pytest.mark.losses)])
def test_ranks_copy_their_weights_and_answer_alike(
    host: Path, tiny_model: Path, loss: bool
) -> None:
    """And again when one has died, whose successor copies anew."""
    with LLM(str(tiny_model), **SIZES) as one:
        expected = [each.outputs for each in one.generate(prompts(4), ASK)]
    with LLM(str(tiny_model), ranks=2, **SIZES) as two:
        assert [each.outputs for each in two.generate(prompts(4), ASK)] == expected
        first, second = (process.pid for process in two.processes)
        assert not mapped(first, tiny_model) and not mapped(second, tiny_model)
        # The engine's thread is the youngest; the system may not let memory be bound.
        youngest = max(int(each.name) for each in Path(f"/proc/{first}/task").iterdir())
        processors, policy = binding(first, first)
        assert len(processors) < len(os.sched_getaffinity(0)) or len(processors) == 1
        assert policy in ("bind:0", "default", "")
        assert binding(first, youngest) == (processors, policy)
        if loss:
            os.kill(second, signal.SIGKILL)
            assert [each.outputs for each in two.generate(prompts(4), ASK)] == expected
            assert second not in {process.pid for process in two.processes}
        assert not any(mapped(process.pid, tiny_model) for process in two.processes)
