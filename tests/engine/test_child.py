"""A process that runs an engine, from its start to its end, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moebius.engine import child as child_module
from moebius.engine.child import ChildProcess

pytestmark = pytest.mark.usefixtures("real_processes")


def test_a_child_is_reaped_and_told_of() -> None:
    told = threading.Event()
    child = ChildProcess(("127.0.0.1", 1), "ticket", variables={}, ended=told.set)
    child.kill()
    assert told.wait(20) and child.exit_status == -9
    assert child.state == (
        "the engine's process was ended by SIGKILL (as the system does when memory runs out)"
    )


def state_of(pid: int) -> str:
    """As proc(5) has it: T is stopped; nothing once it is reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> ChildProcess:
    """One that imports nothing, and has nobody to connect to."""
    monkeypatch.setattr(child_module, "_program", lambda: "import time; time.sleep(60)")
    return ChildProcess(("127.0.0.1", 1), "ticket", variables={})


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="nobody is told of stopped processes here")
def test_one_that_is_stopped_is_ended(waiting: ChildProcess) -> None:
    os.kill(waiting.pid, signal.SIGSTOP)
    assert waiting.wait(20) and waiting.exit_status == -9
    assert waiting.state == "the engine's process was stopped, and not continued, so it was ended"


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="nobody is told of stopped processes here")
def test_one_that_is_stopped_may_be_killed_meanwhile(waiting: ChildProcess) -> None:
    """Whoever kills it may wait for it, too, before it is looked at again."""
    os.kill(waiting.pid, signal.SIGSTOP)
    wait_for(lambda: state_of(waiting.pid) == "T", 5)
    time.sleep(0.1)
    waiting.kill()
    wait_for(lambda: state_of(waiting.pid) in ("Z", ""), 5)
    waiting.kill()
    assert waiting.wait(20) and "SIGKILL" in waiting.state


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="nobody is told of stopped processes here")
def test_one_that_is_continued_lives(waiting: ChildProcess) -> None:
    for _ in range(2):
        os.kill(waiting.pid, signal.SIGSTOP)
        wait_for(lambda: state_of(waiting.pid) == "T", 5)
        time.sleep(0.1)
        os.kill(waiting.pid, signal.SIGCONT)
        assert not waiting.wait(3 * child_module._STOPPED_SECONDS)
    waiting.kill()
    assert waiting.wait(20) and "SIGKILL" in waiting.state


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="nobody is told of stopped processes here")
def test_both_may_be_stopped_and_continued() -> None:
    """Ctrl-Z and `fg`: a process whose child is stopped with it for longer than a child may be."""
    code = """if True:
        import sys, time
        from moebius.engine import child
        child._program = lambda: "import time; time.sleep(60)"
        process = child.ChildProcess(("127.0.0.1", 1), "ticket", variables={})
        print(process.pid, flush=True)
        sys.stdin.read()
        print(process.exit_status, process.kill(), flush=True)
    """
    front = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert front.stdout is not None
    pid = int(front.stdout.readline())
    for _ in range(3):
        os.killpg(front.pid, signal.SIGSTOP)
        wait_for(lambda: state_of(pid) == state_of(front.pid) == "T", 5)
        time.sleep(2 * child_module._STOPPED_SECONDS)
        os.killpg(front.pid, signal.SIGCONT)
        time.sleep(2 * child_module._STOPPED_SECONDS)
        assert state_of(pid) == "S"
    assert front.communicate(timeout=60)[0] == b"None None\n"


@pytest.mark.skipif(sys.platform != "linux", reason="real-time signals are numbered as Linux does")
def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    child = ChildProcess(("127.0.0.1", 1), "ticket", variables={})
    os.kill(child.pid, signal.SIGRTMIN + 6)
    assert child.wait(20)
    assert child.state == f"the engine's process was ended by signal {signal.SIGRTMIN + 6}"


def test_one_whose_front_is_gone_before_it_connects_says_so_in_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And takes the directory of the socket with it."""
    directory = tmp_path / "moebius-x"
    directory.mkdir()
    child = ChildProcess(directory / "engine", variables={})
    assert child.wait(60) and child.exit_status == 1
    said = capfd.readouterr().err
    assert "cannot connect to the socket" in said and len(said.splitlines()) == 1
    assert not directory.exists()
