"""An engine's process as ReplayClient wants it: watched, and its loss told once."""

import threading
from collections.abc import Callable

from moebius.engine import wire
from moebius.engine.client import Deliver, EngineInfo, EngineStats, ExpertLoads
from moebius.engine.remote import RemoteClient
from moebius.engine.supervisor import EngineProcess, WatchedProcess
from moebius.errors import EngineError
from moebius.front.fleet import Lost
from moebius.request.engine_request import EngineRequest

_LOOK_SECONDS = 0.25
# An engine is not ready while it is silent, or a step takes longer than it may; neither passes.
_PATIENCE_SECONDS = 0.5


class LaunchedEngine:
    """Has a process load `message`. Raises the error that this ends with.

    process   one that was started before; None: starts one
    planned   hears of the memory plan, before the weights are read
    lost      is called, once and after the last output, when the engine cannot go on: its process
              has ended, or was stuck and has been killed
    """

    def __init__(
        self,
        message: wire.Launch,
        lost: Lost,
        planned: Callable[[wire.Planned], None] = lambda plan: None,
        process: WatchedProcess | None = None,
    ) -> None:
        self._lost = lost
        self._why: EngineError | None = None
        self._done = threading.Event()
        self._process: WatchedProcess = process or EngineProcess()
        self._process.died = self._died
        try:
            self.remote: RemoteClient = self._process.launch(message, planned)
        except BaseException:
            self._process.kill()
            raise
        self.rows = self._process.rows

    @property
    def info(self) -> EngineInfo:
        return self.remote.info

    def start(self, deliver: Deliver) -> None:
        self.remote.start(deliver)
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def submit(self, request: EngineRequest) -> None:
        self.remote.submit(request)

    def abort(self, request_id: str) -> None:
        self.remote.abort(request_id)

    def advance(self, wanted: Callable[[], bool]) -> bool:
        return self.remote.advance(wanted)

    def stats(self) -> EngineStats:
        return self.remote.stats()

    def expert_loads(self) -> ExpertLoads:
        return self.remote.expert_loads()

    def close(self, timeout: float) -> None:
        self._done.set()
        self._process.close(timeout)

    def end(self, why: EngineError) -> None:
        """Kill it, as one that is lost because of this."""
        self._why = why
        self._process.end()

    def _trouble(self) -> str | None:
        """What it does not do that it must, if that goes on; None where it is well."""
        if self.remote.stats().ready:
            return None
        return (
            f"nothing was heard of it for {self.remote.silent_for:.1f} s, or a step took longer "
            "than --step-deadline"
        )

    def _watch(self) -> None:
        """Kill it where it is stuck."""
        misses = 0.0
        while not self._done.wait(_LOOK_SECONDS):
            trouble = self._trouble()
            misses = 0.0 if trouble is None else misses + _LOOK_SECONDS
            if misses >= _PATIENCE_SECONDS:
                self.end(EngineError(f"it was stuck and is ended: {trouble}"))
                return

    def _died(self, process: WatchedProcess) -> None:
        self._done.set()
        self._lost(self._why or EngineError(process.state))
