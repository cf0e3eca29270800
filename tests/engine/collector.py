"""Where a client's outputs go in tests."""

from __future__ import annotations

import threading
from collections.abc import Callable

from moebius.engine.client import StepOutput


class Collector:
    """Outputs by request, in the order they came."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[StepOutput]] = {}
        self.changed = threading.Condition()

    def __call__(self, outputs: list[StepOutput]) -> None:
        with self.changed:
            for output in outputs:
                self.outputs.setdefault(output.request_id, []).append(output)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool], timeout: float = 20) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout)

    def ended(self, id: str) -> bool:
        return bool(self.outputs.get(id)) and self.outputs[id][-1].finish_reason is not None
