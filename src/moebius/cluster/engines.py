"""A front's engines: processes, with a client that outlives each of them."""

import os
import signal
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from moebius.cluster.launched import LaunchedEngine
from moebius.engine import wire
from moebius.engine.client import EngineClient, ExpertSpread
from moebius.engine.supervisor import EngineProcess, WatchedProcess
from moebius.errors import EngineError, MoebiusError
from moebius.front.assignment import Room
from moebius.front.fleet import Lost
from moebius.front.replay import ReplayClient
from moebius.parallel.key import ClusterKey

if TYPE_CHECKING:
    from moebius.cluster.group import RankGroup
    from moebius.cluster.hosts import Hosts

_CLOSE_SECONDS = 5.0


def _end_in_order() -> None:
    """As when the operator asks for it."""
    os.kill(os.getpid(), signal.SIGTERM)


class EngineProcesses:
    """`count` processes of this host, which import what takes seconds before they are told a model.

    with EngineProcesses(1) as processes:
        client = processes.launch(message, planned)
    """

    def __init__(
        self,
        count: int,
        on_give_up: Callable[[], None] = _end_in_order,
        key: ClusterKey | None = None,
    ) -> None:
        """on_give_up   called when engines were restarted too often for nothing; then every
                        request ends with the reason, and `check` raises it
        key             the cluster's, where some ranks are on other hosts
        """
        self._count = count
        self._on_give_up = on_give_up
        self._early: dict[int, EngineProcess] = {}
        self._processes: dict[int, WatchedProcess] = {}
        self._client: ReplayClient | None = None
        self._group: RankGroup | None = None
        self._reason: MoebiusError | None = None
        self._failure: MoebiusError | None = None
        self._closed = False
        try:
            for number in range(count):
                self._early[number] = EngineProcess(key)
        except BaseException:
            self.close()
            raise

    def launch(
        self,
        message: wire.Launch,
        planned: Callable[[wire.Planned], None] = lambda plan: None,
        hosts: "Hosts | None" = None,
    ) -> ReplayClient:
        """Load the model in each; `planned` hears of the first one's memory plan.

        hosts: where the ranks are; None: all on this one. Raises the error that loading ends with.
        """
        group = None
        if message.config.ranks > 1:
            # torch comes with it, which a front of one engine starts a second sooner without.
            from moebius.cluster.group import RankGroup

            group = RankGroup(message, hosts)
        self._group = group

        def start(number: int, lost: Lost) -> EngineClient:
            hears = planned if number == 0 and self._client is None else lambda plan: None
            try:
                process = self._process(number, group or hosts)
                if group is None:
                    told = message if hosts is None else hosts.launch(message, number, ())
                    return LaunchedEngine(told, lost, hears, process)
                return group.launch(number, lost, hears, process)
            except MoebiusError as error:
                first = self._none_at_all(error)
                if first is error:
                    raise
                raise first from error

        config = message.config
        room = Room(config.max_queue_requests, config.max_queue_tokens)
        self._client = ReplayClient(
            start,
            config.ranks,
            stepped=None if group is None else group.stepped,
            room=room,
            on_give_up=self._give_up,
        )
        return self._client

    def spread(self) -> ExpertSpread | None:
        """How ranks share the model's experts; None where one process has them all."""
        return None if self._group is None else self._group.spread()

    def _process(self, number: int, places: "RankGroup | Hosts | None") -> WatchedProcess:
        """The one that was started early, or a new one."""
        process: WatchedProcess | None = self._early.pop(number, None)
        if process is None:
            process = EngineProcess() if places is None else places.start(number)
        self._processes[number] = process
        if self._closed:
            process.kill()
            raise EngineError("the engines are closed")
        return process

    def _none_at_all(self, error: MoebiusError) -> MoebiusError:
        """An engine does not start. The first time all have to, so the others are ended, too.

        What came first is the error of all.
        """
        if self._client is not None:
            return error
        self._failure = self._failure or error
        for process in list(self._processes.values()):
            process.kill()
        return self._failure

    @property
    def processes(self) -> tuple[EngineProcess, ...]:
        """The ones of this host that serve, or will."""
        each = (self._processes.get(n, self._early.get(n)) for n in range(self._count))
        return tuple(process for process in each if isinstance(process, EngineProcess))

    def check(self) -> None:
        """Raises the reason why the engines were given up, where they were."""
        if self._reason is not None:
            raise self._reason

    def close(self) -> None:
        """Stop the engines and wait for the ends of their processes, loaded or not."""
        self._closed = True
        if self._group is not None:
            self._group.close()
        if self._client is not None:
            self._client.close(_CLOSE_SECONDS)
        for process in [*self._early.values(), *self._processes.values()]:
            process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _give_up(self, reason: MoebiusError) -> None:
        self._reason = reason
        self._on_give_up()
