"""An EngineClient whose every record goes through a frame, as between two processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moebius.engine import wire
from moebius.engine.client import (
    Deliver,
    EngineClient,
    EngineInfo,
    EngineStats,
    ExpertLoads,
    StepOutput,
)
from moebius.engine.faults import failed
from moebius.errors import MoebiusError
from moebius.request.engine_request import EngineRequest
from moebius.request.hashes import BlockHasher


def to_engine(message: wire.ToEngine) -> Any:
    return wire.decode_to_engine(wire.encode(message))


def from_engine(message: wire.FromEngine) -> Any:
    return wire.decode_from_engine(wire.encode(message))


class WireClient:
    """Around another client. `hasher`: the launch's, as the engine's process has it.

    frames counts what crossed.
    """

    def __init__(self, inner: EngineClient, hasher: BlockHasher | None = None) -> None:
        self.inner = inner
        self.frames = 0
        self._hasher = hasher
        self._deliver: Deliver = lambda outputs: None

    def __getattr__(self, name: str) -> Any:
        """What tests look at in the fake engine behind."""
        return getattr(self.inner, name)

    @property
    def info(self) -> EngineInfo:
        return from_engine(wire.Loaded(self.inner.info)).info

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self.inner.start(self._cross_back)

    def _cross_back(self, outputs: list[StepOutput]) -> None:
        self.frames += 1
        self._deliver(from_engine(wire.Outputs(outputs)).outputs)

    def submit(self, request: EngineRequest) -> None:
        self.frames += 1
        crossed = to_engine(wire.Submit(request)).request
        assert crossed == request and crossed is not request
        try:
            accepted = wire.received(crossed, self.inner.info.limits, self._hasher)
        except MoebiusError as error:
            self._cross_back([failed(request.id, error)])
        else:
            self.inner.submit(accepted)

    def abort(self, request_id: str) -> None:
        self.frames += 1
        self.inner.abort(to_engine(wire.Abort(request_id)).request_id)

    def advance(self, wanted: Callable[[], bool]) -> bool:
        return self.inner.advance(wanted)

    def stats(self) -> EngineStats:
        return from_engine(wire.Stats(self.inner.stats())).stats

    def expert_loads(self) -> ExpertLoads:
        return from_engine(wire.Loads(self.inner.expert_loads())).loads

    def close(self, timeout: float) -> None:
        self.inner.close(timeout)
