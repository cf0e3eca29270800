"""A forked process is one like any other to whoever has asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from forked import PARENT, Forked, Parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a process adopts those of another")

TELL = """
import os, signal, sys
blocked = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
seen = sys.argv, os.environ["TOLD"], os.getcwd(), os.getppid(), blocked, __name__
files = sorted(os.listdir("/proc/self/fd"), key=int)
print(seen, files[:3], "torch" in sys.modules, file=open(sys.argv[1], "w"))
print("out")
print("err", file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def parent() -> Parent:
    return PARENT


def begun(parent: Parent, code: str, *arguments: str, **variables: str) -> Forked:
    command = [sys.executable, "-P", "-c", code, *arguments]
    made = parent.popen(command, stdin=subprocess.DEVNULL, env=os.environ | variables)
    assert isinstance(made, Forked)
    return made


def test_it_has_what_its_parent_gives_it_and_no_more(
    parent: Parent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    try:
        process = begun(parent, TELL, "told", TOLD="yes")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert process.wait() == 7 == process.returncode
    blocked = sorted({*map(int, before), int(signal.SIGUSR1)})
    seen = (["-c", "told"], "yes", str(tmp_path), os.getpid(), blocked, "__main__")
    assert (tmp_path / "told").read_text() == f"{seen} {['0', '1', '2']} True\n"
    assert capfd.readouterr() == ("out\n", "err\n")


def test_it_ends_by_a_signal_and_is_gone(parent: Parent) -> None:
    killed = begun(parent, "import time; time.sleep(60)")
    assert (os.getpgid(killed.pid), os.getsid(killed.pid)) == (os.getpgid(0), os.getsid(0))
    ended = threading.Thread(target=killed.wait)
    ended.start()
    killed.kill()
    ended.join(20)
    assert killed.returncode == -signal.SIGKILL and not Path(f"/proc/{killed.pid}").exists()
    killed.kill()  # of which nothing is left, and nobody else is hit


def test_what_an_interpreter_reads_at_its_start_it_reads_itself(parent: Parent) -> None:
    code = "import os, sys; sys.exit(os.environ['PYTHONHASHSEED'] == '5' and 'torch' not in sys.modules)"
    command = [sys.executable, "-P", "-c", code]
    made = parent.popen(command, stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONHASHSEED": "5"})
    assert not isinstance(made, Forked) and made.wait(60) == 1


def test_another_program_is_started_as_ever(parent: Parent) -> None:
    made = parent.popen(["/bin/true"], stdin=subprocess.DEVNULL, env=os.environ)
    assert not isinstance(made, Forked) and made.wait(60) == 0


def test_its_pipes_are_read_and_written(parent: Parent) -> None:
    code = "import sys; print(sys.stdin.read().upper()); print('err', file=sys.stderr)"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with parent.popen([sys.executable, "-P", "-c", code], text=True, **pipes) as process:
        assert process.communicate("said", timeout=60) == ("SAID\n", "err\n")
    assert process.returncode == 0


def test_nobody_else_is_adopted(parent: Parent) -> None:
    """An orphan of another process does not become a child of this one."""
    begun(parent, "pass").wait()
    code = (
        "import os, time\nif os.fork() == 0:\n    time.sleep(0.3)\n"
        "    print(os.getppid(), flush=True)\n    os._exit(0)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) != os.getpid()
