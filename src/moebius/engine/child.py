"""A process of this host that runs an engine."""

import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from moebius.errors import EngineError
from moebius.parallel.meet import Address, name_of

_GRACE_SECONDS = 2.0
_STOPPED_SECONDS = 0.5
_LOOK_SECONDS = 0.05


class ChildProcess:
    """`python -m moebius.engine.process ADDRESS ...`, from its start until it has been waited for.

    variables   of its environment, beside this process's own
    ended       called once, on a thread of its own, when it has ended

    Its log goes where this process's goes. Where it is stopped (SIGSTOP), and not continued within
    half a second, it is killed: nobody would hear of it for longer. Raises EngineError where none
    can be started.
    """

    def __init__(
        self,
        address: Address,
        *more: str,
        variables: Mapping[str, str],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.exited = threading.Event()
        self._arguments = (str(address) if isinstance(address, Path) else name_of(address), *more)
        self._variables = variables
        self._ended = ended
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self._was_stopped = False
        self._started = threading.Event()
        threading.Thread(target=self._watch, name="engine process", daemon=True).start()
        self._started.wait()
        if self._failure is not None:
            why = self._failure.strerror
            raise EngineError(f"no process for the engine can be started: {why}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """As subprocess has it: negative for a signal; None while it runs."""
        return self._process.returncode if self._process and self.exited.is_set() else None

    @property
    def state(self) -> str:
        """How it is, for a person."""
        status = self.exit_status
        if status is None:
            return "the engine's process runs"
        if status >= 0:
            return f"the engine's process ended with exit status {status}"
        if self._was_stopped:
            return "the engine's process was stopped, and not continued, so it was ended"
        hint = " (as the system does when memory runs out)" if status == -signal.SIGKILL else ""
        return f"the engine's process was ended by {_signal_name(-status)}{hint}"

    def kill(self) -> None:
        """End it now, stopped or stuck as it may be."""
        assert self._process is not None
        if not self.exited.is_set():
            self._process.kill()

    def wait(self, timeout: float = _GRACE_SECONDS) -> bool:
        """Whether it has ended within `timeout` seconds."""
        return self.exited.wait(timeout)

    def _watch(self) -> None:
        """Start it and wait for its end.

        On one thread, which lives as long as it does: Linux ends it with the thread that started
        it. Signals that are sent to the whole group must not end it, even before it can say so.
        """
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _program(), *self._arguments],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self._variables},
            )
        except OSError as error:
            self._failure = error
            return
        finally:
            self._started.set()
        if hasattr(os, "waitid"):
            self._was_stopped = _ends_stopped(self._process.pid)
            if self._was_stopped:
                self._process.kill()
        self._process.wait()
        self.exited.set()
        self._ended()


def _ends_stopped(pid: int) -> bool:
    """Wait until a child has ended, or is stopped for good: whether it is stopped."""
    try:
        while True:
            # The end stays to be waited for, as subprocess does; that it was stopped is taken.
            change = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
            if change is None or change.si_code != os.CLD_STOPPED:
                return False
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
            if _stays_stopped(pid):
                return True
    except ChildProcessError:  # it has ended, and whoever killed it has waited for it
        return False


def _stays_stopped(pid: int) -> bool:
    """Whether a child that was stopped is neither continued nor ended for `_STOPPED_SECONDS`.

    This process has to run in that time, too: Ctrl-Z stops both, and `fg` continues both.
    """
    changes = os.WEXITED | os.WCONTINUED | os.WNOWAIT | os.WNOHANG
    while True:
        began = time.monotonic()
        while (waited := time.monotonic() - began) < _STOPPED_SECONDS:
            time.sleep(_LOOK_SECONDS)
            if os.waitid(os.P_PID, pid, changes) is not None:
                return False
        if waited < 2 * _STOPPED_SECONDS:
            return True


def _signal_name(number: int) -> str:
    """Python has names for some of them only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _program() -> str:
    """Runs `moebius.engine.process` of this very package, where that is not installed too."""
    root = str(Path(__file__).parents[2])
    installed = root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    lines = [
        "import runpy, sys",
        "" if installed else f"sys.path.insert(0, {root!r})",
        "runpy.run_module('moebius.engine.process', run_name='__main__', alter_sys=True)",
    ]
    return "\n".join(lines)
