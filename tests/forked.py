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
from typing import Any

IMPORTED = (
    "torch",
    "torch.distributed",
    "moebius.engine.load",
    "moebius.engine.in_process",
    "moebius.engine.member",
    "moebius.engine.rank",
    "moebius.server.app",
    "moebius.server.run",
)
READ_AT_START = ("PYTHON", "LD_", "MALLOC_", "GLIBC_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_")
"""Variables that an interpreter or a library reads once, as it is loaded."""

_PYTHON = sys.executable
_PR_SET_CHILD_SUBREAPER = 36
_FRAME = 1 << 20


class Forked(subprocess.Popen[Any]):
    """A process that `parent` forks. It takes as much of what a Popen takes as tests make use of."""

    def __init__(self, parent: Parent, command: Sequence[str], **options: Any) -> None:
        self._parent = parent
        super().__init__(command, **options)

    def _execute_child(self, args: Any, *more: Any) -> None:
        """In the place of what forks this process and calls exec."""
        cwd, env = more[4:6]
        pipes = more[9:15]
        inherited = zip(pipes[0::2], pipes[1::2], strict=True)
        (stdin, _), (_, stdout), (_, stderr) = inherited
        streams = [
            number if file == -1 else file for number, file in enumerate((stdin, stdout, stderr))
        ]
        self.pid = self._parent.fork(args, streams, env, cwd or os.getcwd())
        self._child_created = True
        self._close_pipe_fds(*pipes)


class Parent:
    """The process that forks them, where Linux lets it; begun when it is first asked to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._environment: dict[str, str] = {}

    def popen(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """As subprocess.Popen, for `python -P -c CODE ...`; another command is started as ever."""
        if list(command[:3]) != [_PYTHON, "-P", "-c"] or not self._suits(env or os.environ):
            return subprocess.Popen(command, env=env, **options)
        return Forked(self, command, env=env, **options)

    def fork(
        self,
        command: Sequence[str],
        streams: Sequence[int],
        env: Mapping[str, str] | None,
        directory: str,
    ) -> int:
        """A process's id. Its parent has ended by then, and it is this process that adopts it."""
        asked = {
            "arguments": list(command[3:]),
            "environment": dict(os.environ if env is None else env),
            "directory": directory,
            "blocked": [int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        }
        with self._lock:
            if self._socket is None:
                self._begin()
            assert self._socket is not None
            _adopt(True)
            try:
                socket.send_fds(self._socket, [json.dumps(asked).encode()], streams)
                return int(self._socket.recv(_FRAME))
            finally:
                _adopt(False)

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


PARENT = Parent()
"""That of all tests of a session; ended with it."""


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
        frame, streams, _, _ = socket.recv_fds(asking, _FRAME, 3)
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
    for number, file in enumerate(streams):
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
