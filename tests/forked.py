"""Processes of Python that are forked from one that has imported torch already.

To import it takes two seconds of processor time, most of what a small engine's process takes. Here
one process, begun when the first is asked for, has imported what engines need, and forks each of
them as it is asked to. What is forked becomes a child of the process that asked, with its
environment, its blocked signals and its three streams; it runs the code that `python -c` would run.
So whoever waits for it, signals it, or ends with it, finds a process like any other.

What a process imports, and how it is started, is shown by those that are not forked: see
`real_processes` in conftest.py.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

IMPORTED = (
    "torch",
    "torch.distributed",
    "moebius.engine.load",
    "moebius.engine.in_process",
    "moebius.engine.member",
    "moebius.engine.rank",
)
READ_AT_START = ("PYTHON", "LD_", "MALLOC_", "GLIBC_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_")
"""Variables that an interpreter or a library reads once, as it is loaded."""

_PYTHON = sys.executable
_PR_SET_CHILD_SUBREAPER = 36
_FRAME = 1 << 20


class Forked:
    """A process, with as much of subprocess.Popen as those have need of who start engines."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def kill(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        with self._lock:
            if self.returncode is None:
                try:
                    self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                except ChildProcessError:  # somebody else has waited for it
                    self.returncode = 0
        return self.returncode


class Parent:
    """The process that forks them, where Linux lets it: `start` begins it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._environment: dict[str, str] = {}

    def popen(
        self, command: Sequence[str], *, stdin: int, env: Mapping[str, str]
    ) -> Forked | subprocess.Popen[bytes]:
        """As subprocess.Popen, for `python -P -c CODE ...`; another command is started as ever."""
        if list(command[:3]) != [_PYTHON, "-P", "-c"] or not self._suits(env):
            return subprocess.Popen(command, stdin=stdin, env=env)
        assert stdin == subprocess.DEVNULL
        asked = {
            "arguments": list(command[3:]),
            "environment": dict(env),
            "directory": os.getcwd(),
            "blocked": [int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        }
        with self._lock:
            return Forked(self._fork(asked))

    def close(self) -> None:
        """It ends with its socket. What it has forked goes on."""
        if self._socket is not None:
            self._socket.close()
            self._process.wait()
            self._socket = None

    def _suits(self, env: Mapping[str, str]) -> bool:
        """Whether the process, which has this one's variables, may stand for one that has these."""
        if sys.platform != "linux":
            return False
        before = self._environment or os.environ
        names = {name for name in {*before, *env} if name.startswith(READ_AT_START)}
        return all(before.get(name) == env.get(name) for name in names)

    def _fork(self, asked: dict[str, Any]) -> int:
        """A process's id. Its parent has ended by then, and it is this process that adopts it."""
        if self._socket is None:
            self._begin()
        assert self._socket is not None
        _adopt(True)
        try:
            socket.send_fds(self._socket, [json.dumps(asked).encode()], [1, 2])
            return int(self._socket.recv(_FRAME))
        finally:
            _adopt(False)

    def _begin(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._environment = dict(os.environ)
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )


def _adopt(wanted: bool) -> None:
    """Whether orphans below this process become its children."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError("the system does not let this process adopt others")


def _serve(asking: socket.socket) -> None:
    """In the process that forks: until nobody can ask any more."""
    for name in IMPORTED:
        __import__(name)
    gc.collect()
    gc.freeze()
    while True:
        frame, streams, _, _ = socket.recv_fds(asking, _FRAME, 2)
        if not frame:
            return
        read, write = os.pipe()
        between = _fork()
        if between == 0:
            parent = os.getpid()
            child = _fork()
            if child == 0:
                asking.detach()
                _become(json.loads(frame), streams, parent)
                return
            os.write(write, str(child).encode())
            os._exit(0)
        os.waitpid(between, 0)
        asking.send(os.read(read, 100))
        for file in (read, write, *streams):
            os.close(file)


def _fork() -> int:
    with warnings.catch_warnings():  # NumPy has threads, which see to forks themselves
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become(asked: dict[str, Any], streams: Sequence[int], between: int) -> None:
    """The process that was asked for, from its first line to the end of its code.

    It begins when it is adopted: it may want to end with its parent.
    """
    while os.getppid() == between:
        time.sleep(0.0005)
    for number, file in enumerate(streams, 1):
        os.dup2(file, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["directory"])
    signal.pthread_sigmask(signal.SIG_SETMASK, asked["blocked"])
    code, *arguments = asked["arguments"]
    sys.argv = ["-c", *arguments]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(code, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
