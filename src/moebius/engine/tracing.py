"""Tracing while an engine serves: what cannot be written ends the trace and nothing else."""

import logging
from collections.abc import Callable

from moebius.engine.faults import say
from moebius.engine.trace import TraceWriter
from moebius.errors import frames

log = logging.getLogger(__name__)


class Tracing:
    """Records with `writer` for as long as it can; without one it records nothing."""

    def __init__(self, writer: TraceWriter | None) -> None:
        self._writer = writer

    def record(self, write: Callable[[TraceWriter], None]) -> None:
        """Write something. Where that fails, as on a full disk, tracing ends; serving goes on."""
        writer = self._writer
        if writer is None:
            return
        try:
            write(writer)
        except Exception as error:
            self._writer = None
            cause = error if isinstance(error, OSError) else frames(error)
            say(log.warning, "--trace: tracing stops, serving goes on: %s", cause)
            writer.abandon()

    def close(self) -> None:
        """Finish the trace; nothing is recorded from now on."""
        self.record(TraceWriter.close)
        self._writer = None
