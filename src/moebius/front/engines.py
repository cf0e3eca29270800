"""A front's engines: processes, with a client that outlives each of them."""

import os
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self

from moebius.engine import wire
from moebius.engine.client import EngineClient
from moebius.engine.supervisor import EngineProcess
from moebius.errors import MoebiusError
from moebius.front.group import RankGroup
from moebius.front.hosts import Hosts
from moebius.front.launched import LaunchedEngine
from moebius.front.replay import Lost, ReplayClient

_CLOSE_SECONDS = 5.0


class EngineProcesses:
    """`count` processes of this host, which import what takes seconds before they are told a model.

    with EngineProcesses(1) as processes:
        client = processes.launch(message, planned)
    """

    def __init__(self, count: int) -> None:
        self._early: dict[int, EngineProcess] = {number: EngineProcess() for number in range(count)}
        self._client: ReplayClient | None = None
        self._reason: MoebiusError | None = None

    def launch(
        self,
        message: wire.Launch,
        planned: Callable[[wire.Planned], None] = lambda plan: None,
        hosts: Hosts | None = None,
    ) -> ReplayClient:
        """Load the model in each; `planned` hears of the first one's memory plan.

        hosts: where the ranks are; None: all on this one. Raises the error that loading ends with.
        """
        group = RankGroup(message, hosts) if message.config.ranks > 1 else None

        def start(number: int, lost: Lost) -> EngineClient:
            process = self._early.pop(number, None)
            hears = planned if process is not None and number == 0 else lambda plan: None
            if group is None:
                return LaunchedEngine(message, lost, hears, process)
            return group.launch(number, lost, hears, process)

        self._client = ReplayClient(start, message.config.ranks, on_give_up=self._give_up)
        return self._client

    def check(self) -> None:
        """Raises the reason why the engines were given up, where they were."""
        if self._reason is not None:
            raise self._reason

    def close(self) -> None:
        for process in self._early.values():
            process.kill()
        if self._client is not None:
            self._client.close(_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _give_up(self, reason: MoebiusError) -> None:
        """Nothing can be served any more: end as when the operator asks for it, but say why."""
        self._reason = reason
        os.kill(os.getpid(), signal.SIGTERM)
