"""Outputs on their way to a client: in the order they were put, on one thread at a time."""

import threading
from collections.abc import Callable
from contextlib import suppress

from moebius.engine.client import Deliver, StepOutput


class Outbox:
    """What several threads have to say to one reader.

    `put` may be called under a lock and calls nobody. `flush` calls the reader, so that no lock may
    be held that the reader could need.

    undelivered   called with outputs that the reader raised over, and with what it raised; gives
                  what to tell it in their place
    """

    def __init__(
        self, undelivered: Callable[[list[StepOutput], Exception], list[StepOutput]]
    ) -> None:
        self._undelivered = undelivered
        self._deliver: Deliver | None = None
        self._outputs: list[StepOutput] = []
        self._delivering = False
        self._changed = threading.Condition()

    def open(self, deliver: Deliver) -> None:
        """There is a reader from now on."""
        with self._changed:
            self._deliver = deliver

    def put(self, outputs: list[StepOutput]) -> None:
        """These come next."""
        with self._changed:
            self._outputs += outputs

    def flush(self) -> None:
        """Deliver what was put, unless another thread is at it: then that one does."""
        while True:
            with self._changed:
                if self._delivering or not self._outputs or self._deliver is None:
                    return
                outputs = self._outputs
                self._outputs = []
                self._delivering = True
                deliver = self._deliver
            try:
                deliver(outputs)
            except Exception as error:
                for last in self._undelivered(outputs, error):
                    with suppress(Exception):  # the log has the first of them
                        deliver([last])
            finally:
                with self._changed:
                    self._delivering = False
                    self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Until another thread has delivered what it was at, for so long at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._delivering, seconds)
