"""A process that runs an engine, from its start to its end, whatever ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from moebius.engine.child import ChildProcess


def test_a_child_is_reaped_and_told_of() -> None:
    told = threading.Event()
    child = ChildProcess(("127.0.0.1", 1), "ticket", variables={}, ended=told.set)
    child.kill()
    assert told.wait(20) and child.exit_status == -9
    assert child.state == (
        "the engine's process was ended by SIGKILL (as the system does when memory runs out)"
    )


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
