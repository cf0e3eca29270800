"""Ctrl-C at the wrong moment would leave an engine's books half written."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

# Those whose handlers programs let raise: Ctrl-C (KeyboardInterrupt), an orderly end, and a time
# limit.
_SIGNALS = [
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)
]


class Uninterrupted:
    """Within it the program's own handlers of these signals wait; on the way out those that were
    called for run.

    Python runs handlers on its main thread only, so on any other nothing is to be done. Within
    another one the outer has them already, and nothing is changed: a call of many steps enters one
    around all, and asks it after each.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._noted: dict[int, FrameType | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler) and not isinstance(
                    getattr(handler, "__self__", None), Uninterrupted
                ):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        except BaseException:  # one that did not wait yet has raised
            self._give_back()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        """The handlers back to the program, though one that is back raises before the next one is;
        then run what waited."""
        try:
            try:
                self._restore()
            except BaseException:
                self._restore()
                raise
        finally:
            self.run_noted()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run_noted(self) -> None:
        """Run the handlers of what came until now: each one, though one before it raises.

        One is taken off at a time, as the next may come between any two lines here.
        """
        if self._noted:
            number, frame = self._noted.popitem()
            try:
                self._handlers[number](number, frame)
            finally:
                self.run_noted()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted[number] = frame
