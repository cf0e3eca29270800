"""Engine processes: started, waited for, killed."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from moebius.engine import wire
from moebius.engine.remote import RemoteClient, launch
from moebius.errors import ChannelError, DeadlineError, EngineError
from moebius.parallel.channel import Channel
from moebius.parallel.key import VARIABLE, ClusterKey
from moebius.parallel.meet import Listener

_CONNECT_SECONDS = 60.0
_STOP_SECONDS = 5.0
_GRACE_SECONDS = 2.0
_POLL_SECONDS = 0.2


class EngineProcess:
    """One process with one engine, from its start until it has been waited for.

        with EngineProcess() as process:
            client = process.launch(message, planned)

    It is started at once, and imports what takes seconds while there is no launch message yet. Its
    log goes where this process's goes. Whatever ends it, `client`'s unfinished requests end, and it
    is reaped; when the connection to it is over, it is killed where it does not end by itself.

    died   called once, after the last output of its engine, when it has ended and nobody wanted
           that; not where it ends while it loads, which `launch` says
    """

    def __init__(self) -> None:
        self.died: Callable[[EngineProcess], None] = lambda process: None
        self.rows: wire.Rows | None = None
        """What a rank exchanges with the others of its group; known once it is loaded."""
        self._listener, self._variables = _private_listener()
        self._client: RemoteClient | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self._wanted = False
        self._started = threading.Event()
        self._exited = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine process", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._listener.close()
            why = self._failure.strerror
            raise EngineError(f"no process for the engine can be started: {why}")

    def launch(
        self, message: wire.Launch, planned: Callable[[wire.Planned], None] = lambda plan: None
    ) -> RemoteClient:
        """Load a model, once in its life; `planned` hears of the memory plan before that takes
        time. Raises the error that it fails with, or EngineError saying how the process ended."""
        assert self._client is None, "an engine's process loads one model"
        try:
            channel = self._connected()
            try:
                loaded = launch(channel, message, planned)
            except BaseException:
                channel.close()
                raise
        except ChannelError as error:
            self._exited.wait(_GRACE_SECONDS)
            raise EngineError(f"{self.state} before the model was loaded") from error
        self.rows = loaded.rows
        self._client = RemoteClient(channel, loaded.info, ended=self._hung_up)
        return self._client

    @property
    def client(self) -> RemoteClient:
        """The client that `launch` gave."""
        assert self._client is not None, "nothing has been launched"
        return self._client

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """As subprocess has it: negative for a signal; None while it runs."""
        return self._process.returncode if self._process and self._exited.is_set() else None

    @property
    def state(self) -> str:
        """How it is, for a person."""
        status = self.exit_status
        if status is None:
            return "the engine's process runs"
        if status >= 0:
            return f"the engine's process ended with exit status {status}"
        hint = " (as the system does when memory runs out)" if status == -signal.SIGKILL else ""
        return f"the engine's process was ended by {signal.Signals(-status).name}{hint}"

    def kill(self) -> None:
        """End it now, stopped or stuck as it may be, and wait for that. `died` is not called."""
        self._wanted = True
        self._kill()

    def close(self, timeout: float = _STOP_SECONDS) -> None:
        """Have it stop in order, and kill it where that takes longer than `timeout` seconds."""
        self._wanted = True
        if self._client is not None and not self._exited.is_set():
            self._client.close(timeout)
            self._exited.wait(_GRACE_SECONDS)
        self._kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _connected(self) -> Channel:
        """The channel that the process opens as the first thing that it does."""
        deadline = time.monotonic() + _CONNECT_SECONDS
        try:
            while time.monotonic() < deadline:
                if self._exited.is_set():
                    raise ChannelError("it ended before it connected")
                try:
                    return self._listener.accept(_POLL_SECONDS)
                except DeadlineError:
                    continue
            raise EngineError(f"the engine's process did not connect within {_CONNECT_SECONDS} s")
        finally:
            self._listener.close()

    def _watch(self) -> None:
        """Start it and wait for its end.

        On one thread, which lives as long as it does: Linux ends it with the thread that started
        it. Signals that are sent to the whole group must not end it, even before it can say so.
        """
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        address = self._listener.address
        name = str(address) if isinstance(address, Path) else f"{address[0]}:{address[1]}"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "moebius.engine.process", name],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_own_path(), **self._variables},
            )
        except OSError as error:
            self._failure = error
            return
        finally:
            self._started.set()
        self._process.wait()
        self._exited.set()

    def _hung_up(self, cause: EngineError) -> None:
        """Nothing more comes from it."""
        if not self._exited.wait(_GRACE_SECONDS):
            self._kill()
        if not self._wanted:
            self.died(self)

    def end(self) -> None:
        """Kill it, stopped or stuck as it may be, as one that is lost: `died` is called."""
        assert self._process is not None
        self._process.kill()

    def _kill(self) -> None:
        assert self._process is not None
        if not self._exited.is_set():
            self._process.kill()
            self._exited.wait(_GRACE_SECONDS)
        self._listener.close()


def _private_listener() -> tuple[Listener, dict[str, str]]:
    """Where a process of this host connects to, and what its environment needs for that."""
    if hasattr(socket, "AF_UNIX"):
        return Listener.unix(), {}
    key = ClusterKey.draw()
    return Listener.tcp("127.0.0.1", 0, key), {VARIABLE: key.text}


def _own_path() -> dict[str, str]:
    """The variable by which Python finds this very package, where that is not installed."""
    root = str(Path(__file__).parents[2])
    if root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return {}
    others = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": root if not others else os.pathsep.join([root, others])}
