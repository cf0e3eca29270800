"""Engine processes: started, waited for, killed."""

import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar, Self

from moebius.engine import wire
from moebius.engine.child import ChildProcess
from moebius.engine.remote import RemoteClient, launch
from moebius.errors import ChannelError, DeadlineError, EngineError
from moebius.parallel.channel import Channel
from moebius.parallel.key import VARIABLE, ClusterKey
from moebius.parallel.meet import Listener

CONNECT_SECONDS = 60.0
_STOP_SECONDS = 5.0
_GRACE_SECONDS = 2.0
_POLL_SECONDS = 0.2


class WatchedProcess(ABC):
    """One process with one engine, wherever it runs, until it has been waited for.

    Whatever ends it, `client`'s unfinished requests end; when the connection to it is over, it is
    killed where it does not end by itself.

    far    it is on another host
    died   called once, after the last output of its engine, when it has ended and nobody wanted
           that; not where it ends while it loads, which `launch` says
    rows   what a rank exchanges with the others of its group; known once it is loaded
    """

    far: ClassVar[bool] = False

    def __init__(self) -> None:
        self.died: Callable[[WatchedProcess], None] = lambda process: None
        self.rows: wire.Rows | None = None
        self._client: RemoteClient | None = None
        self._wanted = False

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
            self._wait(_GRACE_SECONDS)
            raise EngineError(f"{self.state} before the model was loaded") from error
        self.rows = loaded.rows
        self._client = RemoteClient(channel, loaded.info, ended=self._hung_up, far=self.far)
        return self._client

    @property
    def client(self) -> RemoteClient:
        """The client that `launch` gave."""
        assert self._client is not None, "nothing has been launched"
        return self._client

    @property
    @abstractmethod
    def state(self) -> str:
        """How it is, for a person."""

    def kill(self) -> None:
        """End it now, stopped or stuck as it may be, and wait for that. `died` is not called."""
        self._wanted = True
        self._kill()

    @abstractmethod
    def end(self) -> None:
        """Kill it, stopped or stuck as it may be, as one that is lost: `died` is called."""

    def close(self, timeout: float = _STOP_SECONDS) -> None:
        """Have it stop in order, and kill it where that takes longer than `timeout` seconds."""
        self._wanted = True
        if self._client is not None and not self._wait(0.0):
            self._client.close(timeout)
            self._wait(_GRACE_SECONDS)
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

    @abstractmethod
    def _connected(self) -> Channel:
        """The channel that the process opens as the first thing that it does. ChannelError where it
        ends before, EngineError where it does not come."""

    @abstractmethod
    def _wait(self, timeout: float) -> bool:
        """Whether it has ended within `timeout` seconds."""

    @abstractmethod
    def _kill(self) -> None:
        """End it, wait for that, and forget what it was to connect to."""

    def _hung_up(self, cause: EngineError) -> None:
        """Nothing more comes from it."""
        if not self._wait(_GRACE_SECONDS):
            self._kill()
        if not self._wanted:
            self.died(self)


class EngineProcess(WatchedProcess):
    """A process of this host.

        with EngineProcess() as process:
            client = process.launch(message, planned)

    It is started at once, and imports what takes seconds while there is no launch message yet.

    key   the cluster's, for ranks that connect to those of other hosts
    """

    def __init__(self, key: ClusterKey | None = None) -> None:
        super().__init__()
        self._listener, variables = _private_listener(key)
        try:
            self._child = ChildProcess(self._listener.address, variables=variables)
        except BaseException:
            self._listener.close()
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def exit_status(self) -> int | None:
        """As subprocess has it: negative for a signal; None while it runs."""
        return self._child.exit_status

    @property
    def state(self) -> str:
        return self._child.state

    def end(self) -> None:
        self._child.kill()

    def _connected(self) -> Channel:
        deadline = time.monotonic() + CONNECT_SECONDS
        try:
            while time.monotonic() < deadline:
                if self._wait(0.0):
                    raise ChannelError("it ended before it connected")
                try:
                    return self._listener.accept(_POLL_SECONDS)
                except DeadlineError:
                    continue
            raise EngineError(f"the engine's process did not connect within {CONNECT_SECONDS} s")
        finally:
            self._listener.close()

    def _wait(self, timeout: float) -> bool:
        return self._child.wait(timeout)

    def _kill(self) -> None:
        self._child.kill()
        self._child.wait()
        self._listener.close()


def _private_listener(key: ClusterKey | None) -> tuple[Listener, dict[str, str]]:
    """Where a process of this host connects to, and what its environment holds for that."""
    if hasattr(socket, "AF_UNIX"):
        return Listener.unix(), {} if key is None else {VARIABLE: key.text}
    key = key or ClusterKey.draw()
    return Listener.tcp("127.0.0.1", 0, key), {VARIABLE: key.text}
